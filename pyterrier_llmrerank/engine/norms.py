"""Normalise states in few passes over memory, for scoring and training."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function


class RMSNorm(nn.Module):
    """Compute the same as a decoder's norm, with less work, also for the gradient while its weight is frozen.

    Args:
        norm: the norm; its weight is shared.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, norm.weight)
        self.eps = cast(float, norm.variance_epsilon)

    def forward(self, states: Tensor) -> Tensor:
        """Scale states to a root mean square of 1 over their last dimension, then by the weight."""
        if self.weight.requires_grad or hasattr(self.weight, "ds_id"):  # which DeepSpeed's stage 3 gathers for autograd
            wide = states.float()
            scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return self.weight * scaled.to(states.dtype)
        return cast(Tensor, _Normalise.apply(states, self.weight, self.eps))  # type: ignore[no-untyped-call]


class _Normalise(Function):
    """Normalise with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = states.float()
        if states.device.type == "cpu":  # one pass, row by row, where the mean of squares takes two
            mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1])
        else:
            mean = wide.square().mean(-1, keepdim=True)
        scale = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(states, weight, scale)
        normed = wide * scale if states.dtype == torch.float32 else wide.mul_(scale).to(states.dtype)
        return normed.mul_(weight) if weight.dtype == normed.dtype else weight * normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        states, weight, scale = ctx.saved_tensors
        normed = states.float() * scale
        through = (gradients[0] * weight).float()
        through = through.sub_(normed * (normed * through).mean(-1, keepdim=True)).mul_(scale)
        return through.to(states.dtype), None, None


def replace_norms(decoder: nn.Module) -> None:
    """Replace all norms of a decoder of :data:`~pyterrier_llmrerank.checkpoints.families.FAMILIES`, in place."""
    for name, module in list(decoder.named_modules()):
        if hasattr(module, "variance_epsilon"):
            decoder.set_submodule(name, RMSNorm(module))
