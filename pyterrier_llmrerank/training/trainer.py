"""The training loop: transformers' own, over groups, with the losses of both systems."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..batching import Budget, run_in_batches
from ..checkpoints import SCORE, Checkpoint
from ..files import without_revision
from ..packing import PackedPairs
from .data import Batch, Collator, Group, Groups
from .lora import LowRankLinear
from .model import RankingModel
from .objectives import Loss
from .recipes import Recipe
from .validation import MEASURE, Validation
from .widths import Widths

logger = logging.getLogger(__name__)

#: What is taken over from the configuration of an adapter that goes on learning; the rest of it could change the
#: base's weights, or what is computed, where inference does not.
CONTINUED = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern",
)  # fmt: skip


def with_lora(checkpoint: Checkpoint, heads: Tensor, recipe: Recipe, dtype: torch.dtype) -> PeftModel:
    """A model of which LoRA adapters and heads are to learn, and nothing else.

    Layer-wise heads learn through LoRA too, as in the original; a single ``score`` head learns whole. Where the
    checkpoint was opened from an adapter, that goes on learning, in its own rank and on its own modules.

    Args:
        checkpoint: what to start from; a Matroyshka's adapters are merged in first.
        heads: what the heads start as, ``[heads, width]``.
        recipe: rank, scale, dropout and modules of the updates.
        dtype: of the weights that do not learn; those that do are fp32.

    Raises:
        ValueError: the model has no module of a name that the recipe targets, or the adapter holds more than learns.
    """
    started = checkpoint.adapter
    own_heads = checkpoint.head_module(0) is None
    if started is None:
        config = LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=cast(int, recipe.lora_alpha),
            lora_dropout=recipe.lora_dropout,
            target_modules=list(recipe.target_modules),
        )
    else:
        if others := sorted(started.whole.keys() - {SCORE}):
            raise ValueError(
                f"{started.argument}: holds the whole tensor {others[0]!r}, which would not go on learning; "
                "allowed: LoRA and a score head. save(folder, merged=True) gives a model to train on."
            )
        checkpoint.adapters = [adapter for adapter in checkpoint.adapters if adapter is not started]
        config = LoraConfig(**{key: started.config[key] for key in CONTINUED if started.config.get(key) is not None})
        logger.info("going on with %s: its rank, scale and modules, not the recipe's", started.folder)
    _, config.revision = without_revision(checkpoint.base)
    config.modules_to_save = ["score"] if own_heads else None
    # No task type: PEFT would wrap the model for inputs that it does not have.
    config._register_custom_module({nn.Linear: LowRankLinear})
    ranking = RankingModel(checkpoint, heads, dtype)
    modules = {module.rpartition(".")[2] for module, _ in ranking.named_modules()}
    if unknown := [target for target in recipe.target_modules if target not in modules]:
        raise ValueError(f"target_modules: the model has no {unknown[0]!r}; allowed: the ends of its modules' names.")
    model = cast(PeftModel, get_peft_model(cast(Any, ranking), config))
    # Embeddings are the base's; PEFT would ask the hub whether they are.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
    if started is not None:
        set_peft_model_state_dict(model, load_peft_weights(str(started.folder), device="cpu"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def train(
    recipe: Recipe,
    checkpoint: Checkpoint,
    groups: Groups,
    arguments: TrainingArguments,
    validation: Validation | None = None,
) -> Path:
    """Train by a recipe, and write the adapter with its tokenizer into the output folder.

    Args:
        recipe: what is trained, and on which groups.
        checkpoint: what to start from.
        groups: what to train on.
        arguments: the Trainer's; ``resume_from_checkpoint`` goes on from a folder, or from the last checkpoint.
        validation: what nDCG@10 is measured on; with ``load_best_model_at_end`` the best adapter is kept.

    Returns:
        The output folder.

    Raises:
        FloatingPointError: as :class:`GroupTrainer`.
    """
    set_seed(arguments.seed)
    arguments.dataloader_pin_memory &= torch.accelerator.is_available()
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several are for torchrun: DataParallel cannot share our batches out
    tokenizer = checkpoint.tokenizer()
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    heads = recipe.heads(checkpoint, tokenizer, arguments.seed)
    with _whole(arguments):
        model = with_lora(checkpoint, heads, recipe, dtype)
    trainer = GroupTrainer(
        model,
        arguments,
        groups,
        Collator(tokenizer, recipe.inputs),
        recipe.loss,
        recipe.widths(arguments.seed),
        recipe.task_type,
        validation,
        partial(recipe.card, checkpoint),
    )
    if recipe.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.patience))
    resume: str | bool | None = arguments.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume if resume not in ("True", "true") else True)
    trainer.save_state()
    trainer.save_model()  # and push, where that is asked for
    return Path(cast(str, arguments.output_dir))


@contextmanager
def _whole(arguments: TrainingArguments) -> Iterator[None]:
    """Build a model in one piece where DeepSpeed is to shard it: transformers would shard it before it has weights."""
    config = getattr(arguments, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)  # type: ignore[no-untyped-call]


class _NewEpoch(TrainerCallback):
    """Tells the data which epoch begins."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.groups.epoch = int(state.epoch or 0)


@dataclass(frozen=True)
class _Collate:
    """A batch as the keyword that the Trainer hands on."""

    collate: Collator

    def __call__(self, drawn: Sequence[Group]) -> dict[str, Batch]:
        return {"batch": self.collate(drawn)}


