"""Callbacks of the Trainer: epochs for the data, early stopping, and losses in a progress bar or in the log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .batches import Groups
from .output_folder import remove_runs
from .validation import MEASURE, measurements

logger = logging.getLogger(__name__)


class NewEpoch(TrainerCallback):
    """Tells the data the number of the epoch that begins."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch."""
        self.groups.epoch = int(state.epoch or 0)


class RemoveRuns(TrainerCallback):
    """Removes earlier runs from the output folder when training begins, after all checks that may refuse the run.

    Args:
        resumed: the checkpoint that the run resumes from; of its run, only later checkpoints are removed.
    """

    def __init__(self, resumed: Path | None) -> None:
        self.resumed = resumed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove them."""
        if args.should_save:
            remove_runs(Path(args.output_dir), self.resumed)


class SaveAfterMeasuring(TrainerCallback):
    """Saves the last step of an epoch again after the measurement of the epoch, so that the checkpoint records it.

    It is saved before too, because the measurement may fail.
    """

    def __init__(self) -> None:
        self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell whether a checkpoint is saved before the measurement."""
        ends = float(state.epoch).is_integer() or control.should_training_stop
        self.due = control.should_save and ends and args.eval_strategy == IntervalStrategy.EPOCH

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save it again, if there is a measurement."""
        control.should_save |= self.due and control.should_evaluate
        self.due = False


class EarlyStopping(TrainerCallback):
    """Stops a run after some measurements without an improvement; a resumed run counts the earlier ones too.

    The last step is saved, as at the end of any run. A run that has stopped takes no step when it is resumed, unless
    the checkpoint of its last step is not kept, as with ``save_strategy="best"`` or ``save_total_limit=1``.

    Args:
        patience: the number of these measurements.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.first = 0  # the first step whose measurement counts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take no step if the run that is resumed has stopped. Measurements of lost weights do not count."""
        if args.load_best_model_at_end:
            self.first = state.global_step + 1 if state.best_global_step is None else state.best_global_step
        if self._is_exhausted(state):
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, and save the last step."""
        if self._is_exhausted(state):
            control.should_training_stop = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS

    def _is_exhausted(self, state: Any) -> bool:
        """Count the measurements after the best one."""
        values = [value for step, value in measurements(state).items() if step >= self.first]
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.patience


class ProgressBar(ProgressCallback):
    """Shows the last loss and nDCG@10 in the Trainer's progress bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Update the figures."""
        super().on_log(args, state, control, logs, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self._shown: dict[str, str] = getattr(self, "_shown", {}) | {
                name.removeprefix("eval_"): f"{value:.4f}"
                for name, value in (logs or {}).items()
                if name in ("loss", f"eval_{MEASURE}")
            }
            self.training_bar.set_postfix(self._shown)


class LogLines(TrainerCallback):
    """Logs losses in place of printing them, as the Trainer would."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Log a line."""
        if state.is_local_process_zero:
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, logs)
