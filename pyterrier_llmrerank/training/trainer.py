"""The training loop: transformers' Trainer over groups of passages."""

from __future__ import annotations

import resource
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from huggingface_hub import HfApi
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.trainer_utils import HubStrategy

from ..checkpoints.cards import Stated
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.locate import is_hub_id
from ..checkpoints.saving import describe_trained, saved_files
from ..engine.attention_kernels import without_cudnn
from ..engine.batching import Budget, is_out_of_memory, run_in_batches
from ..engine.packing import PackedPairs, on_device
from ..engine.pending import to_host
from ..engine.threads import fastest_threads
from ..errors import ScoringError
from .batches import Batch, Collator, Groups
from .callbacks import EarlyStopping, LogLines, NewEpoch, ProgressBar, RemoveRuns, SaveAfterMeasuring
from .lora import with_lora
from .output_folder import find_resumed, refuse_own_inputs
from .recipes import Recipe
from .records import Group
from .resumed_settings import SameSettings, fixed_settings
from .validation import MEASURE, Validation, measurements


def train(
    recipe: Recipe,
    checkpoint: Checkpoint,
    groups: Groups,
    arguments: TrainingArguments,
    validation: Validation | None = None,
    overwrite: bool = False,
    stated: Stated | None = None,
    described: Mapping[str, Any] | None = None,
) -> Path:
    """Train by a recipe, and write the adapter with its tokenizer into the output folder.

    Args:
        recipe: the model, the loss and the LoRA settings.
        checkpoint: the checkpoint to start from.
        groups: the training data.
        arguments: the Trainer's; ``resume_from_checkpoint`` resumes from a folder, or from the last checkpoint.
        validation: the data to measure nDCG@10 on; with ``load_best_model_at_end``, the best adapter is kept.
        overwrite: remove an earlier run from the output folder first; of the run to resume, only later checkpoints.
        stated: the user's facts about the model, for its card.
        described: fields of the model's description that the user set, such as the lengths to score with.

    Returns:
        The output folder.

    Raises:
        ValueError: the checkpoint to resume from does not exist, has other settings or is beyond the last step; or the
            result cannot be uploaded as ``arguments`` ask.
        FileExistsError: as :func:`~pyterrier_llmrerank.training.output_folder.find_resumed`; or the run would remove
            the model or adapter that it starts from.
        FloatingPointError: as :class:`GroupTrainer`.
    """
    folder, resumed = Path(cast(str, arguments.output_dir)), find_resumed(arguments, overwrite)
    if arguments.push_to_hub:
        _check_upload(checkpoint, arguments)
    same_settings = SameSettings(fixed_settings(recipe, checkpoint, groups, arguments, validation), resumed)
    if overwrite:
        refuse_own_inputs(folder, [checkpoint.folder, *(adapter.folder for adapter in checkpoint.all_adapters)])
    set_seed(arguments.seed)
    arguments.dataloader_pin_memory &= torch.accelerator.is_available()
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel cannot split our batches; torchrun uses several GPUs
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    heads = recipe.heads(checkpoint, checkpoint.tokenizer(), arguments.seed)
    with _without_sharding(arguments):
        model = with_lora(checkpoint, heads, recipe, dtype)
    trainer = GroupTrainer(model, arguments, recipe, checkpoint, groups, validation, stated, described, same_settings)
    if overwrite:
        trainer.add_callback(RemoveRuns(resumed))
    if recipe.patience is not None:
        trainer.add_callback(EarlyStopping(recipe.patience))
    with without_cudnn(), fastest_threads(arguments.device):
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    trainer.save_state()
    trainer.save_model()  # pushes to the hub too, if asked to
    return folder


def _check_upload(checkpoint: Checkpoint, arguments: TrainingArguments) -> None:
    """Raise ValueError if only this machine could open the result, or if more than the result is to be uploaded."""
    if not is_hub_id(checkpoint.base):
        raise ValueError(
            f"push_to_hub: the base {checkpoint.base!r} exists only on this machine; allowed: a base on the hub."
        )
    if arguments.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
        raise ValueError(
            f"hub_strategy={HubStrategy(arguments.hub_strategy).value!r}: only the result is uploaded, no checkpoints; "
            "allowed: 'end'."
        )


