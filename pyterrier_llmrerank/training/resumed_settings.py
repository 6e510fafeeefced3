"""The settings that trained weights depend on, recorded with each checkpoint and compared when a run is resumed."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainingArguments

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.identity import fingerprint
from ..checkpoints.json_files import read_json
from .batches import Groups
from .output_folder import REMOVED_BY
from .recipes import Recipe
from .validation import MEASURE, Validation, measurements

logger = logging.getLogger(__name__)

#: Two settings of the models and adapters that are trained on: the digests of their files, and their paths or hub ids.
FINGERPRINTS, TRAINED_ON = "fingerprints of what is trained on", "trained_on"

#: The settings that a resumed run may change. All others are compared, options of newer transformers too.
MAY_CHANGE = frozenset({
    # Where the run is written and uploaded, and where it resumes from.
    "output_dir", "resume_from_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
    "hub_strategy", "hub_always_push", "hub_revision", "do_train", "do_eval", "do_predict",
    # Logs.
    "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node",
    "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "skip_memory_metrics", "debug",
    # At which steps the run saves, measures or stops early, and which weights it keeps. A step computes the same.
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node", "enable_jit_checkpoint",
    "per_device_eval_batch_size", "patience", "load_best_model_at_end",
    "restore_callback_states_from_checkpoint",
    # How the same numbers are computed, up to rounding and, on another kind of device, dropout.
    "use_cpu", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "local_rank", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    # Settings of fit: the data and the other settings, which are compared, show their effect.
    "min_label", "text", "arguments",
    # Set by our Trainer.
    "remove_unused_columns",
})  # fmt: skip

#: The settings of a run's length. They may change too if the learning rate does not depend on it.
LENGTH = ("max_steps", "num_train_epochs")

#: The settings that choose the steps to measure. They may change too, unless the learning rate follows measurements.
MEASURED = ("eval_strategy", "eval_steps", "eval_delay")

#: The schedules in which the learning rate follows measurements.
SCHEDULES_BY_MEASUREMENT = ("reduce_lr_on_plateau", "greedy")


def fixed_settings(
    recipe: Recipe,
    checkpoint: Checkpoint,
    groups: Groups,
    arguments: TrainingArguments,
    validation: Validation | None = None,
) -> dict[str, Any]:
    """Return the settings, in JSON types, that must not change when a run is resumed.

    Models, adapters and data are compared by digests of their contents, since files may have moved. Validation data
    are included because they choose the best checkpoint, and the number of processes because it multiplies the batch.
    """
    adapters = checkpoint.all_adapters
    folders = dict.fromkeys([checkpoint.folder, *(adapter.folder for adapter in adapters)])
    measured = None
    if validation is not None:
        measured = digest(chain(*(frame.itertuples(index=False) for frame in (validation.pairs, validation.qrels))))
    own = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    options = own | arguments.to_dict()  # type: ignore[no-untyped-call]
    if isinstance(options.get("deepspeed"), str):
        options["deepspeed"] = read_json(Path(options["deepspeed"]))
    measured_freely = options["lr_scheduler_type"] not in SCHEDULES_BY_MEASUREMENT
    may_change = MAY_CHANGE.union(MEASURED if measured_freely else ())
    settings = {
        "recipe": type(recipe).__name__,
        TRAINED_ON: [checkpoint.base, *(str(adapter.name) for adapter in adapters)],
        FINGERPRINTS: [fingerprint(folder) for folder in folders],
        "train_data": digest(groups.records),
        "eval_data": measured,
        "processes": arguments.world_size,
        **{name: value for name, value in options.items() if name not in may_change},
    }
    as_recorded: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return as_recorded


def digest(records: Any) -> str:
    """Return the number of records and a digest of their contents.

    A table of the package datasets is hashed in blocks, several times faster than record by record.
    """
    sha, count = hashlib.sha256(), 0
    if hasattr(records, "with_format"):
        for table in records.with_format("arrow").iter(batch_size=1000):
            copy = table.combine_chunks().take(np.arange(len(table)))  # its bytes depend on the rows alone
            for block in copy.to_batches():
                sha.update(block.serialize())
            count += len(table)
        return f"{count} records of {records.column_names} with SHA-256 {sha.hexdigest()[:16]}"
    for record in records:
        sha.update(json.dumps(record, sort_keys=True, default=str).encode())
        count += 1
    return f"{count} records with SHA-256 {sha.hexdigest()[:16]}"


class SameSettings(TrainerCallback):
    """Records the settings of a run with each checkpoint, and refuses to resume with other settings.

    Args:
        settings: from :func:`fixed_settings`.
        resumed: the checkpoint to resume from, or None.

    Raises:
        ValueError: the checkpoint has other settings; or, when training begins, it is beyond the last step.
    """

    FILE = "begun_with.json"

    def __init__(self, settings: dict[str, Any], resumed: Path | None) -> None:
        self.settings, self.resumed = settings, resumed
        if resumed is None:
            return
        if not (resumed / self.FILE).is_file():
            logger.warning("%s has no %s: it cannot be checked whether its settings were the same.", resumed, self.FILE)
            return
        before = read_json(resumed / self.FILE)
        if unknown := [name for name in {**settings, **before} if not (name in settings and name in before)]:
            logger.warning(
                "%s was written by another version, so these settings are not compared: %s.",
                resumed / self.FILE, ", ".join(unknown),
            )  # fmt: skip
        free = {TRAINED_ON, *(LENGTH if has_constant_rate(settings) else ())}
        for name in settings:
            if name in before and name not in free and before[name] != settings[name]:
                raise ValueError(f"resume_from_checkpoint={str(resumed)!r}: {self._difference(name, before)}.")

    def _difference(self, name: str, before: dict[str, Any]) -> str:
        begun, now = f"{name}={before[name]!r}", repr(self.settings[name])
        if name == FINGERPRINTS:
            begun = f"the contents of {before.get(TRAINED_ON)} (fingerprints {before[name]})"
            now = f"of {self.settings[TRAINED_ON]} (fingerprints {self.settings[name]})"
        if name == "eval_steps":
            now += "; it follows save_steps if it is not given"
        advice = "resume with the same, or begin in another output_dir"
        if name in LENGTH:
            advice += "; allowed where the learning rate does not depend on it: lr_scheduler_type='constant', or "
            advice += "'constant_with_warmup' with a number of warmup_steps"
        return f"the run began with {begun}, not {now}; {advice}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bring the state of a checkpoint up to date: its intervals, and its best weights. Take no step after the last.

        The steps between saves, measurements and log lines may have changed, and the folder of the run may have moved.
        """
        if state.global_step > state.max_steps:
            raise ValueError(
                f"resume_from_checkpoint={str(self.resumed)!r}: step {state.global_step} is beyond max_steps="
                f"{state.max_steps}; raise max_steps, or resume from an earlier checkpoint (of step {state.max_steps} "
                f"at most), in another output_dir or with the later checkpoints removed{REMOVED_BY}."
            )
        if state.global_step == state.max_steps:
            control.should_training_stop = True
        state.compute_steps(args, state.max_steps)
        if self.resumed is not None:
            self._find_best(self.resumed.parent, args, state)

    def _find_best(self, run: Path, args: Any, state: Any) -> None:
        """Take the best checkpoint that exists as the best: weights that are lost must not outdo later ones.

        The first process's disk counts for all, because all processes must save together.
        """
        recorded, before = Path(state.best_model_checkpoint or ""), state.best_global_step
        measured, kept = measurements(state), {}
        for step in measured:
            for folder in (run / f"checkpoint-{step}", recorded):
                if folder.name == f"checkpoint-{step}" and folder.is_dir():
                    kept[step] = str(folder)
                    break
        best = max(kept, key=lambda step: measured[step], default=None)
        found = [(best, measured[best], kept[best]) if best else (None, None, None)]
        broadcast_object_list(found)
        best, value, path = found[0]
        if args.load_best_model_at_end and before is not None and best != before:
            logger.warning(
                "checkpoint-%d, with the best %s so far (%.4f), does not exist; the run continues with %s.",
                before, MEASURE, state.best_metric, f"checkpoint-{best} as the best" if best else "none as the best",
            )  # fmt: skip
        state.best_global_step, state.best_metric, state.best_model_checkpoint = best, value, path

    def record(self, checkpoint: Path) -> None:
        """Write the settings into a checkpoint."""
        (checkpoint / self.FILE).write_text(json.dumps(self.settings, indent=2), encoding="utf-8")


def has_constant_rate(settings: dict[str, Any]) -> bool:
    """Tell whether the learning rate of a step is independent of the number of steps in the run."""
    schedule, warmup = settings["lr_scheduler_type"], float(settings["warmup_steps"])
    return schedule == "constant" or (schedule == "constant_with_warmup" and not 0 < warmup < 1)
