"""Kernels in Triton for the element-wise work of a layer on a GPU, each a single pass over memory.

They work in fp32 and round once. A kernel's tensors are contiguous, on the current device, and of one dtype:
:mod:`~pyterrier_llmrerank.engine.elementwise` sees to that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
#: Products and sums may be fused. Releases of Triton differ in the default.
FUSED = {"enable_fp_fusion": True}


def normalise(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale states to a root mean square of 1 over their last dimension, then by ``weight``, ``[width]``."""
    width = states.shape[-1]
    normed = torch.empty_like(states)
    warps = 8 if width > 2 * BLOCK else 4
    block = triton.next_power_of_2(width)
    _normalise[(states.numel() // width,)](states, weight, normed, eps, width, BLOCK=block, num_warps=warps, **FUSED)
    return normed


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their token's position, in place.

    Args:
        states: ``[1, tokens, heads, width]``.
        cos: the cosine of each token's position, ``[1, tokens, width]``.
        sin: its sine, of the same shape.
    """
    _, tokens, heads, width = states.shape
    half = width // 2
    blocks = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
    _rotate[(tokens,)](states, cos, sin, heads, half, **blocks, **FUSED)
    return states


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """Compute ``silu(gate) * up`` of two tensors of one shape."""
    product = torch.empty_like(gate)
    _silu_times[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, product, gate.numel(), BLOCK=BLOCK, **FUSED)
    return product


# The kernels. Triton reads annotations, too: it knows its own alone.


@triton.jit
def _normalise(states, weight, normed, eps, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Normalise a row in each program. A row's place may exceed 32 bits."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    wide = tl.load(states + place, inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    factor = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    tl.store(normed + place, wide * scale * factor, inside)


@triton.jit
def _rotate(states, cos, sin, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Rotate a token's heads in each program."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    first = states + (token * heads + head) * 2 * half + column
    second = first + half
    left = tl.load(first, inside).to(tl.float32)
    right = tl.load(second, inside).to(tl.float32)
    place = token * 2 * half + column
    known = column < half
    cos_left = tl.load(cos + place, known).to(tl.float32)
    sin_left = tl.load(sin + place, known).to(tl.float32)
    cos_right = tl.load(cos + place + half, known).to(tl.float32)
    sin_right = tl.load(sin + place + half, known).to(tl.float32)
    tl.store(first, left * cos_left - right * sin_left, inside)
    tl.store(second, right * cos_right + left * sin_right, inside)


@triton.jit
def _silu_times(gate, up, product, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Multiply a block of elements in each program."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    wide = tl.load(gate + place, inside).to(tl.float32)
    tl.store(product + place, wide * tl.sigmoid(wide) * tl.load(up + place, inside).to(tl.float32), inside)
