"""Tensors: the weights in safetensors and ``.bin`` files, by name, each read on demand.

Nothing in the files is executed: torch's restricted unpickler reads ``.bin`` files.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..errors import reason, short
from .json_files import read_json, refuse_pointer

if TYPE_CHECKING:
    from torch import Tensor

#: The dtypes in which weights may be stored, as torch prints them.
STORED_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; names the file.
    """
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # its own exception for a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def weight_files(folder: Path, stem: str, argument: str) -> tuple[str, list[Path]]:
    """Find the weight files to read in a folder: a complete set of one format, safetensors first.

    Args:
        folder: the folder.
        stem: ``model`` or ``adapter_model``, the start of their names.
        argument: the caller's argument and value, for messages.

    Returns:
        The format, ``safetensors`` or ``bin``, and the paths.

    Raises:
        FileNotFoundError: the folder has no weights, or an index names a missing file.
        ValueError: an index is broken.
    """
    bin_stem = "pytorch_model" if stem == "model" else stem
    incomplete: FileNotFoundError | None = None
    for form, name in (("safetensors", f"{stem}.safetensors"), ("bin", f"{bin_stem}.bin")):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return form, [folder / name]
        if not index.is_file():
            continue
        paths = [folder / file for file in sorted(set(_weight_map(index).values()))]
        if not (missing := [path for path in paths if not path.is_file()]):
            return form, paths
        # The other format may be complete.
        incomplete = incomplete or FileNotFoundError(f"{argument}: {index} names {missing[0].name}, which is missing.")
    raise incomplete or FileNotFoundError(
        f"{argument}: no weights in {folder}; expected {stem}.safetensors, {bin_stem}.bin or their index. "
        "(The copy of a hub model may be incomplete if it was made offline.)"
    )


class TensorFiles:
    """Reads the tensors of a checkpoint by name, each on demand, from one file or several.

    Args:
        folder: the folder of the files.
        stem: ``model`` or ``adapter_model``, the start of their names.
        argument: the caller's argument and value, for messages.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: a file is broken, or not in the format that its name says.
    """

    def __init__(self, folder: Path, stem: str, argument: str) -> None:
        self.argument = argument
        # An adapter has many small tensors, and opening its file takes longer than reading one: it stays open.
        # A model's file would stay mapped, and count as memory in use.
        self._open = cache(_open_safetensors) if stem == "adapter_model" else _open_safetensors
        form, paths = weight_files(folder, stem, argument)
        #: Whether the files are safetensors, rather than torch's own format.
        self.safetensors = form == "safetensors"
        self._where: dict[str, Path | dict[str, Tensor]] = {}
        self._mapped: dict[Path, dict[str, Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            source: Path | dict[str, Tensor] = path
            if path.suffix == ".safetensors":
                content = self._open(path)
            else:
                content, mapped = _load_bin(path)
                source = path if mapped else content  # kept: reading the file again would take long
            for name, shape in _shapes(content).items():
                if name in self._where:
                    raise ValueError(f"{argument}: tensor {short(name)} is in {path} and in another file too.")
                self._where[name], self._shapes[name] = source, shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading the tensor."""
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype. It may be a view of the file, which then stays mapped.

        Raises:
            ValueError: its dtype is none of :data:`STORED_DTYPES`.
        """
        source = self._where[name]
        if not isinstance(source, Path):
            tensor = source[name]
        elif self.safetensors:
            tensor = self._open(source).get_tensor(name)
        else:
            if (content := self._mapped.get(source)) is None:
                content = self._mapped[source] = _load_bin(source)[0]
            tensor = content[name]
        if str(tensor.dtype) not in STORED_DTYPES:
            raise ValueError(
                f"{self.argument}: tensor {short(name)} is {tensor.dtype}; allowed: {', '.join(STORED_DTYPES)}."
            )
        return tensor

    def release(self) -> None:
        """Unmap ``.bin`` files, which count as memory in use while they are mapped; the next read maps them again."""
        self._mapped.clear()


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file and len(file) < 256 for file in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map must name files of this folder.")
    return weight_map


def _shapes(source: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in a dict of tensors or an open safetensors file, by name."""
    if isinstance(source, dict):
        return {name: tuple(tensor.shape) for name, tensor in source.items()}
    return {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118


def _open_safetensors(path: Path) -> Any:
    try:
        refuse_pointer(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {reason(error)}") from error


def _load_bin(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return a file's tensors, and whether they are mapped rather than read."""
    import torch

    refuse_pointer(path)
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            records = _record_bytes(path)
        except RuntimeError:  # files older than torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
            records = None
    except Exception as error:  # a broken or hostile file makes the unpickler raise anything
        raise ValueError(f"{path}: refused, it is not a plain file of tensors: {_unpicklers_reason(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(n, str) and _is_plain(t) for n, t in content.items()):
        raise ValueError(f"{path}: refused, it is not a plain file of tensors.")
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in content.values())}
    if records is not None and sum(storages.values()) > records:  # else a tensor would extend into the next record
        raise ValueError(f"{path}: refused, its records are shorter than the tensors that it describes.")
    return content, records is not None


def _unpicklers_reason(error: Exception) -> str:
    """Return torch's reason for refusing a file, without its advice on how to open the file anyway."""
    said = reason(error, 10_000)
    if "weights_only" in said:
        said = said.partition("WeightsUnpickler error: ")[2].strip().partition("\n")[0].partition(" Please ")[0]
    return said[:300] or "it cannot be unpickled"


def _record_bytes(path: Path) -> int:
    """Count the bytes of tensor data in a file of torch's zip format."""
    with zipfile.ZipFile(path) as records:
        return sum(record.compress_size for record in records.infolist() if "/data/" in record.filename)


def _is_plain(tensor: object) -> bool:
    """Tell whether an object is a dense tensor in memory, with storage for its whole shape."""
    import torch

    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )
