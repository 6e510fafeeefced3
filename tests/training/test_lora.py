"""Our LoRA layer gives what PEFT's gives, outputs and gradients, and saves under the same names."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pyterrier_llmrerank.training.lora import LowRankLinear


class Projection(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 40, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def both(dropout: float = 0.0, bias: bool = False, dtype: torch.dtype = torch.float32) -> tuple[PeftModel, PeftModel]:
    """PEFT's own and ours, with the same weights, none of them zero."""
    models = []
    for custom in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["proj"])
        if custom:
            config._register_custom_module({nn.Linear: LowRankLinear})
        model = get_peft_model(Projection(bias).to(dtype), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        models.append(model.train())
    return models[0], models[1]


def run(model: PeftModel, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    output = model(x)
    (output.float() * torch.arange(output.numel()).view(output.shape).sin()).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2
    return {"output": output.detach(), "input": x.grad, **gradients}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_outputs_and_gradients_are_pefts(batch: int, length: int, bias: bool) -> None:
    theirs, ours = both(bias=bias)  # with a bias it is PEFT's
    x = torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(batch))
    wanted = run(theirs, x)
    for name, got in run(ours, x).items():
        torch.testing.assert_close(got, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_dropout_is_pefts() -> None:
    theirs, ours = both(dropout=0.5)
    x = torch.randn(3, 5, 24)
    wanted = run(theirs, x)
    for name, got in run(ours, x).items():
        torch.testing.assert_close(got, wanted[name], msg=name)
    assert not torch.equal(wanted["output"], theirs.eval()(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_near_to_full_as_pefts(autocast: bool) -> None:
    exact, _ = both()
    theirs, ours = both(dtype=torch.bfloat16)
    x = torch.randn(4, 6, 24)
    wanted = run(exact, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = run(ours, x.bfloat16())
        peers = run(theirs, x.bfloat16())
    for name, value in got.items():
        assert value.dtype == peers[name].dtype
        error, allowed = ((v.float() - wanted[name]).norm() for v in (value, peers[name]))
        assert error < 1.5 * allowed + 1e-3


def test_layers_run_under_checkpointing_and_can_be_disabled() -> None:
    theirs, ours = both()
    x = torch.randn(2, 3, 24, requires_grad=True)
    output = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    torch.testing.assert_close(output, theirs(x))
    output.sum().backward()
    with ours.disable_adapter():
        torch.testing.assert_close(ours(x), ours.base_model.model.proj.base_layer(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())
