"""Normalise states in few passes over memory, for scoring and training."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import rms_norm

from .elementwise import triton_kernel


class RMSNorm(nn.Module):
    """Computes a decoder's norm with less work and, while the weight is frozen, its gradient too.

    Args:
        norm: the norm to replace; its weight is shared.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, norm.weight)
        self.eps = cast(float, norm.variance_epsilon)

    def forward(self, states: Tensor) -> Tensor:
        """Scale states to a root mean square of 1 over their last dimension, then by the weight."""
        if self.weight.requires_grad or hasattr(self.weight, "ds_id"):  # DeepSpeed gathers it for autograd
            wide = states.float()
            scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return self.weight * scaled.to(states.dtype)
        return cast(Tensor, _Normalise.apply(states, self.weight, self.eps))  # type: ignore[no-untyped-call]


class _Normalise(Function):
    """Normalises with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps, scale = eps, None
        kernel = triton_kernel("normalise", states, weight)
        if kernel is not None:
            ctx.save_for_backward(states, weight, scale)
            return kernel(states, weight, eps)
        if states.device.type == "cpu" and states.dtype != torch.float32:  # the mean of squares takes two passes
            wide = states.float()
            mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1])
            scale = mean.add_(eps).rsqrt_()
            normed = wide.mul_(scale).to(states.dtype)
        else:
            normed = rms_norm(states, states.shape[-1:], None, eps).to(states.dtype)  # autocast widens it
        ctx.save_for_backward(states, weight, scale)
        return normed.mul_(weight) if weight.dtype == normed.dtype else weight * normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        states, weight, scale = ctx.saved_tensors
        wide = states.float()
        if scale is None:
            scale = wide.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
        normed = wide * scale
        through = (gradients[0] * weight).float()
        through = through.sub_(normed * (normed * through).mean(-1, keepdim=True)).mul_(scale)
        return through.to(states.dtype), None, None


def replace_norms(decoder: nn.Module) -> None:
    """Replace all norms of a decoder of :data:`~pyterrier_llmrerank.checkpoints.families.FAMILIES`, in place."""
    for name, module in list(decoder.named_modules()):
        if hasattr(module, "variance_epsilon"):
            decoder.set_submodule(name, RMSNorm(module))
