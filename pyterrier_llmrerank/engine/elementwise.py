"""Compute the element-wise parts of a layer: in single passes over memory where Triton runs, else by torch."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..errors import reason

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions, without a gradient possibly in place.

    Args:
        states: ``[1, tokens, heads, width]``.
        cos: the cosine of each token's position, ``[1, tokens, width]``.
        sin: its sine, of the same shape.
    """
    fused = triton_kernels_for(states, cos, sin)
    if fused is not None:
        rotated: Tensor = fused.rotate(states, cos, sin)
        return rotated
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = states.chunk(2, dim=-1)
    half = first.shape[-1]
    rotated = states * cos
    rotated[..., :half].addcmul_(second, sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(first, sin[..., half:])
    return rotated


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """Compute ``silu(gate) * up``."""
    fused = triton_kernels_for(gate, up)
    product: Tensor = silu(gate) * up if fused is None else fused.silu_times(gate, up)
    return product


def triton_kernels_for(*tensors: Tensor) -> ModuleType | None:
    """Return :mod:`~pyterrier_llmrerank.engine.triton_kernels` if they take these tensors, else None."""
    first = tensors[0]
    if first.device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if first.dtype not in DTYPES or any(t.dtype != first.dtype or not t.is_contiguous() for t in tensors):
        return None
    return _triton_kernels(first.device)


@cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """Return the kernels if they compile on a device; Triton comes with torch on Linux, and needs a C compiler."""
    try:
        from . import triton_kernels

        ones: Any = torch.ones(1, 1, 1, 16, device=device)
        triton_kernels.silu_times(ones, ones)
    except Exception as error:
        logger.warning("Triton does not run on %s, so scoring is slower: %s", str(device), reason(error))
        return None
    return triton_kernels
