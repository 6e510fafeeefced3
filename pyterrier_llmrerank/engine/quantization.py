"""Quantise linear layers to eight bits with torchao."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def quantization_of(
    name: str, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> Callable[[nn.Module], None]:
    """Return a function that quantises a module's linear layers in place.

    Activations are quantised too if kernels for that make a layer faster: int8 on CUDA in compiled layers and, in fp32,
    on the CPU; float8 on CUDA from capability 8.9 on, in bf16. In all other cases only weights are quantised, and
    are unpacked for each product. (Uncompiled, torchao's product of int8 matrices makes the host wait for the GPU.)
    Each token and each row of a weight has its own scale, so a token's result does not depend on its batch.

    Args:
        name: ``"int8"`` or ``"float8"``.
        device: the device of the module.
        dtype: the dtype of its weights.
        compiled: whether the layers are compiled.

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
    # set_inductor_config=False: torchao would change compiler settings of the whole process.
    if name == "int8" and ((on_cuda and compiled) or (device.type == "cpu" and dtype == torch.float32)):
        narrow = should_reduce_range(device)
        config = ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=narrow)
    elif name == "int8":
        config = ao.Int8WeightOnlyConfig(set_inductor_config=False)
    elif on_cuda and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 9):
        config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)
    else:
        config = ao.Float8WeightOnlyConfig(set_inductor_config=False)
    return lambda module: ao.quantize_(module, config)
