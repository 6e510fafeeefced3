"""Write rerankers to disk in the forms that the original programs read, each with its description."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import Checkpoint
from .description import FILE, Description
from .json_files import read_json
from .locate import adapter_folder, portable, without_revision
from .tensors import save_tensors
from .tokenizer import VOCABULARIES, save_tokenizer

#: Files that are not copied with an adapter: they belong to its training run, or are written anew.
NOT_COPIED = ("adapter_config.json", "trainer_state.json", "begun_with.json", FILE)


def empty_folder(folder: Path, argument: str = "folder") -> Path:
    """Return a folder, made if it does not exist.

    Args:
        folder: the folder.
        argument: the caller's name for it, for messages.

    Raises:
        FileExistsError: the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{argument}={str(folder)!r} exists and is not empty; allowed: a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def all_or_nothing(folder: Path, argument: str = "folder") -> Iterator[Path]:
    """Write into a new or empty folder, and empty it again if an error interrupts the writing.

    A killed process cannot tidy up: write the file that makes the folder a model last.

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


#: The files of a tokenizer. Left beside another tokenizer's files, they would change it.
TOKENIZER_FILES = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *chain(*VOCABULARIES)}


def copy_adapter(
    source: Path, target: Path, base: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Copy a PEFT folder: the adapter, its tokenizer and its model card, without the files of its training run.

    Args:
        source: the folder.
        target: the folder to copy into.
        base: the base that the copy names; None for the adapter's.
        tokenizer: the tokenizer to write beside the copy; None for the files in the folder.
    """
    for file in source.iterdir():
        wanted = file.name.startswith("adapter_model.") or file.name == "README.md"
        wanted = wanted or (file.suffix in (".json", ".model", ".jinja", ".txt") and file.name not in NOT_COPIED)
        if file.is_file() and wanted and (tokenizer is None or file.name not in TOKENIZER_FILES):
            shutil.copyfile(file, target / file.name)
    if tokenizer is not None:
        save_tokenizer(tokenizer, target)
    config = read_json(source / "adapter_config.json")
    if base is not None:
        config["base_model_name_or_path"], config["revision"] = without_revision(base)
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_adapters(parts: Description, folder: Path) -> Description:
    """Copy the adapters of a Matroyshka reranker into a folder, and describe them there.

    A single adapter goes into the folder itself, several into numbered folders below it, and token adapters into
    ``token-<ratio>``.

    Args:
        parts: the reranker, with references to its base and adapters.
        folder: the folder to write into; it exists and is empty.

    Returns:
        The description as it is written, with the names of the folders.
    """
    base = str(parts.base)
    one = len(parts.adapters) == 1
    merged = tuple("." if one else str(number + 1) for number in range(len(parts.adapters)))
    by_ratio = tuple((ratio, f"token-{ratio}") for ratio, _ in parts.token_adapters)
    saved = replace(parts, base=portable(base), adapters=merged, token_adapters=by_ratio)
    for reference, name in zip(parts.folders, saved.folders, strict=True):
        (folder / name).mkdir(exist_ok=True)
        copy_adapter(adapter_folder(reference, base), folder / name)
    saved.write(folder)
    return saved


def describe_trained(
    checkpoint: Checkpoint, folder: Path, inputs: Mapping[str, Any], *, ratio: int | None = None, whole: bool = True
) -> None:
    """Describe the reranker of a newly trained adapter and its base, so that the adapter's folder opens.

    Args:
        checkpoint: the model that was trained on; copies of the adapters merged into it go into ``adapter-<number>``.
        folder: the folder of the trained adapter.
        inputs: the fields of the description that say how inputs are made.
        ratio: the ratio that a token adapter was trained for; None for any other adapter.
        whole: whether to copy earlier adapters. If not, an adapter that was trained over others is not described.
    """
    earlier = list(checkpoint.adapters)
    if earlier and not whole:
        return
    names = tuple(f"adapter-{number}" for number in range(1, len(earlier) + 1))
    for adapter, name in zip(earlier, names, strict=True):
        (folder / name).mkdir(exist_ok=True)
        copy_adapter(adapter.folder, folder / name)
    merged, by_ratio = ((*names, "."), ()) if ratio is None else (names, ((ratio, "."),))
    description = checkpoint.description()
    parts = replace(description, base=checkpoint.base, adapters=merged, token_adapters=by_ratio, **inputs)
    parts.write(folder)


def saved_files(folder: Path) -> list[str]:
    """List the files of a trained adapter, without the files of its training run."""
    names = {"README.md", FILE, "adapter_config.json", "chat_template.jinja", *TOKENIZER_FILES}
    folders = [folder, *sorted(folder.glob("adapter-[0-9]*"))]
    return [
        str(file.relative_to(folder))
        for place in folders
        for file in sorted(place.iterdir())
        if file.is_file() and (file.name in names or file.name.startswith("adapter_model."))
    ]


def classifier_settings(checkpoint: Checkpoint, end: Sequence[int]) -> dict[str, Any]:
    """Return the settings of a ``*ForSequenceClassification`` model with one label and a pad token.

    Args:
        checkpoint: the model.
        end: the ids in which every input ends. The last of them cannot pad: transformers reads the last token that is
            not the pad token.

    Raises:
        ValueError: the tokenizer has no token that could pad.
    """
    tokenizer = checkpoint.tokenizer()
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    known = [token for token in ids if token is not None]
    pads = [token for token in known if token not in end[-1:]]
    if not pads:
        other = f" but {tokenizer.convert_ids_to_tokens(end[-1])!r}, in which every input ends" if known else ""
        raise ValueError(
            f"{checkpoint.argument}: its tokenizer has no pad, unknown, end or first token{other}, to pad batches with."
        )
    family = type(checkpoint.config).__name__.removesuffix("Config")
    return {
        "model_type": checkpoint.config.model_type,
        "architectures": [f"{family}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pads[0],
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
    }


def write_merged(
    checkpoint: Checkpoint,
    decoder: PreTrainedModel,
    heads: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    folder: Path,
    description: Description,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
) -> None:
    """Write one model with all adapters merged in, one file at a time, so that only one has to fit in memory.

    Args:
        checkpoint: the model.
        decoder: its headless decoder, for the names and shapes of its weights.
        heads: its heads by their names in the file; kept in fp32, as they are when scoring.
        settings: the settings in config.json beside the checkpoint's own.
        dtype: the dtype of all other weights.
        folder: the folder to write into.
        description: the description to write beside the model; it names the number of layers to write, from the first.
        tokenizer: the tokenizer to write, which may be changed; None for a copy of the checkpoint's.
        card: the model card; None for none.
    """
    tokenizer = copy.deepcopy(checkpoint.tokenizer()) if tokenizer is None else tokenizer
    if "pad_token_id" in settings:
        tokenizer.pad_token_id = settings["pad_token_id"]
        tokenizer.padding_side = "right"
        tokenizer.chat_template = None  # else sentence-transformers would read a pair as messages
    beyond = [f"layers.{layer}." for layer in range(description.layers or checkpoint.layers, checkpoint.layers)]
    shapes = {
        f"model.{name}": torch.empty(parameter.shape, dtype=dtype, device="meta")
        for name, parameter in decoder.named_parameters()
        if not name.startswith(tuple(beyond))
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
    dropped = ("auto_map", "torch_dtype", "start_layer", "layer_sep", "layer_wise")
    kept = {key: value for key, value in checkpoint.settings.items() if key not in dropped}
    config = kept | {"dtype": str(dtype).removeprefix("torch.")} | dict(settings)
    save_tokenizer(tokenizer, folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    description.write(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")  # makes the folder a model
