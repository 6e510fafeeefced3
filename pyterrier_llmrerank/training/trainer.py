"""The training loop: transformers' own, over groups, with the losses of both systems."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..checkpoints import Checkpoint
from .data import Batch, Groups
from .model import RankingModel
from .objectives import CascadeLoss

#: Projections that LoRA updates in a Matroyshka re-ranker; RankLLaMA leaves ``k_proj`` out.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Widths:
    """The widths at which a model is trained: each step draws one.

    Args:
        layers: before each of these, the step pools or not, with equal odds.
        ratios: the step's ratio is one of these.
        seed: of the draw.
    """

    layers: tuple[int, ...] = ()
    ratios: tuple[int, ...] = (1,)
    seed: int = 42

    def draw(self, step: int, part: int) -> tuple[tuple[int, ...], int]:
        """Layers and ratio of one batch, as a function of its place in the run: the same in every process.

        Args:
            step: optimizer steps done before.
            part: which of the batches that are accumulated into this step.
        """
        generator = random.Random(f"{self.seed}/{step}/{part}")
        return tuple(layer for layer in self.layers if generator.random() < 0.5), generator.choice(self.ratios)


def with_lora(
    checkpoint: Checkpoint,
    heads: Tensor,
    *,
    rank: int = 32,
    alpha: float = 64,
    dropout: float = 0.0,
    modules: Sequence[str] = PROJECTIONS,
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """A model of which LoRA adapters and heads are to learn, and nothing else.

    Layer-wise heads learn through LoRA too, as in the original; a single ``score`` head learns whole.

    Args:
        checkpoint: what to start from; its adapters are merged in first.
        heads: what the heads start as, ``[heads, width]``.
        rank: of the updates.
        alpha: their scale is this over the rank.
        dropout: on their input.
        modules: names of the projections to update.
        dtype: of the weights that do not learn; those that do are fp32.
    """
    layer_wise = checkpoint.head_module(0) is not None
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=dropout,
        target_modules=[*modules, *(["linear_head"] if layer_wise else [])],
        modules_to_save=None if layer_wise else ["score"],
        base_model_name_or_path=str(checkpoint.folder),
    )
    model = get_peft_model(cast(Any, RankingModel(checkpoint, heads, dtype)), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return cast(PeftModel, model)


class _NewEpoch(TrainerCallback):
    """Tells the data which epoch begins."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.groups.epoch = int(state.epoch or 0)


class GroupTrainer(Trainer):
    """Transformers' Trainer over groups of passages.

    Everything that is not the loss is the Trainer's own: precision, accumulation, schedules, checkpoints,
    resuming, several devices.

    Args:
        model: from :func:`with_lora`, or a :class:`~pyterrier_llmrerank.training.model.RankingModel`.
        args: the Trainer's.
        groups: what to train on.
        collate: groups to a batch.
        loss: over all layers; with one layer, its ``normal`` is RankLLaMA's.
        widths: drawn at each step.

    Raises:
        FloatingPointError: in training, where the loss is not finite; checkpoints written before are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        groups: Groups,
        collate: Callable[[Sequence[Any]], Batch],
        loss: CascadeLoss,
        widths: Widths | None = None,
    ) -> None:
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=groups,
            data_collator=lambda drawn: {"batch": collate(drawn)},
            callbacks=[_NewEpoch(groups)],
        )
        self.loss = loss
        self.widths = widths or Widths()
        self._place = (0, -1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch, at the width drawn for it."""
        batch: Batch = inputs["batch"]
        step = self.state.global_step
        self._place = (step, self._place[1] + 1 if self._place[0] == step else 0)
        layers, ratio = self.widths.draw(*self._place)
        ids = batch.input_ids.to(self.args.device)
        groups = (-1, len(ids) // batch.size, batch.size)
        full = None
        if self.loss.needs_full_pass:
            with torch.no_grad():
                full = model(ids, batch.spans).view(groups)
        scores = model(ids, batch.spans, layers, ratio).view(groups)
        teacher = None if batch.teacher is None else batch.teacher.to(scores.device)
        loss = self.loss(scores, full, teacher)
        if not torch.isfinite(loss):
            rate = self._get_learning_rate()
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step} (learning rate {rate:g}, compress_layers {list(layers)}, "
                f"compress_ratio {ratio}); the last good checkpoint is in {self.args.output_dir}."
            )
        return (loss, {"scores": scores}) if return_outputs else loss


def save(model: PeftModel, folder: Path, task_type: str) -> None:
    """Write the adapter as the original programs do, so that they, and the re-rankers here, open it.

    Args:
        model: a trained one.
        folder: where to.
        task_type: ``CAUSAL_LM`` for Matroyshka, ``SEQ_CLS`` for RankLLaMA.
    """
    config = model.peft_config["default"]
    config.task_type = cast(Any, task_type)
    try:
        model.save_pretrained(str(folder))
    finally:
        config.task_type = None
