"""All attention kernels give the same as SDPA; a kernel that cannot run raises an error before scoring starts."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, frame
from test_decoder import CONFIGS, models, pairs
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.engine import attention_kernels, device_scorer
from pyterrier_llmrerank.engine.decoder import decode, embedded, run_layers
from pyterrier_llmrerank.engine.packing import PackedPairs

FULL = str(MODELS / "costwise_full")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLASH = "flash_attention_2"


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use FlexAttention's uncompiled reference, so that no test waits for a compiler."""
    monkeypatch.setattr(attention_kernels, "_compiled_flex", lambda: flex_attention)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Replace FlashAttention by a function with its signature and output layout; return the windows it gets."""
    windows: list[int | None] = []

    def stand_in(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
        dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, **options: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        assert (module.config._attn_implementation, module.is_causal, attention_mask) == (FLASH, True, None)
        assert (dropout, options) == (0, {})
        windows.append(sliding_window)
        position = torch.arange(query.shape[2], device=query.device)
        distance = position[:, None] - position
        seen = (distance >= 0) & (distance < (sliding_window or len(distance)))
        out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, FLASH, stand_in)
    monkeypatch.setattr(attention_kernels, "check_flash", lambda *_: None)
    return windows


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Give torch's FlashAttention over sequences of any length a CPU kernel; return the queries that it gets."""
    asked: list[int] = []

    def stand_in(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor,
        most_queries: int, most_keys: int, dropout: float, is_causal: bool, return_mask: bool, *,
        scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        assert (dropout, is_causal, return_mask, window_size_right) == (0.0, True, False, 0)
        assert queries.dtype == keys.dtype == torch.int32
        assert (int(queries.diff().max()), int(keys.diff().max())) == (most_queries, most_keys)
        assert (len(query), len(key)) == (queries[-1], keys[-1])
        asked.append(len(query))
        parts = []
        for number in range(len(queries) - 1):
            q, k, v = (
                states[ends[number] : ends[number + 1]].transpose(0, 1)[None]
                for states, ends in ((query, queries), (key, keys), (value, keys))
            )
            last = torch.arange(k.shape[2])[-q.shape[2] :] if q.shape[2] else torch.arange(0)  # the last positions
            distance = last[:, None] - torch.arange(k.shape[2])
            most = k.shape[2] if window_size_left is None else window_size_left
            seen = (distance >= 0) & (distance <= most)
            out = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        none = torch.empty(0)
        return torch.cat(parts), none, none, none, none

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", stand_in, "CPU")
    yield asked
    library._destroy()


@pytest.mark.parametrize("family", CONFIGS)
@torch.inference_mode()
def test_attention_over_the_packed_row_equals_sdpa(packed: list[int], family: str) -> None:
    ours, _ = models(family)
    kernel: Any = attention_kernels.packed_flash
    for pooled in ({}, {"compress_layers": {1, 3}, "compress_ratio": 2}):
        row = PackedPairs(pairs())
        wanted = decode(ours, row, [2, 4], **pooled)
        got, _ = run_layers(ours, embedded(ours, row), [2, 4], kernel=kernel, **pooled)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    assert len(packed) == 6
    assert packed[0] == len(PackedPairs(pairs()).ids)  # nothing is padded, and a prefix is asked for once


def test_scores_over_the_packed_row_with_known_prefixes_and_cascades(
    packed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"prune": {3: 3}, "compress_layers": 2, "compress_ratio": 2, "dtype": "float32", "device": "cpu"}
    wanted = MatroyshkaReranker(FULL, **shape)(frame(2, 5))["score"]
    usual = {name: shape[name] for name in shape if name != "prune"}
    released = MatroyshkaReranker(FULL, released=True, cutoff=4, **usual)
    padded = released(frame(2, 5))["score"]
    monkeypatch.setattr(device_scorer, "kernel_of", lambda *_: attention_kernels.packed_flash)
    cascade = MatroyshkaReranker(FULL, batch_size=2, **shape)
    np.testing.assert_allclose(cascade(frame(2, 5))["score"], wanted, atol=1e-4)
    assert packed
    assert cascade.usage.padding == 0
    packed.clear()
    np.testing.assert_allclose(released(frame(2, 5))["score"], padded, atol=1e-4)
    assert len(packed) == 1  # the layer after the pooling; masked keys are left to SDPA


def test_flash_over_the_packed_row_is_the_usual_kernel_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    of = partial(attention_kernels.kernel_of, None)
    assert [of(CUDA, dtype, 64) for dtype in (torch.bfloat16, torch.float16)] == [attention_kernels.packed_flash] * 2
    assert [of(CUDA, torch.float32, 64), of(CPU, torch.bfloat16, 64)] == [None, None]
    assert [of(CUDA, torch.bfloat16, width) for width in (63, 264)] == [None, None]
    assert attention_kernels.kernel_of("sdpa", CUDA, torch.bfloat16, 64) is None
    torch.backends.cuda.enable_flash_sdp(False)  # torch's own switch
    assert of(CUDA, torch.bfloat16, 64) is None
    torch.backends.cuda.enable_flash_sdp(True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert of(CUDA, torch.bfloat16, 64) is None
    monkeypatch.setattr(attention_kernels, "_capability", lambda device: (7, 5))
    assert of(CUDA, torch.bfloat16, 64) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with FlashAttention")
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 5])
@torch.inference_mode()
def test_torchs_flash_over_the_packed_row_equals_plain_products(width: int, window: int | None) -> None:
    """With grouped heads, fewer queries than keys, and sequences without queries."""
    generator = torch.Generator().manual_seed(width)
    queries, keys = [7, 0, 3, 40], [7, 5, 30, 40]
    query, key, value = (
        torch.randn(sum(counts), heads, width, generator=generator)
        for counts, heads in ((queries, 4), (keys, 2), (keys, 2))
    )
    starts = [torch.tensor([0, *counts]).cumsum(0).int().cuda() for counts in (queries, keys)]
    given = [states.cuda().bfloat16() for states in (query, key, value)]
    got = attention_kernels.packed_flash(*given, (starts[0], starts[1]), (40, 40), width**-0.5, window)
    wanted = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        whole = torch.cat([q.new_zeros(len(k) - len(q), 4, width), q])
        mixed = attention_kernels.eager(*(x.transpose(0, 1)[None] for x in (whole, k, v)), width**-0.5, window)
        wanted.append(mixed[0].transpose(0, 1)[len(k) - len(q) :])
    torch.testing.assert_close(got.float().cpu(), torch.cat(wanted), atol=0.03, rtol=0.03)


