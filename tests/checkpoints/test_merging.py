"""Weights have the updates of adapters merged in as one addition in fp32 would merge them."""

from typing import Any

import pytest
import torch
from conftest import MODELS, heads
from torch.utils._python_dispatch import TorchDispatchMode

from pyterrier_llmrerank.checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
from pyterrier_llmrerank.checkpoints.merging import ROWS, merged

RAW, SD = (str(MODELS / name) for name in ("mistral_base", "adapter_sd"))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outputs", [1, 160, 192, 576, 1536, 2 * ROWS + 8])
def test_merging_in_blocks_gives_the_bits_of_merging_at_once(outputs: int, stored: torch.dtype) -> None:
    weight = torch.randn(outputs, 96).to(stored)
    updates = [(torch.randn(rank, 96), torch.randn(outputs, rank)) for rank in (16, 3)]
    whole, before = weight.float(), weight.clone()
    for down, up in updates:
        whole = torch.addmm(whole, up, down)
    for dtype in (torch.float32, torch.bfloat16):
        got = merged(weight, updates, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, whole.to(dtype))
    assert torch.equal(weight, before)


def test_adapters_are_merged_in_fp32_in_order() -> None:
    both = MatroyshkaCheckpoint(RAW, [SD, str(MODELS / "adapter_comp_layer")], 2)
    plain = MatroyshkaCheckpoint(RAW, [], 2)
    module = "layers.3.mlp.down_proj"
    wanted = plain.tensor(f"{module}.weight").clone()
    for adapter in both.adapters:
        down, up = adapter.factors(module)
        wanted.addmm_(up, down)
    assert torch.equal(both.tensor(f"{module}.weight"), wanted)
    assert torch.equal(both.place(f"{module}.weight", torch.device("cpu"), torch.bfloat16), wanted.bfloat16())
    assert both.tensor(f"{module}.weight").dtype == torch.float32
    head = "lm_head.6.linear_head"
    row = heads(plain)[6:7].clone()
    for adapter in both.adapters:
        down, up = adapter.factors(head)
        row.addmm_(up, down)
    torch.testing.assert_close(heads(both)[6:7], row)


class NoDoubles(TorchDispatchMode):
    """Raise TypeError where a tensor is to be fp64 on the device ``meta``, as Apple's devices do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "meta" and result.dtype == torch.float64:
            raise TypeError("no fp64 on this device")
        return result


def test_a_weight_in_fp64_is_rounded_before_it_reaches_a_device() -> None:
    weight, updates = torch.randn(6, 4, dtype=torch.float64), [(torch.randn(2, 4), torch.randn(6, 2))]
    assert torch.equal(merged(weight, updates, torch.float32), merged(weight.float(), updates, torch.float32))
    with NoDoubles():
        with pytest.raises(TypeError, match="no fp64"):
            weight.to("meta")
        assert merged(weight, updates, torch.bfloat16, torch.device("meta")).dtype == torch.bfloat16