class _Progress(ProgressCallback):
    """The Trainer's progress bar, with the last loss and nDCG@10 in it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self._shown: dict[str, str] = getattr(self, "_shown", {}) | {
                name.removeprefix("eval_"): f"{value:.4f}"
                for name, value in (logs or {}).items()
                if name in ("loss", f"eval_{MEASURE}")
            }
            self.training_bar.set_postfix(self._shown)


class _Log(TrainerCallback):
    """Log lines where there is no progress bar; the Trainer would print."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero:
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, logs)


class GroupTrainer(Trainer):
    """Transformers' Trainer over groups of passages.

    Everything that is not the loss is the Trainer's own: precision, accumulation, schedules, checkpoints,
    resuming, several devices.

    Args:
        model: from :func:`with_lora`.
        args: the Trainer's.
        groups: what to train on.
        collate: groups to a batch.
        loss: the recipe's.
        widths: drawn at each step.
        task_type: the PEFT task that adapters are saved under: ``CAUSAL_LM`` or ``SEQ_CLS``.
        validation: measured where the Trainer evaluates, with the scores of the deepest head.
        card: from a folder's name and the steps done to what README.md says there; None for PEFT's.

    Raises:
        FloatingPointError: in training, where the loss is not finite, or weights to be saved are not;
            checkpoints written before are kept.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        groups: Groups,
        collate: Collator,
        loss: Loss,
        widths: Widths,
        task_type: str,
        validation: Validation | None = None,
        card: Callable[[str, int], str] | None = None,
    ) -> None:
        args.remove_unused_columns = False
        super().__init__(
            model=cast(nn.Module, model),
            args=args,
            train_dataset=groups,
            eval_dataset=cast(Any, validation),
            data_collator=_Collate(collate),
            callbacks=[_NewEpoch(groups)],
        )
        for usual, ours in ((ProgressCallback, _Progress), (PrinterCallback, _Log)):
            if any(type(callback) is usual for callback in self.callback_handler.callbacks):
                self.remove_callback(usual)
                self.add_callback(ours)
        self.collate = collate
        self.loss = loss
        self.widths = widths
        self.task_type = task_type
        self.card = card
        self._place = (0, -1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch, at the width drawn for it."""
        batch: Batch = inputs["batch"]
        step = self.state.global_step
        self._place = (step, self._place[1] + 1 if self._place[0] == step else 0)
        layers, ratio = self.widths.draw(*self._place)
        groups = (-1, len(batch.packed) // batch.size, batch.size)
        full = None
        if self.loss.needs_full_pass:
            with torch.no_grad():
                full = model(batch.packed).view(groups)
        scores = model(batch.packed, layers, ratio).view(groups)
        teacher = None if batch.teacher is None else batch.teacher.to(scores.device)
        loss = self.loss(scores, full, teacher)
        if not torch.isfinite(loss):
            rate = self._get_learning_rate()
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step} (learning rate {rate:g}, compress_layers {list(layers)}, "
                f"compress_ratio {ratio}, queries {', '.join(batch.names)}); "
                f"checkpoints saved before are in {self.args.output_dir}."
            )
        return (loss, {"scores": scores}) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """nDCG@10 of the validation queries, each process measuring all of them."""
        validation = cast(Validation, eval_dataset or self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{MEASURE}": validation(self._scores)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _scores(self, asked: Sequence[tuple[str, str, str | None]]) -> list[float]:
        """Scores of ``(query, body, prompt)`` by the deepest head, at full width."""
        encode = {prompt: self.collate.inputs(prompt) for prompt in {prompt for _, _, prompt in asked}}
        rows = [encode[prompt](self.collate.tokenizer, [(query, body)])[0] for query, body, prompt in asked]
        scores = [float("nan")] * len(rows)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        model = cast(nn.Module, self.model_wrapped if sharded else self.model)
        model.eval()

        def run(batch: list[int]) -> None:
            with self.autocast_smart_context_manager():
                deepest = model(PackedPairs([rows[index] for index in batch]))[-1]
            for index, score in zip(batch, deepest.tolist(), strict=True):
                scores[index] = score

        try:
            failed = run_in_batches(rows, run, Budget.of_device(self.args.device))
        finally:
            model.train()
        if failed is not None:
            raise MemoryError(f"validation: no memory for the pair with query {asked[failed][0]!r} alone.")
        return scores

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the most memory taken so far: of the device, else of the process."""
        if "loss" in logs:
            if self.args.device.type == "cuda":
                taken = torch.cuda.max_memory_allocated(self.args.device)
            else:
                unit = 1 if sys.platform == "darwin" else 1024
                taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            logs["peak_memory_gb"] = round(taken / 1e9, 3)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Adapters go under the task that the original programs give them, and the tokenizer beside them."""
        model = self.accelerator.unwrap_model(self.model)
        learnt = state_dict or {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not all(tensor.isfinite().all() for tensor in learnt.values()):
            raise FloatingPointError(
                f"weights are no longer finite at step {self.state.global_step} (learning rate up to "
                f"{self.args.learning_rate:g}); they are not saved. Older checkpoints are in {self.args.output_dir}."
            )
        config = model.peft_config["default"]
        config.task_type = cast(Any, self.task_type)
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.task_type = None
        folder = Path(output_dir or cast(str, self.args.output_dir))
        self.collate.tokenizer.save_pretrained(folder)
        if self.card is not None and self.args.should_save:
            best = self.args.load_best_model_at_end and not self.is_in_train  # which the last to be saved is then
            steps = self.state.best_global_step if best else self.state.global_step
            card = self.card(folder.resolve().name, steps or self.state.global_step)
            (folder / "README.md").write_text(card, encoding="utf-8")