def test_cudnn_is_left_out_until_the_last_call_is_over() -> None:
    """And then it is as the user had it."""
    cudnn = torch.backends.cuda.cudnn_sdp_enabled
    for before in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(before)
        first, second = attention_kernels.without_cudnn(), attention_kernels.without_cudnn()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not cudnn()
        second.__exit__(None, None, None)
        assert cudnn() == before
        with pytest.raises(KeyError), attention_kernels.without_cudnn():
            raise KeyError
        assert cudnn() == before
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("name", ["eager", "flex_attention", FLASH])
@pytest.mark.parametrize("family", CONFIGS)
@torch.inference_mode()
def test_all_kernels_equal_sdpa(flash: list[int | None], family: str, name: str) -> None:
    ours, _ = models(family)
    calls = []
    kernel = attention_kernels.kernel_of(name, CPU, torch.float32, 8)

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return kernel(*arguments)

    for pooled in ({}, {"compress_layers": {1, 3}, "compress_ratio": 2}):
        wanted = decode(ours, PackedPairs(pairs()), [2, 4], **pooled)
        got, _ = run_layers(ours, embedded(ours, PackedPairs(pairs())), [2, 4], kernel=counted, **pooled)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    assert len(calls) == 6  # four layers twice, without the deepest, which calls no kernel
    if name == FLASH:
        windowed = family in ("mistral, window", "qwen2, window")
        assert set(flash) - {None} == ({5} if windowed else set())


@pytest.mark.parametrize("name", ["eager", "flex_attention", FLASH, "sdpa"])
def test_scores_do_not_depend_on_the_kernel(flash: list[int | None], name: str) -> None:
    for make in (
        lambda **options: MatroyshkaReranker(
            FULL, cutoff=[4, 8], compress_layers=3, compress_ratio=2, dtype="float32", **options
        ),
        lambda **options: RankLLaMAReranker(
            MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32", **options
        ),
    ):
        usual, other = make(), make(attn_implementation=name)
        wanted, got = (reranker(frame(2, 4))["score"].to_numpy() for reranker in (usual, other))
        np.testing.assert_allclose(got, wanted, atol=1e-4)
        assert name != "sdpa" or np.array_equal(got, wanted)
        assert usual.scorer().weights[0] is other.scorer().weights[0]
    assert bool(flash) == (name == FLASH)


def test_padding_is_masked_by_sdpa(flash: list[int | None]) -> None:
    """Before the first pooling, the released code's padding is part of the sequence."""
    shape = {"compress_layers": 3, "compress_ratio": 2, "released": True, "dtype": "float32"}
    wanted = MatroyshkaReranker(FULL, **shape)(frame())["score"]
    got = MatroyshkaReranker(FULL, attn_implementation=FLASH, **shape)(frame())["score"]
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert len(flash) == 4  # layers 3 to 6 of 0 to 7


def test_flash_attention_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in attention_kernels.FLASH:
        reranker = MatroyshkaReranker(FULL, attn_implementation=name, device="cpu")
        with pytest.raises(
            ValueError, match=f"attn_implementation='{name}' cannot be used on cpu; allowed there: sdpa"
        ):
            reranker(frame())
        cuda = torch.device("cuda")
        with pytest.raises(ValueError, match=f"'{name}' cannot be used in torch.float32; allowed: bfloat16, float16"):
            attention_kernels.kernel_of(name, cuda, torch.float32, 8)
        with pytest.raises(ImportError, match=f"attn_implementation='{name}' needs the package flash-attn"):
            attention_kernels.kernel_of(name, cuda, torch.bfloat16, 8)
    monkeypatch.setitem(attention_kernels.FLASH, FLASH, (lambda: True, "flash-attn"))
    assert isinstance(attention_kernels.kernel_of(FLASH, cuda, torch.bfloat16, 8), attention_kernels.Flash)


def test_flex_attention_that_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' cannot be used on mps"):
        attention_kernels.kernel_of("flex_attention", torch.device("mps"), torch.float32, 8)


def test_transformers_flash_function_accepts_the_call() -> None:
    """It fails only because the package is missing."""
    states = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    with pytest.raises(ImportError, match="flash_attn|kernels|flash_attention_2"):
        attention_kernels.Flash(FLASH)(states, states, states, 1.0, None)


def test_eager_attention_does_not_overflow_in_fp16() -> None:
    """Products of queries and keys overflow in fp16 unless queries are scaled first."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 4, 9, 64, generator=generator) for _ in range(3))
    query, key = (40 * states.sign() + states for states in (query, key[:, :2]))
    key[:, :, 3] = query[:, ::2, 5]  # 64 * 40 * 40 is over 65504
    half = [states.half() for states in (query, key, value[:, :2])]
    got = attention_kernels.eager(*half, 1 / 8, None)
    wanted = attention_kernels.eager(*(states.float() for states in half), 1 / 8, None)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), wanted, atol=2e-2, rtol=2e-2)
