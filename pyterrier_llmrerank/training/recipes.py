"""Recipes: what each of the three trainings sets, with the values of the original programs as defaults."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pyterrier as pt

from ..engine.inputs import PROMPT, MatroyshkaInputs, RankLLaMAInputs, document
from .objectives import METHODS, CascadeLoss, DistilledLoss, Loss
from .widths import Widths

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..checkpoints.checkpoint import Checkpoint, MatroyshkaCheckpoint
    from .data import Inputs

#: Projections that LoRA updates.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: Settings that may be others when a run is gone on with.
FREE = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16",
    "gradient_checkpointing", "logging_steps", "eval_steps", "save_steps", "patience", "min_label", "text", "arguments",
)  # fmt: skip

#: What stands beside an adapter.
CARD = """---
library_name: peft
---
# {folder}

An adapter of `{base}`, trained by pyterrier_llmrerank for {steps} steps with

```python
{recipe}
```

It opens with

```python
from pyterrier_llmrerank import {name}

{call}
```
"""


def option(default: Any, help: str, *names: str) -> Any:
    """A field with a default, what it means, and what else the command line calls it."""
    return field(default=default, metadata={"help": help, "aliases": [f"--{name}" for name in names]})


def value_are(values: Sequence[Any], kind: type) -> bool:
    """Whether all values are of this kind; a bool is no integer."""
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(ABC):
    """What all trainings have in common.

    Args:
        group_size: passages that compete for one query, the positive among them.
        query_max_length: tokens kept of a query.
        passage_max_length: tokens kept of a passage.
        lora_rank: rank of the LoRA updates.
        lora_alpha: the updates' scale is this over the rank.
        lora_dropout: dropout on the updates' input.
        target_modules: modules that LoRA updates.
        teacher_temperature: the teacher's scores are divided by it; above 1 they differ less.
        absolute_margin: leave negatives out of the cross-entropy against the positive whose teacher score is above the
            positive's less this margin: probably they are relevant too. None keeps all.
        patience: stop after so many measurements of nDCG@10 without a better one; None to go on to the end.
        min_label: the lowest label that is relevant, for ``fit``.
        text: a transformer that adds texts to a frame with ``docno``, for ``fit``: a query of which nothing
            relevant was retrieved gets its positives from it.
        arguments: any other of :class:`transformers.TrainingArguments`, for ``fit``.
        output_dir: where ``fit`` writes; None for a new folder in PyTerrier's home.
        eval_steps: steps from one measurement of nDCG@10 to the next, for ``fit``; None for ``save_steps``.
        bf16: None, for ``fit``, for what the re-ranker's ``dtype`` says.
        learning_rate, num_train_epochs, max_steps: as in :class:`transformers.TrainingArguments`.
        gradient_checkpointing, logging_steps, save_steps, seed: likewise.
        per_device_train_batch_size, gradient_accumulation_steps: likewise; batches are of queries.
        warmup_steps: likewise; below 1 a share of all.

    Raises:
        ValueError: a value is not what is allowed.
    """

    #: The PEFT task under which the original programs save what is trained.
    task_type: ClassVar[str]

    group_size: int = option(
        16, "passages that compete for one query, the positive among them", "train_group_size", "train_n_passages"
    )
    query_max_length: int = option(32, "tokens kept of a query", "query_max_len", "q_max_len")
    passage_max_length: int = option(192, "tokens kept of a passage", "passage_max_len", "p_max_len")
    lora_rank: int = option(32, "rank of the LoRA updates", "lora_r")
    lora_alpha: float = option(64.0, "the updates' scale is this over the rank")
    lora_dropout: float = option(0.0, "dropout on the updates' input")
    target_modules: tuple[str, ...] = option(PROJECTIONS, "modules that LoRA updates")
    teacher_temperature: float = option(1.0, "the teacher's scores are divided by it; above 1 they differ less")
    absolute_margin: float | None = option(
        None,
        "leave negatives out of the cross-entropy whose teacher score is above the positive's less this margin",
    )
    learning_rate: float = 2e-5
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    warmup_steps: float = 0.1
    bf16: bool | None = None
    gradient_checkpointing: bool = True
    logging_steps: float = 10
    eval_steps: float | None = None
    save_steps: float = 200
    seed: int = 42
    output_dir: str | None = None
    patience: int | None = option(None, "stop after so many measurements of nDCG@10 without a better one")
    min_label: int = 1
    text: pt.Transformer | None = field(default=None, hash=False)
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, least in self._least().items():
            value = getattr(self, name)
            if value is None and name in ("patience", "absolute_margin"):
                continue
            whole = isinstance(least, int)
            kinds = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
                kind = "an integer" if whole else "a number"
                raise ValueError(f"{name}={value!r}; allowed: {kind} of at least {least:g}.")
        if not self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r}; allowed: a number from 0 to less than 1.")
        if not self.teacher_temperature > 0:
            raise ValueError(f"teacher_temperature={self.teacher_temperature!r}; allowed: a number above 0.")
        self._as_tuple("target_modules", str)
        if self.arguments:
            self._check_arguments()

    def _check_arguments(self) -> None:
        from transformers import TrainingArguments  # seconds, which only those wait who give some

        allowed = [f.name for f in fields(TrainingArguments) if f.init]
        for name in self.arguments:
            if name not in allowed:
                close = difflib.get_close_matches(str(name), allowed, 3, 0.0)
                raise ValueError(
                    f"arguments={dict(self.arguments)!r}: transformers' TrainingArguments have no {name!r}; "
                    f"closest: {', '.join(close)}."
                )

    @staticmethod
    def _least() -> dict[str, int | float]:
        """The smallest value of each number: an int where only whole ones are allowed."""
        return {
            "group_size": 2, "query_max_length": 1, "passage_max_length": 8, "lora_rank": 1, "lora_alpha": 0.0,
            "lora_dropout": 0.0, "learning_rate": 0.0, "num_train_epochs": 0.0, "max_steps": -1, "warmup_steps": 0.0,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "patience": 1, "seed": 0,
            "teacher_temperature": 0.0, "absolute_margin": 0.0,
        }  # fmt: skip

    def _as_tuple(self, name: str, kind: type) -> None:
        value = getattr(self, name)
        if not isinstance(value, list | tuple) or not value_are(value, kind):
            raise ValueError(f"{name}={value!r}; allowed: a list of {kind.__name__}.")
        object.__setattr__(self, name, tuple(value))

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != _default(f)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def begun_with(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What a run on a checkpoint cannot change when it is gone on with, as JSON holds it."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE}
        lists = {name: list(value) for name, value in settings.items() if isinstance(value, tuple)}
        names = [checkpoint.base, *(str(adapter.name) for adapter in checkpoint.adapters)]
        bases = {"trained_on": [PurePath(name).name for name in names]}  # wherever they lie
        return {"recipe": type(self).__name__, **bases, **settings, **lists}

    @property
    def token_ratio(self) -> int | None:
        """The ratio that a token compensation is trained for; None for any other adapter."""
        return None

    def widths(self, seed: int) -> Widths:
        """The widths trained at, drawn with this seed; full width alone by default."""
        return Widths(seed=seed)

    @property
    @abstractmethod
    def loss(self) -> Loss:
        """The loss over all heads."""

    @abstractmethod
    def open(self, model: str, adapters: Sequence[str]) -> Checkpoint:
        """The checkpoint that is trained on."""

    @abstractmethod
    def heads(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
        """What the heads start as, ``[heads, width]``."""

    @abstractmethod
    def inputs(self, prompt: str | None) -> Inputs:
        """What makes ids of pairs, given the prompt that the data have, or None for the usual one."""

    @abstractmethod
    def opening_call(self, checkpoint: Checkpoint, folder: str) -> str:
        """The Python call that opens what was trained on a checkpoint and lies in a folder."""

    def card(self, checkpoint: Checkpoint, folder: str, steps: int) -> str:
        """What stands beside an adapter, for its reader and the hub."""
        settings = {name: value for name, value in self.arguments.items() if not name.endswith("_token")}
        recipe = replace(self, output_dir=None, text=None, arguments=settings)
        call = self.opening_call(checkpoint, folder)
        return CARD.format(
            folder=folder, base=checkpoint.base, steps=steps, recipe=recipe, call=call, name=call.partition("(")[0]
        )

    @staticmethod
    @abstractmethod
    def body(text: str, title: str | None) -> str:
        """A passage of the data as the model reads it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RankLLaMATraining(Recipe):
    """Fine-tuning RankLLaMA (Ma et al., 2023): LoRA and a score head, cross-entropy over groups.

    Args:
        teacher_weight: weight of the KL divergence from the softmax of a teacher's scores; 0, the original, learns from
            the labels alone.

    All else is as for :class:`~pyterrier_llmrerank.training.recipes.Recipe`.

    Raises:
        ValueError: a value is not what is allowed.

    >>> from pyterrier_llmrerank.training import RankLLaMATraining
    >>> RankLLaMATraining(group_size=8).learning_rate
    0.0001
    """

    task_type: ClassVar[str] = "SEQ_CLS"

    passage_max_length: int = option(196, "tokens kept of a passage", "passage_max_len", "p_max_len")
    lora_dropout: float = option(0.1, "dropout on the updates' input")
    target_modules: tuple[str, ...] = option(
        tuple(name for name in PROJECTIONS if name != "k_proj"), "modules that LoRA updates"
    )
    teacher_weight: float = option(0.0, "weight of the KL divergence from a teacher's scores; 0 for none")
    learning_rate: float = 1e-4
    gradient_accumulation_steps: int = 8

    @staticmethod
    def _least() -> dict[str, int | float]:
        return {**Recipe._least(), "teacher_weight": 0.0}

    @property
    def loss(self) -> DistilledLoss:
        """Cross-entropy over the group, and a teacher's scores where they have a weight."""
        return DistilledLoss(self.teacher_weight, self.teacher_temperature, self.absolute_margin)

    def open(self, model: str, adapters: Sequence[str] = (), base_model: str | None = None) -> Checkpoint:
        """A causal language model, or a RankLLaMA adapter to train on."""
        from ..checkpoints.checkpoint import RankLLaMACheckpoint

        if adapters:
            raise ValueError(f"raw_peft={list(adapters)}: RankLLaMA trains on one model or adapter.")
        return RankLLaMACheckpoint(model, base_model)

    def heads(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
        """The checkpoint's own score head, or small random numbers where it has none."""
        import torch

        if checkpoint.has_heads:
            return checkpoint.heads(tokenizer)
        generator = torch.Generator().manual_seed(seed)
        spread = getattr(checkpoint.config, "initializer_range", 0.02)
        return torch.randn(1, checkpoint.config.hidden_size, generator=generator) * spread

    def opening_call(self, checkpoint: Checkpoint, folder: str) -> str:
        """The adapter names its base."""
        return f"RankLLaMAReranker({folder!r})"

    def inputs(self, prompt: str | None) -> Inputs:
        """Ids as in inference, with documents three tokens shorter, as released; there is no prompt."""
        return RankLLaMAInputs(self.query_max_length, self.passage_max_length, margin=3)

    @staticmethod
    def body(text: str, title: str | None) -> str:
        """``document: {title} {text}``."""
        return document(text, title)


@dataclass(frozen=True, kw_only=True, repr=False)
class MatroyshkaTraining(Recipe):
    """What both steps of training a Matroyshka Re-Ranker (Liu et al., 2025) have in common.

    Args:
        start_layer: the shallowest layer with a head.
        layer_sep: layers from one head to the next.
        compress_layers: before each of these layers a step pools passages or not, with equal odds.
        compress_ratios: each step pools so many passage states into one, a ratio drawn from these.
        train_method: ``normal`` or ``distill``, cross-entropy alone; ``distill_final_layer``, ``distill_last_layer`` or
            ``distill_fix_layer``, by which of the deeper layers teaches; each of these three with ``_teacher`` too,
            to learn from another model's scores as well.
        prompt: the question that ends every input, where the data has none of its own.

    All else is as for :class:`~pyterrier_llmrerank.training.recipes.Recipe`.

    Raises:
        ValueError: a value is not what is allowed.
    """

    task_type: ClassVar[str] = "CAUSAL_LM"

    target_modules: tuple[str, ...] = option((*PROJECTIONS, "linear_head"), "modules that LoRA updates")
    start_layer: int = option(4, "the shallowest layer with a head")
    layer_sep: int = option(1, "layers from one head to the next")
    compress_layers: tuple[int, ...] = option(
        (4, 8, 12, 16, 20, 24, 28), "before each of these layers a step pools passages or not, with equal odds"
    )
    compress_ratios: tuple[int, ...] = option((1, 2, 4, 8), "each step pools so many passage states into one")
    train_method: str = option("normal", f"one of {', '.join(METHODS)}")
    prompt: str = option(PROMPT, "the question that ends every input, where the data has none of its own")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._as_tuple("compress_layers", int)
        self._as_tuple("compress_ratios", int)
        for name, value in {"start_layer": self.start_layer, "layer_sep": self.layer_sep}.items():
            if not value_are([value], int) or value < 1:
                raise ValueError(f"{name}={value!r}; allowed: an integer of at least 1.")
        if not self.compress_ratios or any(ratio not in (1, 2, 4, 8, 16, 32, 64) for ratio in self.compress_ratios):
            raise ValueError(f"compress_ratios={list(self.compress_ratios)}; allowed: powers of two from 1 to 64.")
        if any(layer < 0 for layer in self.compress_layers):
            raise ValueError(f"compress_layers={list(self.compress_layers)}; allowed: layer indices, from 0.")
        self.loss  # noqa: B018 # raises where the method does not go with the rest

    def widths(self, seed: int) -> Widths:
        """The widths that the recipe names."""
        return Widths(self.compress_layers, self.compress_ratios, seed)

    @property
    def loss(self) -> CascadeLoss:
        """By ``train_method``."""
        return CascadeLoss(self.train_method, self.teacher_temperature, self.absolute_margin)

    def open(self, model: str, adapters: Sequence[str] = ()) -> Checkpoint:
        """A causal language model or layer-wise checkpoint with adapters merged in, or one more to train on."""
        from ..checkpoints.adapters import Adapter
        from ..checkpoints.checkpoint import MatroyshkaCheckpoint, is_layer_wise
        from ..checkpoints.description import described
        from ..checkpoints.locate import folder_of

        started, folder = None, folder_of(model, "model")
        if (folder / "adapter_config.json").is_file():
            started = Adapter(folder, f"model={model!r}")
            started.base_folder()  # raises, where it is not there, in the adapter's name
            description = described(model, folder, "matroyshka", f"model={model!r}")
            earlier = [name for name in description.adapters if name != model] if description is not None else []
            model, adapters = started.base, [*(adapters or earlier), str(folder)]
        own = is_layer_wise(model)  # then the checkpoint says where its heads are
        at = (None, None) if own else (self.start_layer, self.layer_sep)
        checkpoint = MatroyshkaCheckpoint(model, adapters, *at)
        if started is not None:  # checked with the others, but not to be merged
            checkpoint.adapters, checkpoint.adapter = checkpoint.adapters[:-1], checkpoint.adapters[-1]
        if max(self.compress_ratios) > 1 and not any(0 < layer < checkpoint.layers for layer in self.compress_layers):
            raise ValueError(
                f"compress_layers={list(self.compress_layers)}: nothing would be compressed; allowed: layer indices "
                f"from 1 to {checkpoint.layers - 1}, or compress_ratios=[1]."
            )
        return checkpoint

    def heads(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
        """The checkpoint's."""
        return checkpoint.heads(tokenizer)

    def opening_call(self, checkpoint: Checkpoint, folder: str) -> str:
        """With what the adapter was trained over, and what neither it nor the base says."""
        given: dict[str, Any] = {"adapters": [*(adapter.name for adapter in checkpoint.adapters), folder]}
        if not cast("MatroyshkaCheckpoint", checkpoint).layer_wise:
            given["start_layer"] = self.start_layer
            if self.layer_sep != 1:
                given["layer_sep"] = self.layer_sep
        if self.prompt != PROMPT:
            given["prompt"] = self.prompt
        return f"MatroyshkaReranker({checkpoint.base!r}, {', '.join(f'{k}={v!r}' for k, v in given.items())})"

    def inputs(self, prompt: str | None) -> Inputs:
        """Ids as in inference, the whole input held to query and passage length together, as released."""
        total = self.query_max_length + self.passage_max_length
        return MatroyshkaInputs(self.prompt if prompt is None else prompt, self.query_max_length, total=total)

    @staticmethod
    def body(text: str, title: str | None) -> str:
        """``{title} {text}``, or the text alone."""
        return f"{title} {text}" if title else text


@dataclass(frozen=True, kw_only=True, repr=False)
class DistillTraining(MatroyshkaTraining):
    """Cascaded self-distillation: every layer from ``start_layer`` on learns to rank, from the deeper ones too.

    Where the data has no teacher's scores, choose a ``train_method`` without ``_teacher``. Arguments are those of
    :class:`~pyterrier_llmrerank.training.recipes.MatroyshkaTraining`.

    >>> from pyterrier_llmrerank.training import DistillTraining
    >>> DistillTraining().train_method
    'distill_fix_layer_teacher'
    """

    train_method: str = option("distill_fix_layer_teacher", f"one of {', '.join(METHODS)}")
    learning_rate: float = 2e-4


@dataclass(frozen=True, kw_only=True, repr=False)
class CompensateTraining(MatroyshkaTraining):
    """Factorized compensation on top of a distilled model: for its depths, or for one width.

    Args:
        finetune_type: ``layer`` for all depths at full width, ``token`` for one ratio.
        compress_ratios: the one ratio to compensate for; 1 for ``layer``.

    All else is as for :class:`~pyterrier_llmrerank.training.recipes.MatroyshkaTraining`.

    Raises:
        ValueError: a value is not what is allowed.

    >>> from pyterrier_llmrerank.training import CompensateTraining
    >>> CompensateTraining(finetune_type="token", compress_ratios=(2,)).widths(0).ratios
    (2,)
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
        """The ratio that a token compensation is trained for; None for layer compensation."""
        return self.compress_ratios[0] if self.finetune_type == "token" else None