@contextmanager
def _without_sharding(arguments: TrainingArguments) -> Iterator[None]:
    """Build a model in one piece: transformers would let DeepSpeed shard it before its weights are read."""
    config = getattr(arguments, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Collate:
    """Returns a batch as a dict, which the Trainer expects."""

    collate: Collator

    def __call__(self, drawn: Sequence[Group]) -> dict[str, Batch]:
        return {"batch": self.collate(drawn)}


class GroupTrainer(Trainer):
    """Extends transformers' Trainer by a loss over groups of passages.

    Precision, accumulation, schedules, checkpoints, resuming and several devices are the Trainer's own.

    Args:
        model: from :func:`~pyterrier_llmrerank.training.lora.with_lora`.
        args: the Trainer's.
        recipe: its loss, widths, encoding and PEFT task type are used.
        checkpoint: the checkpoint that training starts from. Its tokenizer is saved with adapters; their card names it.
        groups: the training data.
        validation: the data to measure, with the scores of the deepest head, whenever the Trainer evaluates.
        stated: the user's facts about the model, for its card.
        described: fields of the model's description that the user set.
        same_settings: the settings of the run, to be recorded with its checkpoints.

    Raises:
        FloatingPointError: in training, if the loss is not finite; in saving, if a weight is not finite. Earlier
            checkpoints are kept.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        recipe: Recipe,
        checkpoint: Checkpoint,
        groups: Groups,
        validation: Validation | None = None,
        stated: Stated | None = None,
        described: Mapping[str, Any] | None = None,
        same_settings: SameSettings | None = None,
    ) -> None:
        self.recipe = recipe
        self.same_settings = same_settings
        self.stated = stated or Stated()
        self.described = described or {}
        self.checkpoint = checkpoint
        self.collate = Collator(checkpoint.tokenizer(), recipe.inputs)
        self.widths = recipe.widths(args.seed)
        self._batch = (0, -1)  # the step, and the place of the batch in it
        self.unchecked_losses: deque[tuple[Callable[[], np.ndarray], str]] = deque()  # with their places
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False  # it would wait for each loss; here, a loss that is not finite is an error
        super().__init__(
            model=cast(nn.Module, model),
            args=args,
            train_dataset=groups,
            eval_dataset=cast(Any, validation),
            data_collator=_Collate(self.collate),
            callbacks=[NewEpoch(groups), SaveAfterMeasuring(), *([same_settings] if same_settings else [])],
        )
        for usual, ours in ((ProgressCallback, ProgressBar), (PrinterCallback, LogLines)):
            if any(type(callback) is usual for callback in self.callback_handler.callbacks):
                self.remove_callback(usual)
                self.add_callback(ours)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch, at a width drawn for this batch."""
        batch: Batch = inputs["batch"]
        step = self.state.global_step
        teacher = None
        if batch.teacher is not None:  # copied first: a copy queued behind the model would make the host wait
            teacher = on_device(batch.teacher.numpy(), self.args.device)
        self._batch = (step, self._batch[1] + 1 if self._batch[0] == step else 0)
        layers, ratio = self.widths.draw(*self._batch)
        groups = (-1, len(batch.packed) // batch.size, batch.size)
        full = None
        if self.recipe.loss.needs_full_pass:
            with torch.no_grad():
                full = model(batch.packed).view(groups)
        scores = model(batch.packed, layers, ratio).view(groups)
        loss = self.recipe.loss(scores, full, teacher)
        self.unchecked_losses.append(
            (
                to_host(loss.detach()),
                f"at step {step} (learning rate {self._get_learning_rate():g}, compress_layers {list(layers)}, "
                f"compress_ratio {ratio}, queries {', '.join(batch.names)})",
            )
        )
        self.check_losses(leave=1 if loss.device.type == "cuda" else 0)
        return (loss, {"scores": scores}) if return_outputs else loss

    def check_losses(self, leave: int = 0) -> None:
        """Check that losses are finite, except the last ``leave``, whose computation a GPU may not have finished.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        while len(self.unchecked_losses) > leave:
            result, place = self.unchecked_losses.popleft()
            if not np.isfinite(loss := float(result())):
                raise FloatingPointError(
                    f"the loss is {loss} {place}; earlier checkpoints are in {self.args.output_dir}."
                )

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Train for an epoch, unless a run that is resumed has ended."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **options)  # type: ignore[no-untyped-call]

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Measure nDCG@10 on all validation queries in each process; the first process's value counts for all."""
        validation = cast(Validation, eval_dataset or self.eval_dataset)
        measured = [validation(self.score_pairs)]
        broadcast_object_list(measured)  # rounding may differ, but all processes must save and stop together
        metrics = {f"{metric_key_prefix}_{MEASURE}": measured[0]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Tell whether a measurement is the best so far; if so, save the weights: only saved ones can be kept."""
        best = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return best

    @torch.no_grad()
    def score_pairs(self, asked: Sequence[tuple[str, str, str | None]]) -> list[float]:
        """Score ``(query, body, prompt)`` by the deepest head, at full width."""
        encode = {prompt: self.collate.inputs(prompt) for prompt in {prompt for _, _, prompt in asked}}
        rows = [encode[prompt](self.collate.tokenizer, [(query, body)])[0] for query, body, prompt in asked]
        scores = [float("nan")] * len(rows)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        # All processes of FSDP or of DeepSpeed's stage 3 compute each batch together.
        together = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
        model = cast(nn.Module, self.model_wrapped if sharded else self.model)
        model.eval()

        def run(batch: list[int]) -> None:
            try:
                with self.autocast_smart_context_manager():
                    deepest = model(PackedPairs([rows[index] for index in batch]))[-1]
            except (MemoryError, RuntimeError) as error:
                if together and is_out_of_memory(error):  # the other processes wait in the middle of this batch
                    raise ScoringError(
                        f"validation: a batch of {len(batch)} pairs does not fit in memory, and the processes of a "
                        "sharded model cannot try a smaller one; use shorter lengths, or more devices.",
                        np.array(scores),
                    ) from error
                raise
            for index, score in zip(batch, deepest.tolist(), strict=True):
                scores[index] = score

        try:
            width = int(self.checkpoint.config.hidden_size)
            failed = run_in_batches(rows, run, Budget.of_device(self.args.device, width))
        finally:
            model.train()
        if failed is not None:
            raise MemoryError(f"validation: the pair with query {asked[failed][0]!r} alone does not fit in memory.")
        return scores

    def push_to_hub(self, commit_message: str | None = "End of training", *args: Any, **options: Any) -> Any:
        """Upload the adapter with its tokenizer, card and description, and no file of the run, when the run ends."""
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(cast(str, self.args.output_dir))
        return HfApi(token=self.args.hub_token).upload_folder(
            repo_id=cast(str, self.hub_model_id),
            folder_path=folder,
            allow_patterns=saved_files(folder),
            commit_message=commit_message,
            revision=self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload nothing before the end: a checkpoint may lack the adapters below it."""

    def _measured(self, steps: int) -> str | None:
        """Return the measure and its value after some steps; None if they were not measured."""
        value = measurements(self.state).get(steps)
        return None if value is None else f"{MEASURE} {value:.4f}"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log like the Trainer, and add the peak memory of the device or, on a CPU, of the process."""
        if "loss" in logs:
            if self.args.device.type == "cuda":
                taken = torch.cuda.max_memory_allocated(self.args.device)
            else:
                unit = 1 if sys.platform == "darwin" else 1024
                taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            logs["peak_memory_gb"] = round(taken / 1e9, 3)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save like the Trainer, and record the settings in a checkpoint, which FSDP may save in other ways."""
        checkpoint = Path(output_dir) if output_dir and _internal_call and self.args.should_save else None
        if checkpoint is not None:  # with its state, written last, it is complete
            (checkpoint / "trainer_state.json").unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)
        if checkpoint is not None and self.same_settings is not None:
            checkpoint.mkdir(parents=True, exist_ok=True)
            self.same_settings.record(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the adapter under the original programs' task type, with its tokenizer, card and description."""
        self.check_losses()
        model = self.accelerator.unwrap_model(self.model)
        trained = state_dict or {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not all(tensor.isfinite().all() for tensor in trained.values()):
            raise FloatingPointError(
                f"weights are no longer finite at step {self.state.global_step} (learning rate up to "
                f"{self.args.learning_rate:g}); they are not saved. Earlier checkpoints are in {self.args.output_dir}."
            )
        config = model.peft_config["default"]
        config.task_type = cast(Any, self.recipe.task_type)
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.task_type = None
        folder = Path(output_dir or cast(str, self.args.output_dir))
        self.collate.tokenizer.save_pretrained(folder)
        whole = folder == Path(cast(str, self.args.output_dir))
        if self.args.should_save:
            # After training, the best checkpoint is saved, which need not be the last, unless it has been removed.
            best = self.args.load_best_model_at_end and self.state.best_model_checkpoint and not self.is_in_train
            steps = (best and self.state.best_global_step) or self.state.global_step
            card = self.recipe.card(self.checkpoint, steps, self.stated, self._measured(steps), self.hub_model_id)
            (folder / "README.md").write_text(card, encoding="utf-8")
            describe_trained(
                self.checkpoint,
                folder,
                {**self.recipe.described_inputs(self.checkpoint), **self.described},
                ratio=self.recipe.token_ratio,
                whole=whole,
            )
