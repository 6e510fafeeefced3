"""Recipes of the three trainings; their defaults are the settings of the original programs."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pyterrier as pt

from ..checkpoints.description import KINDS, Description
from ..checkpoints.identity import fingerprint
from ..checkpoints.input_format import NAMED, InputFormat, check_name
from ..engine.inputs import PROMPT, MatroyshkaInputs, inputs_of
from ..values import RATIOS
from .objectives import METHODS, CascadeLoss, DistilledLoss, Loss
from .options import Declared, check_numbers, default_of, document_options, make_tuple, option
from .widths import Widths

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..checkpoints.cards import Stated
    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
    from ..checkpoints.rankllama_checkpoint import RankLLaMACheckpoint
    from .batches import Inputs

#: The setting with a digest of each model and adapter that is trained on.
FINGERPRINTS = "fingerprints of what is trained on"

#: The projections of a decoder layer.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@document_options
@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(Declared, ABC):
    """Hold the settings of a training.

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
    num_train_epochs: float = option(1.0, "passes over the training queries", least=0.0, resumable=True)
    max_steps: int = option(-1, "number of steps; overrides num_train_epochs if positive", least=-1, resumable=True)
    per_device_train_batch_size: int = option(4, "queries in a batch, on each device", least=1, resumable=True)
    gradient_accumulation_steps: int = option(4, "batches in a step", least=1, resumable=True)
    warmup_steps: float = option(
        0.1, "steps in which the learning rate rises to its peak; below 1, their share of all steps", least=0.0
    )
    bf16: bool | None = option(None, "train in bfloat16; None lets fit follow the reranker's dtype", resumable=True)
    gradient_checkpointing: bool = option(
        True, "recompute activations in the backward pass, which saves memory", resumable=True
    )
    logging_steps: float = option(10, "steps between two log lines", resumable=True)
    eval_steps: float | None = option(
        None, "steps between two measurements of nDCG@10; None for save_steps", resumable=True
    )
    save_steps: float = option(200, "steps between two checkpoints", resumable=True)
    seed: int = option(42, "seed of initialisation, order, groups and widths", least=0)
    output_dir: str | None = option(
        None, "folder of the run; None lets fit create one in PyTerrier's home folder", resumable=True
    )
    patience: int | None = option(
        None,
        "stop after this number of measurements of nDCG@10 without an improvement; None trains to the end",
        least=1,
        resumable=True,
    )
    min_label: int = option(1, "lowest relevance label of a positive, for fit", shell=False, resumable=True)
    text: pt.Transformer | None = option(
        None,
        "transformer that adds texts to a frame with docno, for fit; it supplies the positives of a query with no "
        "relevant result",
        shell=False,
        resumable=True,
    )
    arguments: Mapping[str, Any] = option(
        {}, "further transformers.TrainingArguments by name, for fit", shell=False, resumable=True
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
        for name in self.arguments:
            if name not in allowed:
                close = difflib.get_close_matches(str(name), allowed, 3, 0.0)
                raise ValueError(
                    f"arguments={dict(self.arguments)!r}: transformers' TrainingArguments have no {name!r}; "
                    f"closest: {', '.join(close)}."
                )

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != default_of(f)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def fixed_settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the settings, in JSON types, that must not change when a run on this checkpoint is resumed."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["resumable"]}
        lists = {name: list(value) for name, value in settings.items() if isinstance(value, tuple)}
        paths = [checkpoint.base, *(str(adapter.name) for adapter in checkpoint.adapters)]
        adapters = [*checkpoint.adapters, *([checkpoint.adapter] if checkpoint.adapter else [])]
        folders = dict.fromkeys([checkpoint.folder, *(adapter.folder for adapter in adapters)])
        trained_on = {  # folders may have moved, so their contents count
            "trained_on": [PurePath(path).name for path in paths],
            FINGERPRINTS: [fingerprint(folder) for folder in folders],
        }
        return {"recipe": type(self).__name__, **trained_on, **settings, **lists}

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
        """Return the recipe with the values that it leaves to the checkpoint."""
        return self

    @abstractmethod
    def described_inputs(self) -> dict[str, Any]:
        """Return the fields of the model's description that say how inputs are made."""

    @abstractmethod
    def opening_call(self, checkpoint: Checkpoint, folder: str) -> str:
        """Write the Python call that opens the adapter in a folder, trained on this checkpoint."""

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
            checkpoint: the start of the training.
            steps: the steps of the adapter.
            stated: what the user says of it.
            measured: the measure and its value on the validation data; None if there are none.
            repo_id: the repository that it is for; None if that is not known.
        """
        from ..checkpoints.cards import trained

        settings = {name: value for name, value in self.arguments.items() if not name.endswith("_token")}
        recipe = replace(self, output_dir=None, text=None, arguments=settings)
        name = KINDS[checkpoint.kind]
        return trained(checkpoint.kind, name, checkpoint.base, steps, repr(recipe), stated, measured, repo_id)

    @abstractmethod
    def body(self, text: str, title: str | None) -> str:
        """Format a passage as the model reads it."""


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
        "append the end token, in other formats than tevatron-2023; None as for input_format, or False",
        "append_eos_token",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_format is not None:
            check_name("input_format", self.input_format)
            self.form  # noqa: B018 # raises if options contradict each other

    @property
    def form(self) -> InputFormat:
        """The format of the input, as far as the recipe says."""
        return InputFormat.chosen(self._given())

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in InputFormat().settings()}

    def following(self, checkpoint: Checkpoint) -> RankLLaMATraining:
        """Return the recipe with the input format of the checkpoint, unless it has its own."""
        own = cast("RankLLaMACheckpoint", checkpoint).input_format
        return self if own is None else replace(self, **InputFormat.chosen(self._given(), own).settings())

    def described_inputs(self) -> dict[str, Any]:
        """Return the input format and the lengths."""
        lengths = {name: getattr(self, name) for name in ("query_max_length", "passage_max_length")}
        return {"input_format": self.form, **lengths}

    @property
    def loss(self) -> DistilledLoss:
        """The cross-entropy, and the divergence from the teacher if it has a weight."""
        return DistilledLoss(self.teacher_weight, self.teacher_temperature, self.absolute_margin)

    def open(self, model: str, adapters: Sequence[str] = (), base_model: str | None = None) -> Checkpoint:
        """Open a causal language model, or a RankLLaMA adapter to train further.

        Args:
            model: a folder, ``.gguf`` file or hub id.
            adapters: none.
            base_model: the base of the adapter; None for the base that it names.

        Raises:
            ValueError: there are adapters.
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

    def opening_call(self, checkpoint: Checkpoint, folder: str) -> str:
        """Write the Python call that opens the adapter, which names its base."""
        return f"RankLLaMAReranker({folder!r})"

    def inputs(self, prompt: str | None) -> Inputs:
        """Return the encoding of inference; no prompt.

        In ``tevatron-2023``, passages are three tokens shorter, as in the original.
        """
        return inputs_of(self.form, self.query_max_length, self.passage_max_length, margin=3)

    def body(self, text: str, title: str | None) -> str:
        """Format a passage by the input format, for example as ``document: {title} {text}``."""
        return self.form.body(text, title)


@document_options
@dataclass(frozen=True, kw_only=True, repr=False)
class MatroyshkaTraining(Recipe):
    """Hold the settings that both steps of training a Matroyshka reranker share (Liu et al., 2025).

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
        "deeper layers into shallower ones, and those with _teacher learn from a teacher's scores too",
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
            The checkpoint. Its heads and prompt are those that the description of the model, or else of the last
            adapter, names; where it names none, the recipe's.

        Raises:
            ValueError: the model has too few layers for ``start_layer`` or ``compress_layers``, or it was trained with
                another ``start_layer``, ``layer_sep`` or ``prompt`` than the recipe has. A default of the recipe
                contradicts nothing.
        """
        from ..checkpoints.adapters import Adapter
        from ..checkpoints.description import read_description
        from ..checkpoints.locate import adapter_folder, folder_of
        from ..checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint, is_layer_wise

        continued, folder, argument = None, folder_of(model, "model"), f"model={model!r}"
        own = read_description(model, folder, "matroyshka", argument)
        if (folder / "adapter_config.json").is_file():
            continued = Adapter(folder, argument)
            continued.base_folder()  # if it is missing, the error names the adapter
            earlier = [name for name in own.adapters if name != model] if own is not None else []
            model, adapters = continued.base, [*(adapters or earlier), str(folder)]
        for name in reversed(adapters):
            if own is None:
                argument = f"raw_peft={name!r}"
                own = Description.read(adapter_folder(name, model), "matroyshka", argument)
        agreed = self._agreed(own, argument)
        if is_layer_wise(model):  # it has its own heads, which a default does not contradict
            agreed |= {name: None for name in ("start_layer", "layer_sep") if agreed[name] == self._default(name)}
        checkpoint = MatroyshkaCheckpoint(model, adapters, agreed["start_layer"], agreed["layer_sep"])
        checkpoint.prompt = agreed["prompt"]
        if continued is not None:  # checked with the others, but trained rather than merged
            checkpoint.adapters, checkpoint.adapter = checkpoint.adapters[:-1], checkpoint.adapters[-1]
        if max(self.compress_ratios) > 1 and not any(0 < layer < checkpoint.layers for layer in self.compress_layers):
            raise ValueError(
                f"compress_layers={list(self.compress_layers)}: nothing would be compressed; allowed: layers "
                f"from 1 to {checkpoint.layers - 1}, or compress_ratios=[1]."
            )
        return checkpoint

    def _agreed(self, own: Description | None, argument: str) -> dict[str, Any]:
        """Return ``start_layer``, ``layer_sep`` and ``prompt`` of a description, or where it has none, the recipe's.

        Raises:
            ValueError: the recipe has another value, which is not its default.
        """
        agreed = {}
        for name, usual in (("start_layer", None), ("layer_sep", None), ("prompt", PROMPT)):
            given = getattr(self, name)
            trained = given if own is None else getattr(own, name) or usual or given
            if given not in (trained, self._default(name)):
                raise ValueError(f"{name}={given!r}, but {argument} was trained with {trained!r}; the two must agree.")
            agreed[name] = trained
        return agreed

    def _default(self, name: str) -> Any:
        return default_of(type(self).__dataclass_fields__[name])

    def following(self, checkpoint: Checkpoint) -> MatroyshkaTraining:
        """Return the recipe with the heads and the prompt of the checkpoint."""
        own = cast("MatroyshkaCheckpoint", checkpoint)
        return replace(self, start_layer=own.start_layer, layer_sep=own.layer_sep, prompt=own.prompt or self.prompt)

    def heads(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
        """Return the checkpoint's heads."""
        return checkpoint.heads(tokenizer)

    def described_inputs(self) -> dict[str, Any]:
        """Return the prompt."""
        return {"prompt": self.prompt}

    def opening_call(self, checkpoint: Checkpoint, folder: str) -> str:
        """Write the Python call, with the merged adapters and the settings that no adapter stores."""
        given: dict[str, Any] = {"adapters": [*(adapter.name for adapter in checkpoint.adapters), folder]}
        if not cast("MatroyshkaCheckpoint", checkpoint).layer_wise:
            given["start_layer"] = self.start_layer
            if self.layer_sep != 1:
                given["layer_sep"] = self.layer_sep
        if self.prompt != PROMPT:
            given["prompt"] = self.prompt
        return f"MatroyshkaReranker({checkpoint.base!r}, {', '.join(f'{k}={v!r}' for k, v in given.items())})"

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

    Without teacher scores, :meth:`fit` warns and uses the method without ``_teacher``; training from files raises an
    error.

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
