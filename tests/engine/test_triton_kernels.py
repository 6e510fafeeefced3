"""The kernels in Triton: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from conftest import DEVICE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention_kernels import CONFIGS, models, pairs
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pyterrier_llmrerank.engine import elementwise, norms
from pyterrier_llmrerank.engine.decoder import decode
from pyterrier_llmrerank.engine.packing import PackedPairs

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
few = partial(settings, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("pyterrier_llmrerank.engine.triton_kernels")


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """A result differs from the one in double precision by a rounding in its dtype, and by roundings in fp32."""
    step = torch.finfo(got.dtype).eps
    if got.dtype != torch.bfloat16 or got.device.type == "cuda":  # else Triton's interpreter cuts off the last bits
        step /= 2
    torch.testing.assert_close(got.double(), exact, rtol=step + 2e-6, atol=2e-6)


@given(DTYPES, st.integers(1, 5), st.integers(1, 200))
@few()
def test_states_are_normalised(kernels: ModuleType, dtype: torch.dtype, rows: int, width: int) -> None:
    states, weight = drawn(dtype, 1, rows, width), drawn(dtype, width)
    wide = states.double()
    exact = weight.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert_rounded_once(kernels.normalise(states, weight, 1e-5), exact)


@given(DTYPES, st.integers(1, 5), st.integers(1, 9), st.integers(1, 40))
@few()
def test_heads_are_rotated_in_place(
    kernels: ModuleType, dtype: torch.dtype, tokens: int, heads: int, half: int
) -> None:
    states = drawn(dtype, 1, tokens, heads, 2 * half)
    cos, sin = drawn(dtype, 1, tokens, 2 * half), drawn(dtype, 1, 2 * half, tokens).mT.contiguous()
    first, second = states.double().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    exact = states.double() * cos.double()[:, :, None] + turned * sin.double()[:, :, None]
    assert kernels.rotate(states, cos, sin) is states
    assert_rounded_once(states, exact)


@given(DTYPES, st.integers(1, 3000))
@few()
def test_a_gate_is_applied(kernels: ModuleType, dtype: torch.dtype, size: int) -> None:
    gate, up = drawn(dtype, 1, size), drawn(dtype, 1, size + 1)[:, 1:].contiguous()
    assert_rounded_once(kernels.silu_times(gate, up), silu(gate.double()) * up.double())


#: Last dimensions of the states of each kernel, as in a 7B and narrower.
SHAPES = {"normalise": [(4096,), (7,)], "rotate": [(32, 128), (3, 6)], "silu_times": [(14336,), (5,)]}


@pytest.mark.parametrize("name", SHAPES)
def test_a_kernel_is_used_only_where_its_results_are_torchs(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Whatever the process's dtype; and memory that has run out says nothing about it."""
    monkeypatch.setattr(elementwise, "_triton_kernels", lambda: kernels)
    checked, real = elementwise._checked.__wrapped__, getattr(kernels, name)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for dtype in elementwise.DTYPES:
            for shape in map(torch.Size, SHAPES[name]):
                monkeypatch.setattr(kernels, name, real)
                assert checked(name, DEVICE, dtype, shape) is real
                monkeypatch.setattr(kernels, name, lambda *arguments: real(*arguments) * 1.02)
                assert checked(name, DEVICE, dtype, shape) is None
    finally:
        torch.set_default_dtype(torch.float32)
    message = f"the kernel {name} in Triton is not used on {DEVICE}, so scoring is slower: "
    assert [record.getMessage().startswith(message) for record in caplog.records] == [True] * 6

    def out_of_memory(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, name, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        checked(name, DEVICE, torch.float32, torch.Size(SHAPES[name][0]))


def test_the_gradient_of_a_norm_is_the_same_with_them(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = norms.RMSNorm(LlamaRMSNorm(48).requires_grad_(False).to(DEVICE))
    norm.weight.copy_(drawn(torch.float32, 48))
    gradients, outputs, called = [], [], []
    for kernel in (None, kernels.normalise):
        monkeypatch.setattr(norms, "triton_kernel", lambda *_, kernel=kernel: called.append(kernel) or kernel)
        states = drawn(torch.float32, 1, 5, 48).requires_grad_()
        outputs.append(norm(states))
        (outputs[-1] * drawn(torch.float32, 1, 5, 48)).square().sum().backward()
        gradients.append(states.grad)
    assert called == [None, kernels.normalise]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from pyterrier_llmrerank.engine import triton_kernels

options = {"enable_fp_fusion": True}
for name in ("_normalise", "_rotate", "_silu_times"):
    kernel = getattr(triton_kernels, name)
    for dtype in ("fp32", "bf16", "fp16"):
        kinds, constants = {}, {}
        for parameter in kernel.params:
            numbers = {"eps": "fp32", **dict.fromkeys(("width", "heads", "half", "size"), "i32")}
            kinds[parameter.name] = "constexpr" if parameter.is_constexpr else numbers.get(parameter.name, f"*{dtype}")
            if parameter.is_constexpr:
                constants[parameter.name] = 64
        for capability in (75, 80, 90, 100):
            target = GPUTarget("cuda", capability, 32)
            assert compile(ASTSource(kernel, kinds, constants), target=target, options=options).asm["cubin"]
print("compiled")
"""


def test_kernels_compile_for_gpus() -> None:
    """Without one, and outside of the interpreter: its language is larger than the compiler's."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.stdout == "compiled\n", done.stderr


@pytest.mark.parametrize("family", CONFIGS)
@torch.inference_mode()
def test_a_decoder_gives_the_same_with_them(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    ours, _ = models(family)
    shape = {"compress_layers": {1}, "compress_ratio": 2}
    wanted = decode(ours, PackedPairs(pairs()), [2, 3], **shape)
    called: list[str] = []

    def counted(name: str) -> Callable[..., Tensor]:
        def call(*arguments: object) -> Tensor:
            called.append(name)
            result: Tensor = getattr(kernels, name)(*arguments)
            return result

        return call

    for module in (elementwise, norms):
        monkeypatch.setattr(module, "triton_kernel", lambda name, *_: counted(name))
    got = decode(ours, PackedPairs(pairs()), [2, 3], **shape)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (called.count("rotate"), called.count("silu_times")) == (6, 3)
