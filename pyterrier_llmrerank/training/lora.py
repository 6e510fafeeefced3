"""LoRA layers that touch each activation once: PEFT's own, in fewer passes over memory."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


class _LowRankUpdate(Function):
    r""":math:`x W^T + s\,(x A^T) B^T` in the dtype of :math:`W`, for a :math:`W` that does not learn.

    PEFT casts the input to the adapter's dtype and back, and scales and adds the update in passes of their own
    over the whole output. Here both products add into one result, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        small_down, small_up = down.to(weight.dtype), up.to(weight.dtype)
        low = rows @ small_down.t()
        output = (rows @ weight.t()).addmm_(low, small_up.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, small_down, small_up, low)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, down.dtype)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> Any:
        rows, weight, down, up, low = ctx.saved_tensors  # type: ignore[attr-defined]
        scale, shape, (input_dtype, adapter_dtype) = ctx.scale, ctx.shape, ctx.dtypes  # type: ignore[attr-defined]
        gradient = gradients[0].reshape(-1, weight.shape[0]).to(weight.dtype)
        through_up = gradient @ up
        of_input = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            of_input = (gradient @ weight).addmm_(through_up, down, alpha=scale).view(shape).to(input_dtype)
        of_down = (through_up.t() @ rows).to(adapter_dtype).mul_(scale)
        of_up = (gradient.t() @ low).to(adapter_dtype).mul_(scale)
        return of_input, None, of_down, of_up, None


class LowRankLinear(lora.Linear):
    """PEFT's LoRA layer with one product for base and update, where nothing out of the ordinary is asked of it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: the base layer's output and the update's."""
        base = self.get_base_layer()
        kind = x.device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._adapter_dtype()
        plain = (
            list(self.active_adapters) == ["default"]
            and not (self.disable_adapters or self.merged or self.lora_variant or args or kwargs)
            and base.bias is None
            and base.weight.dtype == computed
            and not base.weight.requires_grad
            and not hasattr(base.weight, "ds_id")  # DeepSpeed's stage 3 gathers a weight in its own layer's forward
            and not (self.training and self.lora_dropout["default"].__class__ is torch.nn.Dropout)
        )
        if not plain:
            return super().forward(x, *args, **kwargs)
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        update: Any = _LowRankUpdate.apply(x, base.weight, down, up, self.scaling["default"])  # type: ignore[no-untyped-call]
        return cast(Tensor, update)

    def _adapter_dtype(self) -> torch.dtype:
        return cast(torch.dtype, next(iter(self.lora_A.values())).weight.dtype)
