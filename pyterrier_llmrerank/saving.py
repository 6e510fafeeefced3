"""Re-rankers written to disk in the forms that the original programs read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints import Checkpoint
from .files import read_json
from .weights import build_decoder


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


def copy_adapter(source: Path, target: Path, base: str | None = None) -> None:
    """Copy a PEFT folder: the adapter and the tokenizer beside it, not what a training run left there.

    Args:
        source: the folder.
        target: where to.
        base: what the copy calls its base; None for what the adapter calls it.
    """
    for file in source.iterdir():
        weights = file.name.startswith("adapter_model.")
        wanted = weights or (file.suffix in (".json", ".model", ".jinja", ".txt") and file.name != "trainer_state.json")
        if file.is_file() and wanted:
            shutil.copyfile(file, target / file.name)
    if base is not None:
        config = read_json(target / "adapter_config.json") | {"base_model_name_or_path": base}
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
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    kept = {key: value for key, value in checkpoint.settings.items() if key not in ("auto_map", "torch_dtype")}
    config = kept | {"dtype": str(dtype).removeprefix("torch.")} | dict(settings)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    checkpoint.tokenizer().save_pretrained(folder)
