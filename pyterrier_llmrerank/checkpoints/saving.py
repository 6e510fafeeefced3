"""Re-rankers written to disk in the forms that the original programs read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..engine.weights import build_decoder
from .checkpoint import Checkpoint
from .files import read_json, save_tensors, save_tokenizer, without_revision
from .tokenizer import VOCABULARIES

#: What a copy of an adapter gets last of all, and what it does not get.
LAST_OR_NOT = ("adapter_config.json", "trainer_state.json", "begun_with.json")


def empty_folder(folder: Path, argument: str = "folder") -> Path:
    """The folder, made where it is not there.

    Args:
        folder: the folder.
        argument: what the caller calls it, for messages.

    Raises:
        FileExistsError: there is something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{argument}={str(folder)!r}: there is something in it; allowed: a new or an empty folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def written_whole(folder: Path, argument: str = "folder") -> Iterator[Path]:
    """A new or empty folder to write into; what was written is removed again where not all of it could be.

    So that nothing half-written opens later. What makes a folder a model is still to be written last, for a process
    may end before it can tidy up.

    Raises:
        FileExistsError: as :func:`empty_folder`.
    """
    was_there = folder.exists()
    empty_folder(folder, argument)
    try:
        yield folder
    except BaseException:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        if not was_there:
            folder.rmdir()
        raise


#: What describes a tokenizer; beside another one's files they would change it.
TOKENIZER_FILES = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *chain(*VOCABULARIES)}


def copy_adapter(
    source: Path, target: Path, base: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Copy a PEFT folder: the adapter and the tokenizer beside it, not what a training run left there.

    Args:
        source: the folder.
        target: where to.
        base: what the copy calls its base; None for what the adapter calls it.
        tokenizer: what is written beside it, rather than what lies there; None for that.
    """
    for file in source.iterdir():
        weights = file.name.startswith("adapter_model.")
        wanted = weights or (file.suffix in (".json", ".model", ".jinja", ".txt") and file.name not in LAST_OR_NOT)
        wanted = wanted and (tokenizer is None or file.name not in TOKENIZER_FILES)
        if file.is_file() and wanted:
            shutil.copyfile(file, target / file.name)
    if tokenizer is not None:
        save_tokenizer(tokenizer, target)
    config = read_json(source / "adapter_config.json")
    if base is not None:
        config["base_model_name_or_path"], config["revision"] = without_revision(base)
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_merged(
    checkpoint: Checkpoint,
    heads: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Write one model with all adapters merged in, a file at a time, so that one file has to fit in memory.

    Args:
        checkpoint: what is written.
        heads: its heads by their names in the file; kept in fp32, as they are when scoring.
        settings: what config.json says beside the checkpoint's own settings.
        dtype: of all other weights.
        folder: where to.
    """
    shapes = {
        f"model.{name}": torch.empty(parameter.shape, dtype=dtype, device="meta")
        for name, parameter in build_decoder(checkpoint).named_parameters()
    }
    plan = split_torch_state_dict_into_shards({**shapes, **heads}, max_shard_size="4GB")
    for file, names in plan.filename_to_tensors.items():
        tensors = {
            name: heads[name].contiguous()
            if name in heads
            else checkpoint.tensor(name.removeprefix("model.")).to(dtype).contiguous()
            for name in names
        }
        save_tensors(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    kept = {key: value for key, value in checkpoint.settings.items() if key not in ("auto_map", "torch_dtype")}
    config = kept | {"dtype": str(dtype).removeprefix("torch.")} | dict(settings)
    save_tokenizer(checkpoint.tokenizer(), folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")  # what makes it a model
