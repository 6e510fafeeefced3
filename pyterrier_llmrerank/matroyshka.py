"""Matroyshka Re-Ranker: one language model, trained to be read at any depth and any width."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import pyterrier as pt

from .checkpoints import bundled
from .checkpoints.description import Description, assembled, fitting
from .checkpoints.locate import folder_of, is_hub_id, located, require, shown
from .engine.inputs import PROMPT, Ids, MatroyshkaInputs
from .reranker import LLMReranker, Scores
from .values import integer, path_like, positive

if TYPE_CHECKING:
    from .checkpoints.checkpoint import Checkpoint, MatroyshkaCheckpoint
    from .engine.scoring import Shape
    from .training.fitting import Frames
    from .training.recipes import MatroyshkaTraining

logger = logging.getLogger(__name__)


class MatroyshkaReranker(LLMReranker):
    r"""Rerank with a Matroyshka Re-Ranker (Liu et al., 2025: Fitting Into Any Shape).

    A pair reads ``<s> A: {query}\n B: {passage}\n {prompt}`` and is scored by the head of the layer at
    which it is cut off, on the last token's state.

    Args:
        model: a layer-wise checkpoint (``cost_wise_*``), or any causal language model of a supported
            family, to which ``adapters`` and ``start_layer`` belong: a folder, ``.gguf`` file or hub id, which may
            name a revision (``"owner/name@v1"``); paths are kept absolute.
            ``"smollm2-135m"`` is SmolLM2-135M-Instruct with the adapters that come with this package.
        adapters: LoRA folders to merge, in this order: paths, folders below the model's own
            (``"compensate/layer/full"``), or hub ids, as for ``model``. By default those that ``reranker.json`` names,
            if the model has one.
        token_adapters: token compensations by ratio, ``{2: folder, 4: folder}``: where a shape has
            ``compress_layers``, the one for its ratio, else for the next lower, is laid over the same weights. By
            default those that ``reranker.json`` names, if the model has one. Kept as a tuple of pairs; ``repr`` names
            the one in use.
        cutoff: the layer whose score is wanted, or several: then ``score`` is the deepest's, and each has
            a column ``score_<layer>``, all out of one pass. None for the model's last layer. Layers
            deeper than that are neither run nor, unless another reranker needs them, kept in memory.
        compress_layers: layer indices, from 0, before which the passage's states are pooled. Index 0 and
            indices from the cutoff on have no effect.
        compress_ratio: passage states pooled into one each time: 1 (off), 2, 4 or 8; larger powers of two
            (up to 64) work, but models are not trained for them.
        prune: a cascade: after so many layers (the key) only so many candidates of each query (the value) go on,
            the best by the score there: ``{8: 50, 16: 20}``. What goes on is not computed anew, and is scored as
            without. What leaves stands below it, in the order of its last score: ``score`` is lowered for that.
            ``exit_layer`` says after which layer each left, ``score_8`` and ``score_16`` what was read there. Layers
            are shallower than the cutoff and have heads; numbers do not grow with them. Kept as a tuple of pairs.
        prompt: the question that ends every input; None for the one in ``reranker.json``, else the original's.
        query_max_length: tokens kept of ``A: {query}``; None for three quarters of ``max_length``.
        max_length: tokens kept of ``B: {passage}``; prefix and passage together are held to about that.
        normalize: give scores as their sigmoid, between 0 and 1. Ranks are by the logits all the same. Where large
            logits become the same number in single precision, in which evaluators compare them, a warning says so.
        released: reproduce the released inference code as it runs on one pair at a time: the i-th cutoff
            is read by the i-th head rather than by the head trained for it, and the first pooling is
            weighted by a padding token. For comparing with published runs only.
        start_layer: the shallowest layer with a head, for a causal language model without layer-wise
            heads of its own: heads then start as the LM head's row of ``Yes``. None for the one in
            ``reranker.json`` or the checkpoint; a plain model has just one head then, at its last layer.
        layer_sep: layers from one such head to the next; None likewise, and 1 for a plain model.
        text_field, batch_size, device, dtype, quantization, torch_compile, verbose: as for
            :class:`~pyterrier_llmrerank.RankLLaMAReranker`.
        attn_implementation: as for :class:`~pyterrier_llmrerank.RankLLaMAReranker`; where ``released`` masks padding,
            attention is SDPA's whatever it says.
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
        token_adapters: Mapping[int, str] | Sequence[tuple[int, str]] = (),
        cutoff: int | Sequence[int] | None = None,
        compress_layers: int | Sequence[int] = (),
        compress_ratio: int = 1,
        prune: Mapping[int, int] | Sequence[tuple[int, int]] = (),
        prompt: str | None = None,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        released: bool = False,
        start_layer: int | None = None,
        layer_sep: int | None = None,
        text_field: str = "text",
        batch_size: int | None = None,
        device: str | Sequence[str] | None = None,
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
        source = self._source()
        self.adapters = tuple(located(path_like("adapters", folder), source) for folder in folders)
        self.token_adapters = tuple((r, located(name, source)) for r, name in _by_ratio(token_adapters))
        self.cutoff = _cutoff(cutoff)
        self.compress_layers = _layers("compress_layers", compress_layers, at_least=0)
        self.compress_ratio = positive("compress_ratio", compress_ratio)
        if self.compress_ratio not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"compress_ratio={compress_ratio!r}; allowed: 1, 2, 4, 8 (or a power of two up to 64).")
        self.prune = _prune(prune, self.deepest())
        if self.compress_ratio > 1 and not self.compress_layers:  # no error: grids set one after the other
            logger.warning("compress_ratio=%d has no effect without compress_layers", self.compress_ratio)
        deepest = self.deepest()
        if self.compress_ratio > 1 and deepest is not None and min(self.compress_layers, default=0) >= deepest:
            logger.warning(
                "compress_layers=%s: none lies below the cutoff, %d, so that nothing is pooled; the adapter for "
                "compression is used all the same.", list(self.compress_layers), deepest,
            )  # fmt: skip
        if not isinstance(prompt, str | None):
            raise ValueError(f"prompt={prompt!r}; allowed: a string or None.")
        self.prompt = prompt
        self.query_max_length = None if query_max_length is None else positive("query_max_length", query_max_length)
        self.max_length = positive("max_length", max_length)
        self.normalize = bool(normalize)
        self.released = bool(released)
        if self.released and self.prune:
            raise ValueError(f"prune={prune!r}: released=True reads other heads than those of the layers; allowed: ().")
        self.start_layer = None if start_layer is None else positive("start_layer", start_layer)
        self.layer_sep = None if layer_sep is None else positive("layer_sep", layer_sep)
        require(self.model, "model")
        for role, names in {"adapters": self.adapters, "token_adapters": dict(self.token_adapters).values()}.items():
            for name in names:
                if not (Path(source).expanduser() / name).is_dir():
                    require(name, role)
        parts = self._parts()
        if training is not None:
            self._check_training(training)
        if parts.layers is not None and parts.start_layer is not None:  # fail now, not after a first stage has run
            if parts.start_layer > parts.layers:
                raise ValueError(f"start_layer={parts.start_layer}: model={self.model!r} has {parts.layers} layers.")
            heads = range(parts.start_layer, parts.layers + 1, parts.layer_sep or 1)
            self._read_at(f"model={self.model!r}", heads, parts.layers)
        if self._is_local():
            self._shape(self._weights().checkpoint)

    @classmethod
    def untrained(cls, base: str, *, start_layer: int | None = None, **options: Any) -> MatroyshkaReranker:
        """A re-ranker to :meth:`fit`, from a causal language model. Before, it scores by the word ``Yes``.

        Args:
            base: a folder, ``.gguf`` file or hub id; ``"smollm2-135m"`` is the small model without its adapters.
            start_layer: the shallowest layer that is to have a head; None for the one in ``training``, or 4.
            options: any of the constructor's other arguments; ``training`` holds the settings.

        Raises:
            ValueError: as the constructor.
            FileNotFoundError: likewise.

        >>> from pyterrier_llmrerank import MatroyshkaReranker
        >>> MatroyshkaReranker.untrained("mistralai/Mistral-7B-v0.1").start_layer
        4
        """
        training = options.get("training")
        return cls(bundled.base(str(base)), start_layer=start_layer or getattr(training, "start_layer", 4), **options)

    def _check_training(self, training: object) -> None:
        """Raise ValueError on what is no recipe of this re-ranker, or one that says otherwise than its arguments."""
        from .training.recipes import CompensateTraining, DistillTraining

        if not isinstance(training, DistillTraining | CompensateTraining):
            raise ValueError(f"training={training!r}; allowed: DistillTraining(...), CompensateTraining(...) or None.")
        usual, parts = type(training).__dataclass_fields__, self._parts()
        for name in ("start_layer", "layer_sep", "prompt"):
            own, other = getattr(parts, name), getattr(training, name)
            own = PROMPT if name == "prompt" and own is None else own
            if other not in (own, usual[name].default) and own is not None:
                raise ValueError(f"{name}={own!r}, but training has {other!r}; the two must agree.")

    def at(
        self,
        *,
        cutoff: int | Sequence[int] | EllipsisType | None = ...,
        compress_layers: int | Sequence[int] | EllipsisType = ...,
        compress_ratio: int | EllipsisType = ...,
        prune: Mapping[int, int] | Sequence[tuple[int, int]] | EllipsisType = ...,
        normalize: bool | EllipsisType = ...,
    ) -> MatroyshkaReranker:
        """The same reranker in another shape, over the same weights in memory.

        A token adapter that fits the shape is laid over them; one that was given among ``adapters`` stays merged in.

        Args:
            cutoff: as for the constructor, like all others here; ``...``, the default, leaves it as it is.
            compress_layers: likewise.
            compress_ratio: likewise.
            prune: likewise.
            normalize: likewise.

        Raises:
            ValueError: not a value for an argument.
        """
        shape = {
            "cutoff": cutoff,
            "compress_layers": compress_layers,
            "compress_ratio": compress_ratio,
            "prune": prune,
            "normalize": normalize,
        }
        changed = {name: value for name, value in shape.items() if value is not ...}
        self._weights()  # opens nothing yet, but from now on the shapes have one copy to share
        return type(self)(**{**self._arguments(), **changed})

    def depths(self) -> dict[int, pt.Transformer]:
        """Each of several cutoffs as a pipeline of its own, all of which begin with the same pass; of one, itself.

        An experiment that shares what pipelines begin with makes that pass once:
        ``pt.Experiment([bm25 >> depth for depth in m.at(cutoff=[8, 16, 24]).depths().values()], ..., plan="tree")``.
        The time that it says each takes (``mrt``) is then that pass's. The pass is the first stage of each pipeline,
        which may be cached (``pyterrier_caching.KeyValueCache``); with ``normalize`` it gives logits, and the second
        stage their sigmoid.

        Raises:
            ValueError: there is a cascade, in which not every candidate comes to every depth.

        >>> from pyterrier_llmrerank import MatroyshkaReranker
        >>> MatroyshkaReranker(cutoff=[8, 16]).depths()[16][1]
        AtDepth(16, (8, 16))
        """
        from .features import AtDepth

        if self.prune:
            raise ValueError(f"prune={dict(self.prune)}: not every candidate comes to every depth; allowed: none.")
        if not isinstance(self.cutoff, tuple):
            return {self.cutoff or self._last_layer(): self}
        logits = self.at(normalize=False) if self.normalize else self  # by which each depth is ranked
        return {layer: logits >> AtDepth(layer, self.cutoff, self.normalize) for layer in self.cutoff}

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
        from .checkpoints.checkpoint import MatroyshkaCheckpoint

        return partial(MatroyshkaCheckpoint, *self._opened())

    def _overlaid(self) -> partial[Any] | None:
        from .checkpoints.checkpoint import MatroyshkaCheckpoint

        parts = self._parts()
        if overlay := self._token_adapter(parts):
            return partial(MatroyshkaCheckpoint, *self._opened(), overlay)
        if self._pools() and is_hub_id(self._source()) and not self.adapters and not self.token_adapters:
            return partial(MatroyshkaCheckpoint, *self._opened(), (), self.compress_ratio)  # if it has one of its own
        return None

    def _pools(self) -> bool:
        """Whether the shape compresses, whatever the cutoff: a shallow score does not depend on deeper cutoffs."""
        return self.compress_ratio > 1 and any(layer > 0 for layer in self.compress_layers)

    def _token_adapter(self, parts: Description) -> tuple[str, ...]:
        """The token compensation that fits the shape, if there is one."""
        return fitting(parts.token_adapters, self.compress_ratio) if self._pools() else ()

    def __repr__(self) -> str:
        call, source, parts = super().__repr__(), self._source(), self._parts()
        names = (*parts.adapters, *self._token_adapter(parts))
        if not self.token_adapters and (self.adapters or parts.base == source or names == (source,)):
            return call
        folder = Path(source).expanduser()
        own = {name: str(Path(name).relative_to(folder)) for name in names if folder in Path(name).parents}
        own[source] = folder.name
        return f"{call} over {', '.join(own.get(name) or shown(name, source) for name in names) or 'no adapter'}"

    def _shown(self, name: str) -> Any:
        value = getattr(self, name)
        if name == "adapters":
            return tuple(shown(adapter, self.model) for adapter in value)
        if name == "token_adapters":
            return tuple((ratio, shown(adapter, self.model)) for ratio, adapter in value)
        return value

    def _source(self) -> str:
        """Where the model is: a folder, ``.gguf`` file or hub id."""
        return bundled.reranker(self.model, "matroyshka")

    def _parts(self, *, fetch: bool = False) -> Description:
        """The parts of this reranker, by its arguments and the model's own description.

        Args:
            fetch: download a hub model to read its description; else a hub model counts as having none.
        """
        source = self._source()
        folder: Path | None = Path(source).expanduser()
        if is_hub_id(source):
            folder = folder_of(source, "model") if fetch else None
        argument = f"model={self.model!r}"
        return assembled(
            source, folder, self.adapters, self.token_adapters, self.start_layer, self.layer_sep, self.prompt, argument
        )

    def _opened(self) -> tuple[str, tuple[str, ...], int | None, int | None]:
        """Model, adapters to merge, and where the heads are; a hub model is looked into when it is opened."""
        parts = self._parts()
        return cast(str, parts.base), parts.adapters, parts.start_layer, parts.layer_sep

    def _is_local(self) -> bool:
        """Whether the checkpoint can be looked into without downloading or converting anything."""
        parts = self._parts()
        model = Path(cast(str, parts.base)).expanduser()
        return model.is_dir() and all(not is_hub_id(name) or (model / name).is_dir() for name in parts.folders)

    def _shape(self, checkpoint: Checkpoint) -> Shape:
        from .engine.scoring import Shape

        self._parts().check_layers(checkpoint.layers, f"model={self.model!r}")
        self._check_layerwise(checkpoint)
        with_head = checkpoint.head_layers
        cutoffs, stages = self._read_at(checkpoint.argument, with_head, checkpoint.layers)
        pools = self.compress_ratio > 1 and any(0 < layer < cutoffs[-1] for layer in self.compress_layers)
        if pools and not checkpoint.supports_layerwise:
            raise ValueError(
                f"compress_ratio={self.compress_ratio}: the layers of {checkpoint.argument} (model_type "
                f"{checkpoint.config.model_type!r}) cannot be walked one by one; allowed: 1, no compression."
            )
        if stages and not checkpoint.supports_layerwise:
            raise ValueError(
                f"prune={dict(stages)}: the layers of {checkpoint.argument} (model_type "
                f"{checkpoint.config.model_type!r}) cannot be walked one by one; allowed: {{}}, no cascade."
            )
        pad_id = cast("MatroyshkaCheckpoint", checkpoint).pad_id() if self.released and pools else None
        read = tuple(sorted({*cutoffs, *dict(stages)}))
        heads = range(len(cutoffs)) if self.released else [with_head.index(layer) for layer in read]
        return Shape(
            read, tuple(heads), self.compress_layers, self.compress_ratio, pad_id, stages, self.attn_implementation
        )

    def _read_at(
        self, model: str, with_head: Sequence[int], layers: int
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Cutoffs and stages; ValueError where a model with these heads and so many layers does not allow the shape."""
        cutoffs = self.cutoff if isinstance(self.cutoff, tuple) else (self.cutoff or with_head[-1],)
        stages = _prune(self.prune, cutoffs[-1])
        for argument, value, wanted in (
            *(("cutoff", cutoff, cutoff) for cutoff in cutoffs),
            *(("prune", dict(stages), layer) for layer, _ in stages),
        ):
            if wanted not in with_head:
                raise ValueError(f"{argument}={value}: {model} has heads at layers {_listed(with_head)}.")
        for layer in self.compress_layers:
            if layer >= layers:
                raise ValueError(
                    f"compress_layers={list(self.compress_layers)}: layer index {layer} is beyond {model}; "
                    f"allowed: 0 to {layers - 1}."
                )
        return cutoffs, stages

    def _encode(self, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        return MatroyshkaInputs(self._question(), self.query_max_length, self.max_length)(tokenizer, pairs)

    def _question(self) -> str:
        """The question that ends every input: the argument's, else the model's own, else the usual one."""
        prompt = self._parts().prompt
        if prompt is None and is_hub_id(self._source()):
            prompt = cast("MatroyshkaCheckpoint", self._weights().checkpoint).prompt
        return PROMPT if prompt is None else prompt

    def _recipe(self) -> MatroyshkaTraining:
        """As ``training`` says, with this re-ranker's heads and prompt."""
        from .training.recipes import DistillTraining

        recipe, parts = self.training or DistillTraining(), self._parts(fetch=True)
        start = recipe.start_layer if parts.start_layer is None else parts.start_layer
        step = recipe.layer_sep if parts.layer_sep is None else parts.layer_sep
        return replace(
            recipe, start_layer=start, layer_sep=step, prompt=PROMPT if parts.prompt is None else parts.prompt
        )

    def _train(self, training: Frames, validation: Frames | None) -> Path:
        from .training.fitting import fit

        parts = self._parts(fetch=True)
        return fit(
            self._recipe(), cast(str, parts.base), (*parts.adapters, *self._token_adapter(parts)), training, validation,
            device=self.device, dtype=self.dtype, verbose=self.verbose,
        )  # fmt: skip

    def _take_up(self, adapter: str) -> None:
        from .checkpoints.checkpoint import is_layer_wise

        recipe, parts = self._recipe(), self._parts(fetch=True)
        self.model, self.prompt = cast(str, parts.base), parts.prompt
        if not is_layer_wise(self.model):
            self.start_layer, self.layer_sep = recipe.start_layer, recipe.layer_sep
        self.adapters, self.token_adapters = (*parts.adapters, *self._token_adapter(parts), adapter), ()

    def save(self, folder: str | Path, *, merged: bool = False) -> list[Path]:
        """Write the trained model, in the form that the original programs, PEFT and the constructor open.

        A file ``reranker.json`` at the top describes it, with ``start_layer``, ``layer_sep`` and ``prompt``, so that
        ``MatroyshkaReranker(folder)`` opens it.

        Args:
            folder: where to; new or empty.
            merged: write one layer-wise model (``cost_wise_*``) with all adapters merged in, rather than the
                PEFT adapters. Weights are in ``dtype``, not quantised, heads are fp32.

        Returns:
            The folders of the adapters that this shape uses, in order: they open as ``adapters`` too. A single adapter
            is in the folder itself, several in numbered folders below it, token compensations in ``token-<ratio>``.
            Empty if ``merged``.

        Raises:
            FileExistsError: the folder is not empty.
            ValueError: there is no adapter to write.
        """
        from .checkpoints.saving import write_adapters, write_merged, written_whole
        from .engine.weights import build_decoder

        target, parts = Path(folder).expanduser(), self._parts(fetch=True)
        parts = replace(parts, prompt=PROMPT if parts.prompt is None else parts.prompt)
        if not merged:
            if not parts.folders:
                raise ValueError("adapters=(): there is no adapter to write; allowed: merged=True.")
            with written_whole(target):
                saved = write_adapters(parts, target)
            return [target / name for name in (*saved.adapters, *self._token_adapter(saved))]
        weights = self._weights()
        checkpoint = cast("MatroyshkaCheckpoint", weights.checkpoint)
        heads = checkpoint.heads(checkpoint.tokenizer())
        settings = {
            "model_type": f"cost_wise_{checkpoint.config.model_type}",
            "architectures": [f"CostWise{type(checkpoint.config).__name__.removesuffix('Config')}ForCausalLM"],
            "start_layer": checkpoint.start_layer, "layer_sep": checkpoint.layer_sep, "layer_wise": True,
        }  # fmt: skip
        named = {f"{checkpoint.head_module(k)}.weight": head[None] for k, head in enumerate(heads)}
        with written_whole(target):
            description = replace(checkpoint.description(), prompt=parts.prompt)
            write_merged(checkpoint, build_decoder(checkpoint), named, settings, weights.dtype, target, description)
        return []

    def _columns(self, scores: Scores) -> dict[str, np.ndarray]:
        layers = sorted({*(self.cutoff if isinstance(self.cutoff, tuple) else ()), *dict(self.prune)})
        columns = {"score": scores.final, **{f"score_{layer}": scores.by_layer[layer] for layer in layers}}
        return columns | ({"exit_layer": scores.exit_layer} if self.prune and scores.exit_layer is not None else {})

    def _at_cutoffs(self, scores: Scores) -> np.ndarray:
        shallower = self.cutoff[:-1] if isinstance(self.cutoff, tuple) else ()
        return np.stack([*(scores.by_layer[layer] for layer in shallower), scores.final])

    def _finish(self, scores: np.ndarray) -> np.ndarray:
        return sigmoid(scores) if self.normalize else scores


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logits as numbers between 0 and 1."""
    tail = np.exp(-np.abs(logits))  # of the smaller side, so that nothing overflows
    return cast(np.ndarray, np.where(logits < 0, tail, 1.0) / (1.0 + tail))


def _cutoff(value: object) -> int | tuple[int, ...] | None:
    """One layer as an int, several as an ascending tuple."""
    if value is None:
        return None
    layers = _layers("cutoff", value, at_least=1)
    if not layers:
        raise ValueError(f"cutoff={value!r}; allowed: a layer, several layers, or None.")
    return layers[0] if len(layers) == 1 else layers


def _prune(value: object, deepest: int | None) -> tuple[tuple[int, int], ...]:
    """Layers and how many go on after each, ascending by layer; the deepest cutoff as far as it is known."""
    allowed = "layers and how many candidates go on after each, {8: 50, 16: 20}"
    stages = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(stages, list | tuple) or not all(isinstance(s, list | tuple) and len(s) == 2 for s in stages):
        raise ValueError(f"prune={value!r}; allowed: {allowed}.")
    checked = sorted((integer("prune", layer, allowed), integer("prune", keep, allowed)) for layer, keep in stages)
    if any(layer < 1 or keep < 1 for layer, keep in checked):
        raise ValueError(f"prune={value!r}; allowed: {allowed}, integers of at least 1.")
    if len(dict(checked)) < len(checked):
        raise ValueError(f"prune={value!r}: a layer stands there twice; allowed: {allowed}.")
    if deepest is not None and checked and checked[-1][0] >= deepest:
        raise ValueError(f"prune={value!r}: layer {checked[-1][0]} is not shallower than the cutoff, {deepest}.")
    for (_, before), (layer, keep) in pairwise(checked):
        if keep > before:
            raise ValueError(f"prune={value!r}: {keep} are to go on after layer {layer}, but {before} are left there.")
    return tuple(checked)


def _by_ratio(value: object) -> tuple[tuple[int, str], ...]:
    """Adapters by the ratio they compensate for, ascending."""
    allowed = "a folder for each ratio, {2: folder, 4: folder}"
    roles = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(roles, list | tuple) or not all(isinstance(r, list | tuple) and len(r) == 2 for r in roles):
        raise ValueError(f"token_adapters={value!r}; allowed: {allowed}.")
    by_ratio = {integer("token_adapters", ratio, allowed): path_like("token_adapters", name) for ratio, name in roles}
    if any(ratio < 2 for ratio in by_ratio):
        raise ValueError(f"token_adapters={value!r}; allowed: {allowed}, ratios from 2 on.")
    return tuple(sorted(by_ratio.items()))


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
