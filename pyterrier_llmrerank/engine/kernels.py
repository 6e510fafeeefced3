"""Choose the kernel that computes attention, by transformers' names."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

#: Flash kernels: whether the package is there, and its name.
FLASH = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
}

#: Causal attention over one sequence per pair: query, key, value, scaling and window to output. Query and output are
#: ``[pairs, heads, length, width]``; key and value may have fewer heads. A position sees itself and those before it, at
#: most ``window`` in all.
Kernel = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]


def kernel_of(name: str | None, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return the kernel of this name, or None for SDPA.

    SDPA has no kernel here: :func:`~pyterrier_llmrerank.engine.attention.attention` calls it itself.

    Raises:
        ValueError: the kernel does not run on the device or in the dtype.
        ImportError: its package is not installed.
    """
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
    """FlashAttention, called through transformers.

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
    """Return which keys each query sees.

    Args:
        queries: their positions, ``[1 or pairs, n]``.
        length: how many keys there are.
        real_keys: which of them are real, ``[pairs, length]``; None for all.
        window: most keys that a query sees, itself included; None for all before it.

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
