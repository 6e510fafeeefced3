"""Compute the element-wise parts of a layer: in single passes over memory where Triton runs, else by torch."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from ..errors import reason

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions; without a gradient, ``states`` may be overwritten.

    Args:
        states: ``[1, tokens, heads, width]``.
        cos: the cosine of each token's position, ``[1, tokens, width]``.
        sin: its sine, of the same shape.
    """
    fused = triton_kernels_for(states, cos, sin)
    rotated: Tensor = _rotate(states, cos, sin) if fused is None else fused.rotate(states, cos, sin)
    return rotated


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
    device, dtype = tensors[0].device, tensors[0].dtype
    if device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if dtype not in DTYPES or any(tensor.dtype != dtype or not tensor.is_contiguous() for tensor in tensors):
        return None
    return _triton_kernels(device) if device.index == torch.cuda.current_device() else None


@cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """Return the kernels if they compile on a device and give torch's results there.

    Triton comes with torch on Linux, and needs a C compiler.
    """
    try:
        from . import triton_kernels

        _check(triton_kernels, device)
    except Exception as error:
        logger.warning("Triton does not run on %s, so scoring is slower: %s", str(device), reason(error))
        return None
    return triton_kernels


def _check(kernels: Any, device: torch.device) -> None:
    """Run each kernel once, and compare its results with torch's."""
    gate, up = torch.linspace(-3, 3, 240, device=device).sin().view(2, 1, 5, 24)
    weight, heads = up[0, 0], gate.view(1, 5, 3, 8)
    cos, sin = up[..., :8].contiguous(), up[..., 8:16].contiguous()
    for got, wanted in (
        (kernels.silu_times(gate, up), silu(gate) * up),
        (kernels.normalise(gate, weight, 1e-6), rms_norm(gate, (24,), weight, 1e-6)),
        (kernels.rotate(heads.clone(), cos, sin), _rotate(heads, cos, sin)),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
