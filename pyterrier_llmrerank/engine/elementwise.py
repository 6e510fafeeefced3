"""Compute the element-wise parts of a layer: in single passes over memory where Triton runs, else by torch."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from ..errors import reason

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: A kernel of :mod:`~pyterrier_llmrerank.engine.triton_kernels`.
Kernel = Callable[..., Tensor]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions; without a gradient, ``states`` may be overwritten.

    Args:
        states: ``[1, tokens, heads, width]``.
        cos: the cosine of each token's position, ``[1, tokens, width]``.
        sin: its sine, of the same shape.
    """
    kernel = triton_kernel("rotate", states, cos, sin)
    return _rotate(states, cos, sin) if kernel is None else kernel(states, cos, sin)


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
    kernel = triton_kernel("silu_times", gate, up)
    return silu(gate) * up if kernel is None else kernel(gate, up)


def triton_kernel(name: str, *tensors: Tensor) -> Kernel | None:
    """Return a kernel of :mod:`~pyterrier_llmrerank.engine.triton_kernels` if it takes these tensors, else None.

    At its first use on a device, in a dtype and at a size, it is compared with torch.
    """
    first = tensors[0]
    device, dtype = first.device, first.dtype
    if device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if dtype not in DTYPES or any(tensor.dtype != dtype or not tensor.is_contiguous() for tensor in tensors):
        return None
    if device.index != torch.cuda.current_device():
        return None
    with _lock:
        return _checked(name, device, dtype, first.shape[-2:] if name == "rotate" else first.shape[-1:])


_lock = threading.Lock()  # devices run in threads, and one check is enough


@cache
def _checked(name: str, device: torch.device, dtype: torch.dtype, shape: torch.Size) -> Kernel | None:
    """Return a kernel if it compiles and gives torch's results, for states of these last dimensions."""
    module = _triton_kernels()
    if module is None:
        return None
    kernel: Kernel = getattr(module, name)
    try:
        _check(name, kernel, device, dtype, shape)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        message = "the kernel %s in Triton is not used on %s, so scoring is slower: %s"
        logger.warning(message, name, str(device), reason(error))
        return None
    return kernel


@cache
def _triton_kernels() -> ModuleType | None:
    """Import the kernels. Triton comes with torch on Linux, and needs a C compiler."""
    try:
        from . import triton_kernels
    except ImportError as error:
        logger.warning("Triton cannot be imported, so scoring is slower: %s", reason(error))
        return None
    return triton_kernels


def _check(name: str, kernel: Kernel, device: torch.device, dtype: torch.dtype, shape: torch.Size) -> None:
    """Compare a kernel's results with those of torch in double precision; raise AssertionError if they differ."""
    size = (1, 5, *shape)
    values = torch.linspace(-9, 9, 2 * math.prod(size), device=device, dtype=torch.float64).sin().to(dtype)
    first, second = values.view(2, *size)
    wide, other = first.double(), second.double()
    if name == "rotate":
        cos, sin = second[:, :, 0].contiguous(), second[:, :, -1].contiguous()
        got, wanted = kernel(first.clone(), cos, sin), _rotate(wide, cos.double(), sin.double())
    elif name == "normalise":
        got, wanted = kernel(first, second[0, 0], 1e-6), rms_norm(wide, shape, other[0, 0], 1e-6)
    else:
        got, wanted = kernel(first, second), silu(wide) * other
    torch.testing.assert_close(got.double(), wanted, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-5)
