"""The output folder of a run: earlier runs in it, and the checkpoint to resume from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from transformers import TrainingArguments

from ..checkpoints.description import FILE
from ..checkpoints.json_files import read_json

CHECKPOINTS = "checkpoint-[0-9]*"

#: The files of a run that show that it wrote into a folder, and other files that it writes there.
RUN_FILES = (CHECKPOINTS, "adapter_config.json", "adapter_model.*", "trainer_state.json", "training_args.bin")
COMPANION_FILES = (
    "README.md", FILE, "adapter-[0-9]*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
)  # fmt: skip

#: Files and folders with the optimiser's state in a checkpoint: the Trainer's and FSDP's, and DeepSpeed's.
OPTIMIZER_FILES = ("optimizer*", "global_step*")

#: For messages: `fit` leaves this to its user.
REMOVED_BY = " (as the command's --overwrite_output_dir does)"


def find_resumed(arguments: TrainingArguments, overwrite: bool = False) -> Path | None:
    """Find the checkpoint to resume from, and check that the run overwrites no other.

    Args:
        arguments: ``output_dir``, and ``resume_from_checkpoint``: a checkpoint's folder, or True for the last complete
            one in ``output_dir``.
        overwrite: whether the run may overwrite another.

    Returns:
        The checkpoint, or None for a new run.

    Raises:
        ValueError: the checkpoint does not exist, it has no state of the optimiser, or the state of a run is damaged.
        FileExistsError: ``output_dir`` holds a model; or another run, or a later checkpoint than the one to resume
            from, and ``overwrite`` is False.
    """
    folder, asked = Path(cast(str, arguments.output_dir)), arguments.resume_from_checkpoint
    resumed = None
    if str(asked).lower() == "true":
        if not (complete := complete_checkpoints(folder)):
            raise ValueError(f"resume_from_checkpoint={asked}: no checkpoint in output_dir={str(folder)!r}.")
        resumed = complete[-1]
    elif asked and str(asked).lower() != "false":
        resumed = Path(asked)
        if not (resumed / "trainer_state.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint={str(asked)!r}: no checkpoint there; allowed: the folder checkpoint-N of a "
                "complete checkpoint, or True for the last one in output_dir."
            )
    if resumed is not None and not any(list(resumed.glob(name)) for name in OPTIMIZER_FILES):
        raise ValueError(
            f"resume_from_checkpoint={str(resumed)!r}: the optimiser's state is missing, without which the run would "
            "not continue as it began; allowed: a checkpoint written without save_only_model."
        )
    if models := [path for name in ("config.json", "*.gguf", "model*.safetensors") for path in folder.glob(name)]:
        raise FileExistsError(
            f"output_dir={str(folder)!r}: a model is there ({models[0].name}); choose another folder."
        )
    if not overwrite and not is_in(folder, resumed) and (written := files_of_runs(folder)):
        raise FileExistsError(
            f"output_dir={str(folder)!r}: another run is there ({written[0].name}); choose another folder, resume the "
            f"run with resume_from_checkpoint=True, or remove it{REMOVED_BY}."
        )
    if not overwrite and (later := later_checkpoints(folder, resumed)):
        raise FileExistsError(
            f"output_dir={str(folder)!r}: a later checkpoint than {str(resumed)!r} is there ({later[-1].name}); resume "
            "the run with resume_from_checkpoint=True, choose another folder, or remove the later checkpoints: "
            f"{', '.join(path.name for path in later)}{REMOVED_BY}."
        )
    return resumed


def complete_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints in a folder, in the order of their steps."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return sorted((path for path in complete if path.name.removeprefix("checkpoint-").isdecimal()), key=_step)


def later_checkpoints(folder: Path, resumed: Path | None) -> list[Path]:
    """List the complete checkpoints in a folder after the one to resume from, if that one is there too."""
    if resumed is None or not is_in(folder, resumed):
        return []
    return [path for path in complete_checkpoints(folder) if _step(path) > _step(resumed)]


def _step(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was saved; its folder may have another name."""
    return int(read_json(checkpoint / "trainer_state.json").get("global_step", 0))


def refuse_own_inputs(folder: Path, inputs: Sequence[Path]) -> None:
    """Raise FileExistsError if the run would remove a model or adapter that it starts from."""
    if inside := [path for path in inputs if path.resolve().is_relative_to(folder.resolve())]:
        raise FileExistsError(f"overwrite_output_dir would remove {str(inside[0])!r}, from which the run starts.")


def remove_runs(folder: Path, resumed: Path | None = None) -> None:
    """Remove the files of earlier runs, and no others; of a run that is resumed, only its later checkpoints."""
    for path in later_checkpoints(folder, resumed) if is_in(folder, resumed) else files_of_runs(folder):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def adapter_alone(folder: Path) -> Iterator[None]:
    """Keep the adapter alone in the folder of a training, which the user did not choose.

    After an error, checkpoints stay if there are any, and a note to the error names the folder.
    """
    try:
        yield
    except BaseException as error:
        if any(folder.glob(CHECKPOINTS)):
            error.add_note(f"The checkpoints of the training are in {str(folder)!r}.")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for checkpoint in folder.glob(CHECKPOINTS):
        shutil.rmtree(checkpoint)
    for name in ("trainer_state.json", "training_args.bin"):
        (folder / name).unlink(missing_ok=True)


def files_of_runs(folder: Path) -> list[Path]:
    """List the files of earlier runs; an empty list without a sign of a run."""
    found = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    return found and [*found, *(path for pattern in COMPANION_FILES for path in folder.glob(pattern))]


def is_in(folder: Path, checkpoint: Path | None) -> bool:
    """Tell whether a checkpoint belongs to the run in a folder."""
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
