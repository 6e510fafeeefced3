"""GGUF files, converted once to folders that open like any other."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyterrier as pt
from filelock import FileLock

from ..errors import reason, short
from .families import FAMILIES
from .json_files import refuse_pointer
from .tensors import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def dequantise(file: Path, argument: str = "model") -> Path:
    """Convert a GGUF file to a folder of fp32 safetensors, which is kept in PyTerrier's home.

    Equal files are converted once, whatever their names: each environment may have the same model. Of several processes
    that ask for a model, one converts it while the others wait.

    Raises:
        ImportError: the ``gguf`` package is missing.
        ValueError: the file cannot be read as a decoder of a known family, or it changed while it was read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{argument}={str(file)!r}: reading a GGUF file needs the gguf package: pip install gguf")
    file = file.resolve()
    refuse_pointer(file)
    home = Path(pt.io.pyterrier_home()) / "llmrerank"
    state = _state(file)
    folder = home / f"gguf-{_digest(file, state)}"
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / "gguf.lock"):
        if folder.is_dir():  # another process has converted it
            return folder
        with tempfile.TemporaryDirectory(dir=home) as temporary:
            ready = Path(temporary) / "model"
            _convert(file, ready, argument)
            if _state(file) != state:
                raise ValueError(f"{argument}={str(file)!r} changed while it was read; try again when it is complete.")
            try:
                os.replace(ready, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock; without one where the file system has none, or where another user's file cannot be opened."""
    lock = FileLock(path)
    with suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _state(file: Path) -> tuple[int, int, int]:
    """Return the inode, size and time of modification of a file, of which one changes with its contents."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@cache
def _digest(file: Path, state: tuple[int, int, int]) -> str:
    """Return a digest of a file's contents; a file in the same state is read once."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _convert(file: Path, folder: Path, argument: str) -> None:
    """Write the tokenizer, configuration and fp32 weights of a GGUF file into a new folder."""
    try:
        tokenizer, model = _read_gguf(file)
    except Exception as error:  # a broken or hostile file makes its readers raise anything
        raise ValueError(
            f"{argument}={str(file)!r}: cannot be read as a GGUF language model: {reason(error)}"
        ) from error
    from .tokenizer import save_tokenizer  # transformers takes seconds to import

    save_tokenizer(tokenizer, folder)
    if hasattr(model.config, "quantization_config"):  # the weights written here are not quantised
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    save_tensors(dict(model.named_parameters()), folder / "model.safetensors")  # a tied head is listed once


def _read_gguf(file: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Read the tokenizer and the fp32 model, after checking that the file holds as many weights as it describes."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import (
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    from .config import check_sizes  # imports transformers, which takes seconds

    content: dict[str, Any] = load_gguf_checkpoint(file)  # type: ignore[no-untyped-call]
    check_sizes(content["config"], {}, str(file))
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    wanted = sum(weight.numel() for weight in model.parameters())
    tensors = GGUFReader(file).tensors
    if wanted > (held := sum(int(tensor.n_elements) for tensor in tensors)):
        raise ValueError(f"it describes a model of {wanted} weights and holds {held}")
    if config.model_type in FAMILIES:  # transformers splits and joins tensors of other families
        known = get_gguf_hf_weights_map(model, TensorProcessor())  # type: ignore[no-untyped-call]
        if unknown := sorted(tensor.name for tensor in tensors if tensor.name not in known):
            raise ValueError(f"it has a tensor {short(unknown[0])}, which no model_type {config.model_type!r} has")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    opened: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    model, loading = opened
    if loading["missing_keys"]:
        raise ValueError(f"it has no tensor for {min(loading['missing_keys'])!r}")
    return tokenizer, model
