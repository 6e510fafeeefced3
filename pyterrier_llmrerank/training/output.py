"""The output folder of a run: earlier runs in it, the checkpoint to resume from, and the settings to resume with."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainingArguments

from ..checkpoints.description import FILE
from ..checkpoints.json_files import read_json
from .recipes import FINGERPRINTS

logger = logging.getLogger(__name__)

#: Files that show that a run wrote into a folder, and the files that it writes beside them.
RUN_FILES = ("checkpoint-[0-9]*", "adapter_config.json", "adapter_model.*", "trainer_state.json", "training_args.bin")
COMPANION_FILES = (
    "README.md", FILE, "adapter-[0-9]*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
)  # fmt: skip


def find_resumed(arguments: TrainingArguments, overwrite: bool = False) -> Path | None:
    """Find the checkpoint to resume from, and check that the run overwrites no other.

    Args:
        arguments: ``output_dir``, and ``resume_from_checkpoint``: a checkpoint's folder, or True for the last complete
            one in ``output_dir``.
        overwrite: whether the run may overwrite another.

    Returns:
        The checkpoint, or None for a new run.

    Raises:
        ValueError: the checkpoint does not exist.
        FileExistsError: ``output_dir`` holds a model; or another run, and ``overwrite`` is False.
    """
    folder, asked = Path(cast(str, arguments.output_dir)), arguments.resume_from_checkpoint
    resumed = None
    if str(asked).lower() == "true":
        complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
        numbered = [path for path in complete if path.name.removeprefix("checkpoint-").isdecimal()]
        if not numbered:
            raise ValueError(f"resume_from_checkpoint={asked}: no checkpoint in output_dir={str(folder)!r}.")
        resumed = max(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    elif asked and str(asked).lower() != "false":
        resumed = Path(asked)
        if not (resumed / "trainer_state.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint={str(asked)!r}: no checkpoint there; allowed: the folder checkpoint-N of a "
                "complete checkpoint, or True for the last one in output_dir."
            )
    if models := [path for name in ("config.json", "*.gguf", "model*.safetensors") for path in folder.glob(name)]:
        raise FileExistsError(
            f"output_dir={str(folder)!r}: a model is there ({models[0].name}); choose another folder."
        )
    if not overwrite and not is_in(folder, resumed) and (written := files_of_runs(folder)):
        raise FileExistsError(
            f"output_dir={str(folder)!r}: another run is there ({written[0].name}); choose another folder, resume the "
            "run with resume_from_checkpoint=True, or replace it with overwrite_output_dir."
        )
    return resumed


def refuse_own_inputs(folder: Path, inputs: Sequence[Path]) -> None:
    """Raise FileExistsError if the run would remove a model or adapter that it starts from."""
    if inside := [path for path in inputs if path.resolve().is_relative_to(folder.resolve())]:
        raise FileExistsError(f"overwrite_output_dir: {str(inside[0])!r}, which is trained on, is in output_dir.")


def remove_runs(folder: Path) -> None:
    """Remove the files of earlier runs, and no others."""
    for path in files_of_runs(folder):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def files_of_runs(folder: Path) -> list[Path]:
    """List the files of earlier runs; none if nothing shows that there was a run."""
    found = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    return found and [*found, *(path for pattern in COMPANION_FILES for path in folder.glob(pattern))]


def is_in(folder: Path, checkpoint: Path | None) -> bool:
    """Tell whether a checkpoint belongs to the run in a folder."""
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


class SameSettings(TrainerCallback):
    """Save the settings of a run beside each checkpoint, and resume only with the same settings.

    Args:
        settings: the settings that a resumed run must not change.
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
            logger.warning("%s has no %s: whether its settings were the same is not checked.", resumed, self.FILE)
            return
        before = read_json(resumed / self.FILE)
        before.setdefault(FINGERPRINTS, settings.get(FINGERPRINTS))  # earlier versions did not write them
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"resume_from_checkpoint={str(resumed)!r}: the run began with {name}={before.get(name)!r}, not "
                    f"{settings.get(name)!r}; resume with the same, or begin in another output_dir."
                )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that steps remain."""
        if state.global_step > state.max_steps:
            raise ValueError(
                f"resume_from_checkpoint={str(self.resumed)!r}: step {state.global_step} is beyond max_steps="
                f"{state.max_steps}; raise max_steps, or resume from an earlier checkpoint."
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the settings."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            (folder / self.FILE).write_text(json.dumps(self.settings, indent=2), encoding="utf-8")
