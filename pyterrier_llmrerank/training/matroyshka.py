"""The recipes of Matroyshka's two steps: distillation and compensation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ..checkpoints.description import MAX_LENGTH, Description
from ..engine.inputs import PROMPT, MatroyshkaInputs
from ..values import RATIOS
from .objectives import METHODS, CascadeLoss
from .options import default_of, document_options, make_tuple, option
from .recipes import PROJECTIONS, Recipe
from .widths import Widths

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
    from .batches import Inputs


@document_options
@dataclass(frozen=True, kw_only=True, repr=False)
class MatroyshkaTraining(Recipe):
    """Holds the settings that both steps of training a Matroyshka reranker share (Liu et al., 2025).

    Raises:
        ValueError: a value is not allowed.
    """

    task_type: ClassVar[str] = "CAUSAL_LM"

    target_modules: tuple[str, ...] = (*PROJECTIONS, "linear_head")
    start_layer: int = option(4, "shallowest layer with a head; a described model keeps its own heads", least=1)
    layer_sep: int = option(1, "distance between layers with a head", least=1)
    compress_layers: tuple[int, ...] = option(
        (4, 8, 12, 16, 20, 24, 28), "layers after which passages are pooled; each batch draws half of them on average"
    )
    compress_ratios: tuple[int, ...] = option(
        (1, 2, 4, 8), "ratios to draw from for each batch: the number of passage tokens pooled into one"
    )
    train_method: str = option(
        "normal",
        f"loss, one of {', '.join(METHODS)}; normal and distill are the cross-entropy alone, the others distil "
        "deeper layers into shallower ones; methods with _teacher learn from a teacher's scores too",
    )
    prompt: str = option(
        PROMPT, "question at the end of every input; a described model keeps its own, and a prompt in the data wins"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        make_tuple(self, "compress_layers", int)
        make_tuple(self, "compress_ratios", int)
        if not self.compress_ratios or any(ratio not in RATIOS for ratio in self.compress_ratios):
            raise ValueError(f"compress_ratios={list(self.compress_ratios)}; allowed: powers of two from 1 to 64.")
        if any(layer < 0 for layer in self.compress_layers):
            raise ValueError(f"compress_layers={list(self.compress_layers)}; allowed: layers, counted from 1.")
        self.loss  # noqa: B018 # raises if the method contradicts other options

    def widths(self, seed: int) -> Widths:
        """Return the widths of ``compress_layers`` and ``compress_ratios``."""
        return Widths(self.compress_layers, self.compress_ratios, seed)

    @property
    def loss(self) -> CascadeLoss:
        """The loss named by ``train_method``."""
        return CascadeLoss(self.train_method, self.teacher_temperature, self.absolute_margin)

    def open(self, model: str, adapters: Sequence[str] = ()) -> Checkpoint:
        """Open a causal language model or layer-wise checkpoint to train.

        Args:
            model: a folder, ``.gguf`` file or hub id; an adapter is trained further.
            adapters: adapters to merge into the base first.

        Returns:
            The checkpoint. Its heads and prompt are from the descriptions of the model and its adapters, or else from
            the recipe; its lengths are from the last description.

        Raises:
            ValueError: the model has too few layers for ``start_layer`` or ``compress_layers``, or it was trained with
                a ``start_layer``, ``layer_sep`` or ``prompt`` that differs from the recipe's. The recipe's defaults
                never conflict.
        """
        from ..checkpoints.adapters import Adapter
        from ..checkpoints.description import read_description
        from ..checkpoints.locate import folder_of
        from ..checkpoints.matroyshka_parts import Assembly

        trained, folder, argument = None, folder_of(model, "model"), f"model={model!r}"
        if (folder / "adapter_config.json").is_file():
            own = read_description(model, folder, "matroyshka", argument)
            trained = Adapter(folder, argument)
            trained.base_folder()  # if it is missing, the error names the adapter
            earlier = [name for name in own.adapters if name != model] if own is not None else []
            model, adapters = trained.base, [*(adapters or earlier), str(folder)]
        elif adapters:
            argument = f"raw_peft={list(adapters)}"
        given = Description(kind="matroyshka", base=model, adapters=tuple(adapters))
        assembly = Assembly(given, f"model={model!r}")
        checkpoint = self.open_parts(assembly.parts(fetch=True), argument)
        if trained is not None:  # checked with the others, but trained rather than merged
            checkpoint.adapters, checkpoint.adapter = checkpoint.adapters[:-1], checkpoint.adapters[-1]
        return checkpoint

    def open_parts(self, parts: Description, argument: str) -> MatroyshkaCheckpoint:
        """Open the checkpoint of assembled parts to train; the recipe supplies heads and a prompt that the parts lack.

        Args:
            parts: the base and the adapters to merge.
            argument: the caller's argument and its value, for messages.

        Raises:
            ValueError: as :meth:`open`.
        """
        from ..checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint, is_layer_wise

        base, agreed = str(parts.base), {}
        for name in ("start_layer", "layer_sep", "prompt"):
            given, trained = getattr(self, name), getattr(parts, name)
            if trained is not None and given not in (trained, self._default(name)):
                raise ValueError(f"{name}={given!r}, but {argument} was trained with {trained!r}; the two must agree.")
            agreed[name] = given if trained is None else trained
        if is_layer_wise(base):  # it has its own heads, which a default does not contradict
            agreed |= {name: None for name in ("start_layer", "layer_sep") if agreed[name] == self._default(name)}
        parts = replace(parts, **agreed)
        checkpoint = MatroyshkaCheckpoint(base, parts.adapters, parts.start_layer, parts.layer_sep, parts=parts)
        if max(self.compress_ratios) > 1 and not any(0 < layer < checkpoint.layers for layer in self.compress_layers):
            raise ValueError(
                f"compress_layers={list(self.compress_layers)}: nothing would be compressed; allowed: layers "
                f"from 1 to {checkpoint.layers - 1}, or compress_ratios=[1]."
            )
        return checkpoint

    def _default(self, name: str) -> Any:
        return default_of(type(self).__dataclass_fields__[name])

    def following(self, checkpoint: Checkpoint) -> MatroyshkaTraining:
        """Return the recipe with the heads and the prompt of the checkpoint."""
        own = cast("MatroyshkaCheckpoint", checkpoint)
        return replace(
            self, start_layer=own.start_layer, layer_sep=own.layer_sep, prompt=own.parts.prompt or self.prompt
        )

    def heads(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
        """Return the checkpoint's heads."""
        return checkpoint.heads(tokenizer)

    def described_inputs(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the prompt, and lengths of the recipe where the checkpoint's would cut texts that training reads.

        The original program trains on inputs of 224 tokens and reranks 512, so shorter lengths are not kept.
        """
        query, total = self.query_max_length, self.query_max_length + self.passage_max_length
        if all(getattr(self, name) == self._default(name) for name in ("query_max_length", "passage_max_length")):
            return {"prompt": self.prompt}
        parts, lengths = cast("MatroyshkaCheckpoint", checkpoint).parts, dict[str, Any]()
        scored = MatroyshkaInputs(self.prompt, parts.query_max_length, parts.max_length or MAX_LENGTH)
        if total > scored.max_length:
            lengths["max_length"] = total
        if query > replace(scored, **lengths).query_limit:
            lengths["query_max_length"] = query
        return {"prompt": self.prompt, **lengths}

    def inputs(self, prompt: str | None) -> Inputs:
        """Return the encoding of inference, with one limit for query and passage together, as in the original."""
        total = self.query_max_length + self.passage_max_length
        return MatroyshkaInputs(self.prompt if prompt is None else prompt, self.query_max_length, total=total)

    def body(self, text: str, title: str | None) -> str:
        """Format a passage as ``{title} {text}``, or as its text alone."""
        return f"{title} {text}" if title else text


@document_options
@dataclass(frozen=True, kw_only=True, repr=False)
class DistillTraining(MatroyshkaTraining):
    """Train every layer from ``start_layer`` to rank, by cascaded self-distillation.

    Without teacher scores, ``fit`` uses the default method without its ``_teacher``. Training from files raises an
    error, and so does ``fit`` with ``absolute_margin``, ``teacher_temperature`` or another method that ends in
    ``_teacher``.

    >>> from pyterrier_llmrerank.training import DistillTraining
    >>> DistillTraining().train_method
    'distill_fix_layer_teacher'

    Raises:
        ValueError: a value is not allowed.
    """

    train_method: str = "distill_fix_layer_teacher"
    learning_rate: float = 2e-4


@document_options
@dataclass(frozen=True, kw_only=True, repr=False)
class CompensateTraining(MatroyshkaTraining):
    """Train one more adapter on top of a distilled model, for all its depths or for one width.

    >>> from pyterrier_llmrerank.training import CompensateTraining
    >>> CompensateTraining(finetune_type="token", compress_ratios=(2,)).widths(0).ratios
    (2,)

    Raises:
        ValueError: a value is not allowed.
    """

    finetune_type: str = option("layer", "layer: for all depths at full width; token: for one ratio")
    compress_ratios: tuple[int, ...] = option((1,), "the ratio to compensate for; 1 for layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finetune_type not in ("layer", "token"):
            raise ValueError(f"finetune_type={self.finetune_type!r}; allowed: layer, token.")
        if self.finetune_type == "layer" and self.compress_ratios != (1,):
            raise ValueError(f"compress_ratios={list(self.compress_ratios)}: finetune_type=layer allows 1 alone.")
        if self.finetune_type == "token" and (len(self.compress_ratios) != 1 or self.compress_ratios == (1,)):
            raise ValueError(
                f"compress_ratios={list(self.compress_ratios)}: finetune_type=token allows one ratio, 2 or more."
            )

    @property
    def token_ratio(self) -> int | None:
        """The ratio that a token adapter is trained for; None for layer compensation."""
        return self.compress_ratios[0] if self.finetune_type == "token" else None
