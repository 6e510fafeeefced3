"""The training loop: transformers' own, over groups, with the losses of both systems."""

from __future__ import annotations

import json
import logging
import resource
import shutil
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

from ..checkpoints.checkpoint import SCORE, Checkpoint
from ..checkpoints.config import read_json
from ..checkpoints.description import FILE
from ..checkpoints.locate import without_revision
from ..checkpoints.saving import describe_trained
from ..engine.batching import Budget, run_in_batches
from ..engine.packing import PackedPairs
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
    overwrite: bool = False,
) -> Path:
    """Train by a recipe, and write the adapter with its tokenizer into the output folder.

    Args:
        recipe: what is trained, and on which groups.
        checkpoint: what to start from.
        groups: what to train on.
        arguments: the Trainer's; ``resume_from_checkpoint`` goes on from a folder, or from the last checkpoint.
        validation: what nDCG@10 is measured on; with ``load_best_model_at_end`` the best adapter is kept.
        overwrite: remove an earlier run from the output folder first, unless that is what is gone on with.

    Returns:
        The output folder.

    Raises:
        ValueError: there is no such checkpoint to resume from, or it is of another recipe, or beyond the last step.
        FileExistsError: as :func:`resumed_from`; or what is trained on lies in the output folder.
        FloatingPointError: as :class:`GroupTrainer`.
    """
    folder, resumed = Path(cast(str, arguments.output_dir)), resumed_from(arguments, overwrite)
    begun = _Begun(recipe.begun_with(checkpoint), resumed)
    read = [checkpoint.folder, *(adapter.folder for adapter in checkpoint.adapters)]
    read += [] if checkpoint.adapter is None else [checkpoint.adapter.folder]
    if overwrite and (inside := [path for path in read if path.resolve().is_relative_to(folder.resolve())]):
        raise FileExistsError(f"overwrite_output_dir: {str(inside[0])!r}, which is trained on, is in output_dir.")
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
        partial(describe_trained, checkpoint, prompt=getattr(recipe, "prompt", None), ratio=recipe.token_ratio),
    )
    if recipe.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.patience))
    trainer.add_callback(begun)
    if overwrite and not _is_in(folder, resumed) and arguments.should_save:
        for path in _left_by_runs(folder):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    trainer.save_state()
    trainer.save_model()  # and push, where that is asked for
    return folder


#: What training leaves in a folder: what shows that it was there, and what lies beside that.
RUN = ("checkpoint-[0-9]*", "adapter_config.json", "adapter_model.*", "trainer_state.json", "training_args.bin")
BESIDE = (
    "README.md", FILE, "adapter-[0-9]*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
)  # fmt: skip


def _left_by_runs(folder: Path) -> list[Path]:
    """What training left in a folder, or nothing where nothing shows that it was there."""
    found = [path for pattern in RUN for path in folder.glob(pattern)]
    return found and [*found, *(path for pattern in BESIDE for path in folder.glob(pattern))]


def _is_in(folder: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def resumed_from(arguments: TrainingArguments, overwrite: bool = False) -> Path | None:
    """Find the checkpoint that a run goes on from, None where it begins, and check that it writes over no other run.

    Args:
        arguments: of them, ``output_dir`` and ``resume_from_checkpoint``: a checkpoint's folder, or True for the last
            one in ``output_dir`` that was written whole.
        overwrite: whether an earlier run may be written over.

    Raises:
        ValueError: there is no such checkpoint.
        FileExistsError: there is a model in ``output_dir``; or what an earlier run left there, unless it may be
            written over, or this goes on from one of its checkpoints.
    """
    folder, asked = Path(cast(str, arguments.output_dir)), arguments.resume_from_checkpoint
    resumed = None
    if str(asked).lower() == "true":
        whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
        numbered = [path for path in whole if path.name.removeprefix("checkpoint-").isdecimal()]
        if not numbered:
            raise ValueError(f"resume_from_checkpoint={asked}: no checkpoint in output_dir={str(folder)!r}.")
        resumed = max(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    elif asked and str(asked).lower() != "false":
        resumed = Path(asked)
        if not (resumed / "trainer_state.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint={str(asked)!r}: no checkpoint there; allowed: a folder checkpoint-N that was "
                "written whole, or True for the last one in output_dir."
            )
    if models := [path for name in ("config.json", "*.gguf", "model*.safetensors") for path in folder.glob(name)]:
        raise FileExistsError(
            f"output_dir={str(folder)!r}: a model is there ({models[0].name}); choose another folder."
        )
    if not overwrite and not _is_in(folder, resumed) and (left := _left_by_runs(folder)):
        raise FileExistsError(
            f"output_dir={str(folder)!r}: another run is there ({left[0].name}); choose another folder, go on with "
            "it by resume_from_checkpoint=True, or begin anew over it by overwrite_output_dir."
        )
    return resumed


class _Begun(TrainerCallback):
    """Keeps beside each checkpoint what its run was begun with, and goes on with no other.

    Args:
        settings: that stay the same.
        resumed: the checkpoint that is gone on with, or None.

    Raises:
        ValueError: it was begun with others; or, in training, it is beyond the last step.
    """

    FILE = "begun_with.json"

    def __init__(self, settings: dict[str, Any], resumed: Path | None) -> None:
        self.settings, self.resumed = settings, resumed
        if resumed is None:
            return
        if not (resumed / self.FILE).is_file():
            logger.warning("%s does not say what it was begun with: that it was the same is not checked.", resumed)
            return
        before = read_json(resumed / self.FILE)
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"resume_from_checkpoint={str(resumed)!r}: begun with {name}={before.get(name)!r}, not "
                    f"{settings.get(name)!r}; go on with the same, or begin in another output_dir."
                )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > state.max_steps:
            raise ValueError(
                f"resume_from_checkpoint={str(self.resumed)!r}: step {state.global_step} is beyond max_steps="
                f"{state.max_steps}; go on with more, or from an earlier checkpoint."
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            (folder / self.FILE).write_text(json.dumps(self.settings, indent=2), encoding="utf-8")


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
        describe: writes ``reranker.json`` into a folder; ``whole`` says whether it is the output folder.

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
        describe: Callable[..., None] | None = None,
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
        self.describe = describe
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
        if self.describe is not None and self.args.should_save:
            self.describe(folder, whole=folder == Path(cast(str, self.args.output_dir)))
