"""The settings that all recipes share; their defaults are the values of the original programs."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pyterrier as pt

from ..checkpoints.description import KINDS
from .objectives import Loss
from .options import Declared, check_numbers, default_of, document_options, make_tuple, option
from .widths import Widths

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..checkpoints.cards import Stated
    from ..checkpoints.checkpoint import Checkpoint
    from .batches import Inputs

#: The linear layers of a decoder layer.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@document_options
@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(Declared, ABC):
    """Holds the settings of a training run.

    Raises:
        ValueError: a value is not allowed.
    """

    #: The PEFT task type of the saved adapter, as in the original programs.
    task_type: ClassVar[str]

    group_size: int = option(
        16,
        "number of passages that compete for one query: one positive, the others negatives",
        "train_group_size",
        "train_n_passages",
        least=2,
    )
    query_max_length: int = option(32, "tokens kept of a query", "query_max_len", "q_max_len", least=1)
    passage_max_length: int = option(192, "tokens kept of a passage", "passage_max_len", "p_max_len", least=8)
    lora_rank: int = option(32, "rank of the LoRA updates", "lora_r", least=1)
    lora_alpha: float = option(64.0, "scale of the LoRA updates, before division by the rank", least=0.0)
    lora_dropout: float = option(0.0, "dropout on the input of the LoRA updates", least=0.0)
    target_modules: tuple[str, ...] = option(PROJECTIONS, "modules that get LoRA updates")
    teacher_temperature: float = option(
        1.0, "temperature of the teacher's softmax; above 1 flattens its distribution", least=0.0
    )
    absolute_margin: float | None = option(
        None,
        "exclude a negative from the cross-entropy if its teacher score is above the positive's minus this margin, "
        "since it is probably relevant; None keeps all negatives",
        least=0.0,
    )
    learning_rate: float = option(2e-5, "peak learning rate", least=0.0)
    num_train_epochs: float = option(1.0, "passes over the training queries", least=0.0)
    max_steps: int = option(-1, "number of steps; overrides num_train_epochs if positive", least=-1)
    per_device_train_batch_size: int = option(4, "queries in a batch, on each device", least=1)
    gradient_accumulation_steps: int = option(4, "batches in a step", least=1)
    warmup_steps: float = option(
        0.1, "steps in which the learning rate rises to its peak; below 1, their share of all steps", least=0.0
    )
    bf16: bool | None = option(None, "train in bfloat16; None lets fit follow the reranker's dtype")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass, which saves memory")
    logging_steps: float = option(10, "steps between two log lines")
    eval_steps: float | None = option(None, "steps between two measurements of nDCG@10; None for save_steps")
    save_steps: float = option(200, "steps between two checkpoints")
    seed: int = option(42, "seed of initialisation, order, groups and widths", least=0)
    output_dir: str | None = option(
        None, "folder of the run; None lets fit keep the adapter alone, in a new folder of PyTerrier's home"
    )
    patience: int | None = option(
        None,
        "stop after this number of measurements of nDCG@10 without an improvement; None trains to the end",
        least=1,
    )
    min_label: int = option(1, "lowest relevance label of a positive, for fit", shell=False)
    text: pt.Transformer | None = option(
        None,
        "transformer that adds texts to a frame with docno, for fit; it supplies the positives of a query with no "
        "relevant result",
        shell=False,
    )
    arguments: Mapping[str, Any] = option(
        {}, "further transformers.TrainingArguments by name, for fit; none that is a setting of the recipe", shell=False
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r}; allowed: a number from 0 to less than 1.")
        if not self.teacher_temperature > 0:
            raise ValueError(f"teacher_temperature={self.teacher_temperature!r}; allowed: a number above 0.")
        make_tuple(self, "target_modules", str)
        if self.arguments:
            self._check_arguments()

    def _check_arguments(self) -> None:
        from transformers import TrainingArguments  # takes seconds to import

        allowed = [f.name for f in fields(TrainingArguments) if f.init]
        own = {f.name for f in fields(self)}
        for name in self.arguments:
            if name in own:
                raise ValueError(
                    f"arguments={dict(self.arguments)!r}: {name!r} is a setting of the recipe itself; set it there."
                )
            if name not in allowed:
                close = difflib.get_close_matches(str(name), allowed, 3, 0.0)
                raise ValueError(
                    f"arguments={dict(self.arguments)!r}: transformers' TrainingArguments have no {name!r}; "
                    f"closest: {', '.join(close)}."
                )

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != default_of(f)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def token_ratio(self) -> int | None:
        """The ratio that a token adapter is trained for; None for any other adapter."""
        return None

    def widths(self, seed: int) -> Widths:
        """Return the widths to train at, drawn with this seed; by default the full width alone."""
        return Widths(seed=seed)

    @property
    @abstractmethod
    def loss(self) -> Loss:
        """The loss over all heads."""

    @abstractmethod
    def open(self, model: str, adapters: Sequence[str]) -> Checkpoint:
        """Open the checkpoint to train."""

    @abstractmethod
    def heads(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
        """Return the initial weights of the heads, ``[heads, width]``."""

    @abstractmethod
    def inputs(self, prompt: str | None) -> Inputs:
        """Return the function that encodes pairs.

        Args:
            prompt: the prompt in the training data; None for the recipe's.
        """

    def following(self, checkpoint: Checkpoint) -> Recipe:
        """Return the recipe, with the checkpoint's values for settings that the recipe leaves open."""
        return self

    @abstractmethod
    def described_inputs(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the fields of the model's description that determine its inputs.

        Args:
            checkpoint: the model that training started from.
        """

    def card(
        self,
        checkpoint: Checkpoint,
        steps: int,
        stated: Stated,
        measured: str | None = None,
        repo_id: str | None = None,
    ) -> str:
        """Write the model card of an adapter, without access tokens of the hub and paths of this machine.

        Args:
            checkpoint: the model that training started from.
            steps: the number of steps that the adapter was trained for.
            stated: the user's facts about it.
            measured: the measure and its value on the validation data; None if there are none.
            repo_id: the repository that it is for; None if that is not known.
        """
        from ..checkpoints.cards import adapter_card

        # The configurations of several devices may be paths of this machine.
        left_out = ("_token", "_config", "deepspeed")
        settings = {name: value for name, value in self.arguments.items() if not name.endswith(left_out)}
        recipe = replace(self, output_dir=None, text=None, arguments=settings)
        name = KINDS[checkpoint.kind]
        return adapter_card(checkpoint.kind, name, checkpoint.base, steps, repr(recipe), stated, measured, repo_id)

    @abstractmethod
    def body(self, text: str, title: str | None) -> str:
        """Format a passage as the model reads it."""
