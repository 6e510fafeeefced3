"""The weights of a decoder, read one by one, with the updates of LoRA adapters merged in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .adapters import Adapter, canonical
from .tensors import TensorFiles

#: Rows of a weight that are merged at a time: in fp32, they fit a CPU's cache.
ROWS = 256


def merged(
    weight: Tensor, updates: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Return a copy of a weight on a device, with low-rank updates added in fp32, in order.

    Args:
        weight: the weight in its stored dtype, ``[outputs, inputs]``.
        updates: each update's fp32 factors, ``[rank, inputs]`` and ``[outputs, rank]``.
        dtype: the dtype of the copy.
        device: the device of the copy; None for the weight's own.
    """
    if weight.dtype == torch.float64:  # rounded here, because some devices have no fp64
        weight = weight.float()
    weight = weight.to(device=device)
    updates = [(down.to(weight.device), up.to(weight.device)) for down, up in updates]
    result = torch.empty_like(weight, dtype=dtype)
    buffer = torch.empty_like(weight[:ROWS], dtype=torch.float32)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, min(start + ROWS, len(weight)))
        block = buffer[: rows.stop - start].copy_(weight[rows])
        for down, up in updates:
            block.addmm_(up[rows], down)
        result[rows] = block
    return result


class MergedWeights:
    """Reads the weights of a decoder by their names in the headless decoder, with LoRA adapters merged in.

    Iterating gives the names of all tensors in the model's own files.

    Args:
        folder: the folder of the model's files.
        argument: the caller's argument and its value, for messages.
    """

    def __init__(self, folder: Path, argument: str) -> None:
        self.folder = folder
        self.argument = argument
        #: The adapters, in the order in which they are merged.
        self.adapters: Sequence[Adapter] = ()

    @cached_property
    def files(self) -> TensorFiles:
        """The weight files; opening them reads no weight."""
        return TensorFiles(self.folder, "model", self.argument)

    @cached_property
    def _names(self) -> dict[str, str]:
        """The tensors' names in the files, by their names in the headless decoder."""
        names: dict[str, str] = {}
        for name in self.files:
            if (same := names.setdefault(canonical(name), name)) != name:
                raise ValueError(f"{self.argument}: the checkpoint has both {same!r} and {name!r}; expected one.")
        return names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the files or adapters hold these weights.

        Args:
            shapes: their shapes, by their names in the headless decoder.
        """
        for name, wanted in shapes.items():
            if self._replacing_adapter(name) is not None:
                continue
            if name not in self:
                raise ValueError(f"{self.argument}: the checkpoint has no tensor {name!r}.")
            if (shape := self.files.shape(self._names[name])) != wanted:
                raise ValueError(
                    f"{self.argument}: tensor {name!r} is {list(shape)}, its config.json asks for {list(wanted)}."
                )

    def tensor(self, name: str) -> Tensor:
        """Read a weight: fp32 if an adapter updates it, else in its stored dtype.

        Raises:
            ValueError: the checkpoint has no such tensor, or its dtype is not allowed for weights.
        """
        return self.merge_updates(name.removesuffix(".weight"), self._stored(name))

    def place(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Read a weight as a copy on a device: like :meth:`tensor`, but without a larger copy in between."""
        module, stored = name.removesuffix(".weight"), self._stored(name)
        if updates := self._updates(module):
            return merged(stored, updates, dtype, device)
        return stored.to(device=device, dtype=dtype, copy=True)

    def merge_updates(self, module: str, weight: Tensor) -> Tensor:
        """Return a weight of a module with the updates of all adapters added; the weight itself without any."""
        updates = self._updates(module)
        return merged(weight, updates, torch.float32) if updates else weight

    def read_stored(self, name: str) -> Tensor:
        """Read a tensor from the model's own files, without the adapters."""
        return self.files.read(self._names[name])

    def _stored(self, name: str) -> Tensor:
        """Read a weight without updates, perhaps from the adapter that replaces it as a whole."""
        if (adapter := self._replacing_adapter(name)) is not None:
            return adapter.read_whole(name)
        if name not in self:
            raise ValueError(f"{self.argument}: the checkpoint has no tensor {name!r}.")
        return self.read_stored(name)

    def _replacing_adapter(self, name: str) -> Adapter | None:
        """Return the adapter that replaces a weight as a whole; None if there is none."""
        return next((adapter for adapter in self.adapters if name in adapter.whole), None)

    def _updates(self, module: str) -> list[tuple[Tensor, Tensor]]:
        """Return the factors of a module's updates by all adapters, in order."""
        return [adapter.factors(module) for adapter in self.adapters if module in adapter.modules]
