"""The identity of files: whether two references mean equal files, and whether files have changed."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import bundled
from .tensors import weight_files

#: Files beside the weights and the vocabulary that a fingerprint covers.
FINGERPRINTED = (
    "config.json", "adapter_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip

#: Bytes of a sample, and about how many samples a fingerprint takes of a file.
SAMPLE, SAMPLES = 1 << 20, 64


def identity(reference: Any, model: str) -> Any:
    """Return a value that is equal for equal files: resolved paths, with the size and time of all files in them.

    Args:
        reference: a folder, file or hub id, a tuple of such values, or any other value, which is returned unchanged.
        model: the model below which an adapter may be named.
    """
    if isinstance(reference, tuple):
        return tuple(identity(part, model) for part in reference)
    if not isinstance(reference, str):
        return reference
    own = Path(bundled.base(model)).expanduser() / reference
    path = own if own.is_dir() else Path(reference).expanduser()
    if not path.exists():
        return reference
    files = _files_in(path)
    states = [(file.name, file.stat()) for file in files]
    return str(path.resolve()), tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def fingerprint(folder: Path) -> str:
    """Return a digest of the files of a model or an adapter in a folder; long files are only sampled."""
    from .tokenizer import vocabulary_of  # imports transformers, which takes seconds

    files = {folder / name for name in (*FINGERPRINTED, *(vocabulary_of(folder) or ()))}
    for stem in ("model", "adapter_model"):
        with suppress(FileNotFoundError):  # it is a model, or an adapter
            files.update(weight_files(folder, stem, str(folder))[1])
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                opened.seek(start)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()[:16]


def _files_in(path: Path) -> list[Path]:
    """Return the files in a folder, sorted, or a file itself."""
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
