"""The recipe of RankLLaMA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ..checkpoints.input_format import NAMED, InputFormat, check_name
from ..engine.inputs import inputs_of
from .objectives import DistilledLoss
from .options import document_options, option
from .recipes import PROJECTIONS, Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.rankllama_checkpoint import RankLLaMACheckpoint
    from .batches import Inputs


@document_options
@dataclass(frozen=True, kw_only=True, repr=False)
class RankLLaMATraining(Recipe):
    """Fine-tune RankLLaMA (Ma et al., 2023): LoRA and a score head, with cross-entropy over groups.

    The scores of a teacher (column ``teacher`` in ``fit``, ``pos_scores`` and ``neg_scores`` in files) are used if
    ``teacher_weight`` or ``absolute_margin`` is set.

    >>> from pyterrier_llmrerank.training import RankLLaMATraining
    >>> RankLLaMATraining(group_size=8).learning_rate
    0.0001

    Raises:
        ValueError: a value is not allowed.
    """

    task_type: ClassVar[str] = "SEQ_CLS"

    passage_max_length: int = 196
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] = tuple(name for name in PROJECTIONS if name != "k_proj")
    learning_rate: float = 1e-4
    gradient_accumulation_steps: int = 8
    teacher_weight: float = option(
        0.0, "weight of the KL divergence from the teacher's scores; 0 learns from the labels alone", least=0.0
    )
    input_format: str | None = option(
        None, f"{', '.join(NAMED)} or a template; None for the format of an adapter to train further, or tevatron-2023"
    )
    query_prefix: str | None = option(None, "text before a query in Tevatron's formats; None for the format's own")
    passage_prefix: str | None = option(None, "text before a passage in Tevatron's formats; None for the format's own")
    append_eos: bool | None = option(
        None,
        "append the end token, in formats other than tevatron-2023; None for the value of an adapter to train further, "
        "or False",
        "append_eos_token",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss  # noqa: B018 # raises if the temperature has no effect
        if self.input_format is not None:
            check_name("input_format", self.input_format)
            self.form  # noqa: B018 # raises if options contradict each other

    @property
    def form(self) -> InputFormat:
        """The format of the input, by the recipe alone."""
        return InputFormat.chosen(self._given())

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in InputFormat().settings()}

    def following(self, checkpoint: Checkpoint) -> RankLLaMATraining:
        """Return the recipe with the input format of the checkpoint, unless it has its own."""
        own = cast("RankLLaMACheckpoint", checkpoint).input_format
        return self if own is None else replace(self, **InputFormat.chosen(self._given(), own).settings())

    def described_inputs(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the input format, and the lengths that are not the usual ones.

        The original program trains on passages of 196 tokens and reranks 164, so the usual length is not kept.
        """
        lengths = {name: getattr(self, name) for name in ("query_max_length", "passage_max_length")}
        own = {name: length for name, length in lengths.items() if length != getattr(type(self), name)}
        return {"input_format": self.form, **own}

    @property
    def loss(self) -> DistilledLoss:
        """The cross-entropy, and the divergence from the teacher if it has a weight."""
        return DistilledLoss(self.teacher_weight, self.teacher_temperature, self.absolute_margin)

    def open(self, model: str, adapters: Sequence[str] = (), base_model: str | None = None) -> Checkpoint:
        """Open a causal language model, or a RankLLaMA adapter to train further.

        Args:
            model: a folder, ``.gguf`` file or hub id.
            adapters: must be empty.
            base_model: the base of the adapter; None for the base that it names.

        Raises:
            ValueError: ``adapters`` is not empty.
        """
        from ..checkpoints.rankllama_checkpoint import RankLLaMACheckpoint

        if adapters:
            raise ValueError(f"raw_peft={list(adapters)}: RankLLaMA merges no adapters; give one model or adapter.")
        return RankLLaMACheckpoint(model, base_model)

    def heads(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
        """Return the checkpoint's score head, or small random weights if it has none."""
        import torch

        if checkpoint.has_heads:
            return checkpoint.heads(tokenizer)
        generator = torch.Generator().manual_seed(seed)
        spread = getattr(checkpoint.config, "initializer_range", 0.02)
        return torch.randn(1, checkpoint.config.hidden_size, generator=generator) * spread

    def inputs(self, prompt: str | None) -> Inputs:
        """Return the encoding of inference, without a prompt.

        In ``tevatron-2023``, passages are three tokens shorter, as in the original program.
        """
        return inputs_of(self.form, self.query_max_length, self.passage_max_length, margin=3)

    def body(self, text: str, title: str | None) -> str:
        """Format a passage by the input format, for example as ``document: {title} {text}``."""
        return self.form.body(text, title)
