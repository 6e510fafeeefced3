"""Matroyshka Re-Ranker: one language model, trained to be read at any depth and any width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import pyterrier as pt

from .files import (
    SHIPPED_DISTILLED,
    SHIPPED_LAYERS,
    SHIPPED_RATIOS,
    adapter_folder,
    is_hub_id,
    is_shipped,
    require,
    shipped,
    smollm2,
)
from .inputs import PROMPT, Ids, MatroyshkaInputs
from .reranker import LLMReranker, integer, path_like, positive

if TYPE_CHECKING:
    from .checkpoints import Checkpoint, MatroyshkaCheckpoint
    from .scoring import Shape
    from .training.fitting import Frames
    from .training.recipes import MatroyshkaTraining


class MatroyshkaReranker(LLMReranker):
    r"""Rerank with a Matroyshka Re-Ranker (Liu et al., 2025: Fitting Into Any Shape).

    A pair reads ``<s> A: {query}\n B: {passage}\n {prompt}`` and is scored by the head of the layer at
    which it is cut off, on the last token's state.

    Args:
        model: a layer-wise checkpoint (``cost_wise_*``), or any causal language model of a supported
            family, to which ``adapters`` and ``start_layer`` belong: a folder, ``.gguf`` file or hub id.
            ``"smollm2-135m"`` is SmolLM2-135M-Instruct with the adapters that come with this package.
        adapters: LoRA folders to merge, in this order: paths, folders below the model's own
            (``"compensate/layer/full"``), or hub ids. By default none; of ``"smollm2-135m"`` those that
            fit the shape: distilled, layer compensation, and token compensation where it compresses.
        cutoff: the layer whose score is wanted, or several: then ``score`` is the deepest's, and each has
            a column ``score_<layer>``, all out of one pass. None for the model's last layer. Layers
            deeper than that are neither run nor, unless another reranker needs them, kept in memory.
        compress_layers: layer indices, from 0, before which the passage's states are pooled. Index 0 and
            indices from the cutoff on have no effect.
        compress_ratio: passage states pooled into one each time: 1 (off), 2, 4 or 8; larger powers of two
            (up to 64) work, but models are not trained for them.
        prompt: the question that ends every input.
        query_max_length: tokens kept of ``A: {query}``; None for three quarters of ``max_length``.
        max_length: tokens kept of ``B: {passage}``; prefix and passage together are held to about that.
        normalize: give scores as their sigmoid, between 0 and 1.
        released: reproduce the released inference code as it runs on one pair at a time: the i-th cutoff
            is read by the i-th head rather than by the head trained for it, and the first pooling is
            weighted by a padding token. For comparing with published runs only.
        start_layer: the shallowest layer with a head, for a causal language model without layer-wise
            heads of its own: heads then start as the LM head's row of ``Yes``. None for what the
            checkpoint says; a plain model has just one head then, at its last layer.
        layer_sep: layers from one such head to the next; None for 1.
        text_field, batch_size, device, dtype, quantization, torch_compile, attn_implementation, verbose: as for
            :class:`~pyterrier_llmrerank.RankLLaMAReranker`. Where ``released`` masks padding, attention is
            SDPA's whatever ``attn_implementation`` says.
        training: how :meth:`fit` trains: ``DistillTraining`` (the default, with the original's settings)
            or ``CompensateTraining``. What it learns becomes one more of ``adapters``.

    Raises:
        ValueError: an argument is not what is allowed, or not what a local checkpoint allows.
        FileNotFoundError: a local checkpoint is not there. What is to come from the hub is looked for, and
            may fail, on first use.
        ImportError: a package that an option needs is not installed.

    >>> from pyterrier_llmrerank import MatroyshkaReranker
    >>> deep = MatroyshkaReranker()
    >>> deep.at(cutoff=16, compress_layers=[8], compress_ratio=2)
    MatroyshkaReranker('BAAI/Matroyshka-ReRanker-passage', cutoff=16, compress_layers=(8,), compress_ratio=2)
    """

    training: MatroyshkaTraining | None
    schematic: ClassVar = {"label": "Matroyshka", "help_url": "https://doi.org/10.1145/3696410.3714620"}

    def __init__(
        self,
        model: str = "BAAI/Matroyshka-ReRanker-passage",
        *,
        adapters: str | Sequence[str] = (),
        cutoff: int | Sequence[int] | None = None,
        compress_layers: int | Sequence[int] = (),
        compress_ratio: int = 1,
        prompt: str = PROMPT,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        released: bool = False,
        start_layer: int | None = None,
        layer_sep: int | None = None,
        text_field: str = "text",
        batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        torch_compile: bool = False,
        attn_implementation: str | None = None,
        verbose: bool = False,
        training: MatroyshkaTraining | None = None,
    ) -> None:
        self._set_shared(
            model, text_field, batch_size, device, dtype, quantization, torch_compile, attn_implementation, verbose,
            training,
        )  # fmt: skip
        folders = adapters if isinstance(adapters, list | tuple) else [adapters]
        self.adapters = tuple(path_like("adapters", folder) for folder in folders)
        self.cutoff = _cutoff(cutoff)
        self.compress_layers = _layers("compress_layers", compress_layers, at_least=0)
        self.compress_ratio = positive("compress_ratio", compress_ratio)
        if self.compress_ratio not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"compress_ratio={compress_ratio!r}; allowed: 1, 2, 4, 8 (or a power of two up to 64).")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r}; allowed: a string.")
        self.prompt = prompt
        self.query_max_length = None if query_max_length is None else positive("query_max_length", query_max_length)
        self.max_length = positive("max_length", max_length)
        self.normalize = bool(normalize)
        self.released = bool(released)
        self.start_layer = None if start_layer is None else positive("start_layer", start_layer)
        self.layer_sep = None if layer_sep is None else positive("layer_sep", layer_sep)
        if training is not None:
            self._check_training(training)
        require(self.model, "model")
        for name in self.adapters:
            if not (Path(self.model).expanduser() / name).is_dir():
                require(name, "adapters")
        if self._is_local():  # fail now, not after a first stage has run
            self._shape(self._weights().checkpoint)

    @classmethod
    def untrained(cls, base: str, *, start_layer: int | None = None, **options: Any) -> MatroyshkaReranker:
        """A re-ranker to :meth:`fit`, from a causal language model. Before, it scores by the word ``Yes``.

        Args:
            base: a folder, ``.gguf`` file or hub id.
            start_layer: the shallowest layer that is to have a head; None for the one in ``training``, or 4.
            options: any of the constructor's other arguments; ``training`` holds the settings.

        Raises:
            ValueError, FileNotFoundError: as the constructor.

        >>> from pyterrier_llmrerank import MatroyshkaReranker
        >>> MatroyshkaReranker.untrained("mistralai/Mistral-7B-v0.1").start_layer
        4
        """
        training = options.get("training")
        return cls(base, start_layer=start_layer or getattr(training, "start_layer", 4), **options)

    def _check_training(self, training: object) -> None:
        """Raise ValueError on what is no recipe of this re-ranker, or one that says otherwise than its arguments."""
        from .training.recipes import CompensateTraining, DistillTraining

        if not isinstance(training, DistillTraining | CompensateTraining):
            raise ValueError(f"training={training!r}; allowed: DistillTraining(...), CompensateTraining(...) or None.")
        usual = type(training).__dataclass_fields__
        for name in ("start_layer", "layer_sep", "prompt"):
            own, other = getattr(self, name), getattr(training, name)
            if other not in (own, usual[name].default) and (own is not None or name == "prompt"):
                raise ValueError(f"{name}={own!r}, but training has {other!r}; the two must agree.")

    def at(
        self,
        *,
        cutoff: int | Sequence[int] | EllipsisType | None = ...,
        compress_layers: int | Sequence[int] | EllipsisType = ...,
        compress_ratio: int | EllipsisType = ...,
        normalize: bool | EllipsisType = ...,
    ) -> MatroyshkaReranker:
        """The same reranker in another shape, over the same weights in memory.

        Only for ``"smollm2-135m"`` do other ratios mean other adapters, so weights of their own.

        Args:
            cutoff: as for the constructor, like all others here; ``...``, the default, leaves it as it is.
            compress_layers: likewise.
            compress_ratio: likewise.
            normalize: likewise.

        Raises:
            ValueError: not a value for an argument.
        """
        shape = {
            "cutoff": cutoff,
            "compress_layers": compress_layers,
            "compress_ratio": compress_ratio,
            "normalize": normalize,
        }
        changed = {name: value for name, value in shape.items() if value is not ...}
        self._weights()  # opens nothing yet, but from now on the shapes have one copy to share
        return type(self)(**{**self._arguments(), **changed})

    def fuse_feature_union(self, other: pt.Transformer, is_left: bool) -> pt.Transformer | None:
        """Make ``self ** other`` one pass where they differ in ``cutoff`` alone; PyTerrier calls it to compile."""
        from .features import fused

        return fused(self, other) if is_left else fused(other, self)

    def _last_layer(self) -> int:
        """The model's deepest layer with a head."""
        return self._weights().checkpoint.head_layers[-1]

    def deepest(self) -> int | None:
        """The deepest cutoff; None for the model's last layer."""
        return self.cutoff[-1] if isinstance(self.cutoff, tuple) else self.cutoff

    def _checkpoint(self) -> partial[Any]:
        from .checkpoints import MatroyshkaCheckpoint

        return partial(MatroyshkaCheckpoint, *self._opened())

    def _opened(self) -> tuple[str, tuple[str, ...], int | None, int | None]:
        """Model, adapters, and where the heads are, that are opened."""
        if not is_shipped(self.model):
            return self.model, self.adapters, self.start_layer, self.layer_sep
        pools = any(0 < layer < (self.deepest() or SHIPPED_LAYERS) for layer in self.compress_layers)
        fitting = [ratio for ratio in SHIPPED_RATIOS if pools and ratio <= self.compress_ratio]
        roles = [*SHIPPED_DISTILLED, "layer", *(f"token-{ratio}" for ratio in fitting[-1:])]
        adapters = self.adapters or tuple(shipped(f"matroyshka-{self.model}/{role}") for role in roles)
        return smollm2(), adapters, self.start_layer or 4, self.layer_sep

    def _is_local(self) -> bool:
        """Whether the checkpoint can be looked into without downloading or converting anything."""
        model = Path(self.model).expanduser()
        return model.is_dir() and all(not is_hub_id(name) or (model / name).is_dir() for name in self.adapters)

    def _shape(self, checkpoint: Checkpoint) -> Shape:
        from .scoring import Shape

        self._check_walked(checkpoint)
        with_head = checkpoint.head_layers
        cutoffs = self.cutoff if isinstance(self.cutoff, tuple) else (self.cutoff or with_head[-1],)
        for cutoff in cutoffs:
            if cutoff not in with_head:
                raise ValueError(f"cutoff={cutoff}: {checkpoint.argument} has heads at layers {_listed(with_head)}.")
        for layer in self.compress_layers:
            if layer >= checkpoint.layers:
                raise ValueError(
                    f"compress_layers={list(self.compress_layers)}: layer index {layer} is beyond "
                    f"{checkpoint.argument}; allowed: 0 to {checkpoint.layers - 1}."
                )
        pools = self.compress_ratio > 1 and any(0 < layer < cutoffs[-1] for layer in self.compress_layers)
        if pools and not checkpoint.walked:
            raise ValueError(
                f"compress_ratio={self.compress_ratio}: the layers of {checkpoint.argument} (model_type "
                f"{checkpoint.config.model_type!r}) cannot be walked one by one; allowed: 1, no compression."
            )
        pad_id = cast("MatroyshkaCheckpoint", checkpoint).pad_id() if self.released and pools else None
        heads = range(len(cutoffs)) if self.released else [with_head.index(cutoff) for cutoff in cutoffs]
        return Shape(cutoffs, tuple(heads), self.compress_layers, self.compress_ratio, pad_id, self.attn_implementation)

    def _encode(self, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        return MatroyshkaInputs(self.prompt, self.query_max_length, self.max_length)(tokenizer, pairs)

    def _recipe(self) -> MatroyshkaTraining:
        """As ``training`` says, with this re-ranker's heads and prompt."""
        from .training.recipes import DistillTraining

        recipe = self.training or DistillTraining()
        _, _, start_layer, layer_sep = self._opened()
        start = recipe.start_layer if start_layer is None else start_layer
        step = recipe.layer_sep if layer_sep is None else layer_sep
        return replace(recipe, start_layer=start, layer_sep=step, prompt=self.prompt)

    def _train(self, training: Frames, validation: Frames | None) -> Path:
        from .training.fitting import fit

        model, adapters, _, _ = self._opened()
        return fit(
            self._recipe(), model, adapters, training, validation,
            device=self.device, dtype=self.dtype, verbose=self.verbose,
        )  # fmt: skip

    def _take_up(self, adapter: str) -> None:
        from .checkpoints import is_layer_wise

        recipe = self._recipe()
        self.model, adapters, _, _ = self._opened()
        if not is_layer_wise(self.model):
            self.start_layer, self.layer_sep = recipe.start_layer, recipe.layer_sep
        self.adapters = (*adapters, adapter)

    def save(self, folder: str | Path, *, merged: bool = False) -> list[Path]:
        """Write what was trained, in the form that the original programs, PEFT and the constructor open.

        Args:
            folder: where to; new or empty.
            merged: write one layer-wise model (``cost_wise_*``) with all adapters merged in, rather than the
                PEFT adapters. Weights are in ``dtype``, not quantised, heads are fp32.

        Adapters do not say with which ``start_layer``, ``layer_sep`` and ``prompt`` they were trained: give those
        to the constructor again.

        Returns:
            What to give as ``adapters`` when opening them: the folder where there is one adapter, else a numbered
            folder in it for each; nothing where merged, which is opened as ``model``.

        Raises:
            FileExistsError: there is something in the folder.
            ValueError: there is no adapter to write.
        """
        from .saving import copy_adapter, empty_folder, write_merged

        model, adapters, _, _ = self._opened()
        if not merged and not adapters:
            raise ValueError("adapters=(): there is none to write; allowed: merged=True.")
        target = empty_folder(Path(folder).expanduser())
        if not merged:
            targets = [target / str(n) for n in range(1, len(adapters) + 1)] if len(adapters) > 1 else [target]
            for name, place in zip(adapters, targets, strict=True):
                place.mkdir(exist_ok=True)
                copy_adapter(adapter_folder(name, model), place)
            return targets
        weights = self._weights()
        checkpoint = cast("MatroyshkaCheckpoint", weights.checkpoint)
        heads = checkpoint.heads(checkpoint.tokenizer())
        settings = {
            "model_type": f"cost_wise_{checkpoint.config.model_type}",
            "architectures": [f"CostWise{type(checkpoint.config).__name__.removesuffix('Config')}ForCausalLM"],
            "start_layer": checkpoint.start_layer, "layer_sep": checkpoint.layer_sep, "layer_wise": True,
        }  # fmt: skip
        named = {f"{checkpoint.head_module(k)}.weight": head[None] for k, head in enumerate(heads)}
        write_merged(checkpoint, named, settings, weights.dtype, target)
        return []

    def _layer_columns(self) -> list[str]:
        return [f"score_{layer}" for layer in self.cutoff] if isinstance(self.cutoff, tuple) else []

    def _finish(self, scores: np.ndarray) -> np.ndarray:
        if not self.normalize:
            return scores
        tail = np.exp(-np.abs(scores))  # of the smaller side, so that nothing overflows
        return cast(np.ndarray, np.where(scores < 0, tail, 1.0) / (1.0 + tail))


def _cutoff(value: object) -> int | tuple[int, ...] | None:
    """One layer as an int, several as an ascending tuple."""
    if value is None:
        return None
    layers = _layers("cutoff", value, at_least=1)
    if not layers:
        raise ValueError(f"cutoff={value!r}; allowed: a layer, several layers, or None.")
    return layers[0] if len(layers) == 1 else layers


def _layers(name: str, value: object, *, at_least: int) -> tuple[int, ...]:
    """Layer numbers, ascending and once each."""
    allowed = f"a layer from {at_least} on, or a list of them"
    value = value.tolist() if isinstance(value, np.ndarray) else value
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    layers = [integer(name, layer, allowed) for layer in (cast("Iterable[object]", value) if several else [value])]
    if any(layer < at_least for layer in layers):
        raise ValueError(f"{name}={value!r}; allowed: {allowed}.")
    return tuple(sorted(set(layers)))


def _listed(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"{layers[0]} only; start_layer gives a plain language model more"
    step = layers[1] - layers[0]
    return f"{layers[0]} to {layers[-1]}" + (f" in steps of {step}" if step > 1 else "")
