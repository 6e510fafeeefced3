"""Quantisation: linear layers in eight bits, by torchao."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def quantization_of(name: str, device: torch.device, dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """What quantises a module's linear layers in place.

    Activations are quantised too where there are kernels that gain by it: to int8 on CUDA, and on a CPU in fp32; to
    float8 on CUDA from capability 8.9 on, in bf16. Elsewhere weights alone are, and are unpacked for each product. Each
    token and each row of a weight has its own scale, so that a token's result does not depend on the batch.

    Args:
        name: ``"int8"`` or ``"float8"``.
        device: where the module is.
        dtype: of its weights.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao import quantization as ao
        from torchao.utils import should_reduce_range
    except ImportError as error:
        raise ImportError(
            f"quantization={name!r} needs torchao: pip install 'pyterrier-llmrerank[quantization]'"
        ) from error
    config: Any
    on_cuda = device.type == "cuda"
    # Torchao's recommended settings for the compiler are the process's own: leave them alone.
    if name == "int8" and (on_cuda or (device.type == "cpu" and dtype == torch.float32)):
        narrow = should_reduce_range(device)
        config = ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=narrow)
    elif name == "int8":
        config = ao.Int8WeightOnlyConfig(set_inductor_config=False)
    elif on_cuda and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 9):
        config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)
    else:
        config = ao.Float8WeightOnlyConfig(set_inductor_config=False)
    return lambda module: ao.quantize_(module, config)
