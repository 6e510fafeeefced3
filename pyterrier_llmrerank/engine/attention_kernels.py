"""Choose the kernel that computes attention, by transformers' names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

#: Flash kernels: a function that tells whether the package is installed, and the name of the package.
FLASH = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
}

#: Causal attention over one sequence per pair: query, key, value, scaling and window to output. Query and output are
#: ``[pairs, heads, length, width]``; key and value may have fewer heads. A position sees itself and earlier ones, at
#: most ``window`` in all.
Kernel = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]


def kernel_of(name: str | None, device: torch.device, dtype: torch.dtype, width: int) -> Kernel | None:
    """Return the kernel of this name, or None for SDPA.

    SDPA has no kernel here: :func:`~pyterrier_llmrerank.engine.attention.attention` calls it itself.

    Args:
        name: an ``attn_implementation``; None for :func:`packed_flash` where torch has it, else SDPA.
        device: the device of the hidden states.
        dtype: their dtype.
        width: the width of a head.

    Raises:
        ValueError: the kernel does not run on the device or in the dtype.
        ImportError: its package is not installed.
    """
    if name is None and _has_packed_flash(device, dtype, width):
        return cast(Kernel, packed_flash)  # Layout knows it
    if name in (None, "sdpa"):
        return None
    if name == "eager":
        return eager
    if name == "flex_attention":
        if device.type not in ("cuda", "cpu"):
            raise ValueError(f"attn_implementation={name!r} cannot be used on {device}; allowed there: sdpa, eager.")
        return flex
    assert name is not None
    check_flash(name, device, dtype)
    return Flash(name)


def check_flash(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise the errors of :func:`kernel_of` if a flash kernel cannot run."""
    is_available, package = FLASH[name]
    if device.type != "cuda":
        raise ValueError(
            f"attn_implementation={name!r} cannot be used on {device}; allowed there: sdpa, eager, flex_attention."
        )
    if dtype == torch.float32:
        raise ValueError(f"attn_implementation={name!r} cannot be used in {dtype}; allowed: bfloat16, float16.")
    if not is_available():
        raise ImportError(f"attn_implementation={name!r} needs the package {package}: pip install {package}")


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has FlashAttention for a CUDA device and a dtype; it takes no masks."""
    return dtype in (torch.bfloat16, torch.float16) and _capability(device) >= (8, 0)


def _has_packed_flash(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether :func:`packed_flash` runs on a device, in a dtype and for heads of a width."""
    return (
        device.type == "cuda"
        and width % 8 == 0
        and width <= 256
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        and has_flash(device, dtype)
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


_scoring = 0  # how many calls have cuDNN's attention turned off
_cudnn_before = True
_scoring_lock = threading.Lock()


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Let SDPA choose among all kernels but cuDNN's, in the whole process, until the last overlapping call is over.

    On Hopper and later GPUs, torch prefers cuDNN's kernel, which plans for tens of milliseconds whenever it meets a
    shape for the first time. Nearly every batch of pairs has a shape of its own. All threads share the setting.
    """
    global _scoring, _cudnn_before
    with _scoring_lock:
        if not _scoring:
            _cudnn_before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            torch.backends.cuda.enable_cudnn_sdp(False)
        _scoring += 1
    try:
        yield
    finally:
        with _scoring_lock:
            _scoring -= 1
            if not _scoring:
                torch.backends.cuda.enable_cudnn_sdp(_cudnn_before)


def packed_flash(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int],
    scaling: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Compute causal attention of sequences that lie one after another, with torch's FlashAttention.

    A sequence may have fewer queries than keys: they belong to its last positions. So neither queries nor outputs have
    to be gathered, and nothing is padded.

    Args:
        query: ``[queries, heads, width]``.
        key: ``[keys, key heads, width]``.
        value: of the shape of ``key``.
        starts: the start of each sequence among the queries and among the keys, and the end; int32
            ``[sequences + 1]``.
        longest: the most queries and the most keys in a sequence.
        scaling: factor of the logits.
        window: the most keys that a query sees; None for all before it.

    Returns:
        The output, ``[queries, heads, width]``.
    """
    # torch.nn.attention.varlen calls this operator too, but its signature changes from release to release.
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, *starts, *longest, 0.0, True, False,
        scale=scaling, window_size_left=None if window is None else window - 1, window_size_right=0,
    )[0]  # fmt: skip
    return output


def eager(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Compute attention in plain torch, with the full matrix of weights."""
    position = torch.arange(key.shape[2], device=key.device)
    scaled = query * scaling  # before the product, which may overflow in fp16
    grouped: Tensor = scaled.unflatten(1, (key.shape[1], -1))  # type: ignore[no-untyped-call]
    logits = grouped @ key[:, :, None].mT
    hidden = ~causal_mask(position[None], key.shape[2], None, window)[:, :, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    output: Tensor = weights.to(value.dtype) @ value[:, :, None]
    return output.flatten(1, 2)


def flex(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Compute attention with torch's FlexAttention, which skips blocks without visible keys."""
    blocks = _block_mask(key.shape[2], window, key.device)
    output: Tensor = _compiled_flex()(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=True)
    return output


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)  # uncompiled, it holds the full matrix


@lru_cache(maxsize=8)  # all layers of a batch need the same
def _block_mask(length: int, window: int | None, device: torch.device) -> BlockMask:
    def sees(pair: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) if window is None else (query >= key) & (query - key < window)

    return create_block_mask(sees, None, None, length, length, device=str(device))


class Flash:
    """Calls FlashAttention through transformers.

    Args:
        name: a key of :data:`FLASH`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        #: Stands in for the calling module, which would name our own attention.
        self._caller: Any = SimpleNamespace(is_causal=True, config=SimpleNamespace(_attn_implementation=name))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """Compute attention as a :data:`Kernel`."""
        function: Any = ALL_ATTENTION_FUNCTIONS[self.name]
        output: Tensor = function(self._caller, query, key, value, None, scaling=scaling, sliding_window=window)[0]
        return output.transpose(1, 2)


def causal_mask(queries: Tensor, length: int, real_keys: Tensor | None, window: int | None) -> Tensor:
    """Return a mask of the keys that each query sees.

    Args:
        queries: the positions of the queries, ``[1 or pairs, n]``.
        length: the number of keys.
        real_keys: a mask of the keys that are real, ``[pairs, length]``; None for all.
        window: the most keys that a query sees, itself included; None for all before it.

    Returns:
        Booleans, ``[1 or pairs, 1, n, length]``.
    """
    distance = queries[..., None] - torch.arange(length, device=queries.device)
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    if real_keys is not None:
        seen = seen & real_keys[:, None]
    return seen[:, None]
