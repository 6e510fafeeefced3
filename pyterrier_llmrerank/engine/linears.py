"""Linear layers on a CPU, with their weights in oneDNN's own layout.

oneDNN multiplies by blocks of a weight, and torch keeps weights row by row: each call of torch's linear layers has to
rearrange the weight first, or uses a slower kernel. Here a weight is rearranged once, when it is loaded. oneDNN then
also applies an activation to the product, or multiplies or adds another tensor, while the product is in the cache.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .devices import has_bf16
from .elementwise import silu_times


class PackedLinear(nn.Linear):
    """Applies a linear layer whose weight oneDNN has packed.

    It is loaded with a plain weight, and :meth:`pack` has to be called before its first use. A row's result does not
    depend on the number of rows, unless that is 1.
    """

    def pack(self) -> None:
        """Rearrange the weight, unless it is packed already; drops the plain weight."""
        if not self.weight.is_mkldnn:
            reorder: Any = torch.ops.mkldnn._reorder_linear_weight
            self.weight = nn.Parameter(reorder(self.weight.detach(), None), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        """Multiply states, ``[.., inputs]``, by the weight; return ``[.., outputs]``."""
        return product(states, self.weight, self.bias)

    def silu(self, states: Tensor) -> Tensor:
        """Compute ``silu(self(states))``."""
        operator: Any = torch.ops.mkldnn._linear_pointwise
        return cast(Tensor, operator(states, self.weight, self.bias, "swish", [], ""))

    def times(self, states: Tensor, factor: Tensor) -> Tensor:
        """Compute ``self(states) * factor``."""
        return self._combined(states, factor, "mul")

    def plus(self, states: Tensor, term: Tensor) -> Tensor:
        """Compute ``self(states) + term``."""
        return self._combined(states, term, "add")

    def _combined(self, states: Tensor, other: Tensor, operation: str) -> Tensor:
        operator: Any = torch.ops.mkldnn._linear_pointwise.binary
        return cast(Tensor, operator(states, other, self.weight, self.bias, operation))


def product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a linear layer with a weight that may be packed."""
    if not weight.is_mkldnn:
        return linear(states, weight, bias)
    operator: Any = torch.ops.mkldnn._linear_pointwise
    return cast(Tensor, operator(states, weight, bias, "none", [], ""))


def _operations(states: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Count the operations of a packed product, for torch's ``FlopCounterMode``."""
    return 2 * math.prod(states) * out_shape[-1]


if (
    hasattr(torch.ops.mkldnn, "_linear_pointwise")  # builds for some platforms have no oneDNN
    and torch.ops.mkldnn._linear_pointwise not in flop_registry
):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_operations)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether packed weights are faster on a device in a dtype: on x86, in fp32 and in native bf16."""
    is_x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (is_x86 and has_onednn):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16(device))


def replace_linears(module: nn.Module) -> None:
    """Replace all linear layers of a module on the meta device by layers that can be packed, in place."""
    for name, part in list(module.named_modules()):
        if type(part) is nn.Linear:
            bias = part.bias is not None
            module.set_submodule(name, PackedLinear(part.in_features, part.out_features, bias, device="meta"))


def pack_linears(module: nn.Module) -> None:
    """Pack the weights of a module's linear layers, in place."""
    for part in module.modules():
        if isinstance(part, PackedLinear):
            part.pack()


def linear_plus(layer: nn.Module, states: Tensor, term: Tensor) -> Tensor:
    """Compute ``layer(states) + term`` for a linear layer."""
    return layer.plus(states, term) if isinstance(layer, PackedLinear) else cast(Tensor, term + layer(states))


def mlp_plus(mlp: Any, states: Tensor, term: Tensor) -> Tensor:
    """Compute ``mlp(states) + term`` for the gated MLP of a layer."""
    gate, up = mlp.gate_proj, mlp.up_proj
    is_silu = mlp.config.hidden_act in ("silu", "swish")
    if not (isinstance(gate, PackedLinear) and isinstance(up, PackedLinear)):
        inner = silu_times(gate(states), up(states)) if is_silu else mlp.act_fn(gate(states)) * up(states)
        return linear_plus(mlp.down_proj, inner, term)
    activated = gate.silu(states) if is_silu else mlp.act_fn(gate(states))
    return linear_plus(mlp.down_proj, up.times(states, activated), term)
