"""The CUDA path without a GPU: tensors without values, on a device that need not be there.

torch's fake tensors know shape, dtype and device. They raise where an operation mixes devices or needs a value; a mode
above them raises where the host would wait for the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import MODELS, frame
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.adapters import Adapter
from pyterrier_llmrerank.checkpoints.families import FAMILIES
from pyterrier_llmrerank.checkpoints.tensors import TensorFiles
from pyterrier_llmrerank.engine import attention, decoder, devices, kernels, packing, pooling, scoring, weights
from pyterrier_llmrerank.errors import ScoringError

CUDA = torch.device("cuda", 0)
FULL = str(MODELS / "costwise_full")


class Waits(AssertionError):  # noqa: N818
    """The host would wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Raises at copies that make the host wait, and at operations with an index on the wrong device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name()
        composite = partial(torch._C._dispatch_has_kernel_for_dispatch_key, name, "CompositeImplicitAutograd")
        if function.namespace == "aten" and composite():  # inference mode hands over .to() and the like as a whole
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        made = function(*args, **kwargs)
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        if {tensor.device.type for tensor in [*sources, *results]} == {"cpu", "cuda"}:
            if name in ("aten::_to_copy", "aten::copy_"):
                asynchronous = kwargs.get("non_blocking") or args[2:3] == (True,)
                if not asynchronous:
                    raise Waits(f"{name} is a blocking copy")
                if results[0].device.type == "cuda" and not getattr(sources[-1], "pinned", False):
                    raise Waits(f"{name} copies memory that is not pinned")
            elif any(tensor.dim() for tensor in sources if tensor.device.type == "cpu"):
                raise Waits(f"{name} has an operand on the host")
        return made


class Event:
    """A CUDA event; keeps a record of what was asked of all events."""

    asked: list[tuple[str, int]] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        assert options == {"blocking": True}  # else a waiting thread takes a core from the tokeniser
        self.number = sum(name == "made" for name, _ in self.asked)
        self.asked.append(("made", self.number))

    def record(self) -> None:
        self.asked.append(("record", self.number))

    def synchronize(self) -> None:
        self.asked.append(("wait", self.number))


@pytest.fixture(scope="module")
def device_guard() -> Iterator[None]:
    """Let torch switch to a CUDA device. FakeTensorMode sees to it only in wheels with CUDA built in."""
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # in c10::DeviceType; meta's guard does nothing
    registry[cuda] = registry[meta]
    yield
    registry[cuda] = None


@pytest.fixture
def cuda(device_guard: None) -> Iterator[None]:
    """Fake tensors, and whatever a reranker asks of CUDA. Files are read for real."""
    draw = np.random.default_rng(0)

    def real(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with unset_fake_temporarily():
                return method(*args)

        return call

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.clone() if isinstance(tensor, FakeTensor) else torch.from_numpy(tensor.numpy().copy())
        pinned.pinned = True  # type: ignore[attr-defined]
        return pinned

    def refuse(*_: Any) -> None:
        raise Waits("torch.cuda.synchronize")

    Event.asked.clear()
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (torch.Tensor, "pin_memory", pin_memory),
            (FakeTensor, "numpy", lambda tensor: draw.standard_normal(tuple(tensor.shape)).astype(np.float32)),
            (torch.cuda, "Event", Event),
            (torch.cuda, "synchronize", refuse),
            (torch.cuda, "device", lambda device: nullcontext()),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (devices, "resolve_devices", lambda names: (CUDA,)),
            (devices, "_has_bf16", lambda device: True),
            (weights, "shared_weights", lambda key, create: create()),  # other tests shall not find these
            (TensorFiles, "read", real(TensorFiles.read)),
            (Adapter, "_finite", real(Adapter._finite)),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each family, whose deeper layers have a sliding window where the family has windows."""
    made = {}
    for family in FAMILIES:
        made[family] = folder = tmp_path_factory.mktemp(family)
        window = {} if family == "llama" else {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}
        config = AutoConfig.for_model(
            family, vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, **window,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODELS / "mistral_base").save_pretrained(folder)
    return made


def scored(reranker: LLMReranker) -> None:
    """Open the weights, and score two queries of four passages without a wait."""
    scorer = reranker.scorer()
    model: Any = scorer.open()
    places = {tensor.device for layer in model.layers[: scorer.shape.cutoffs[-1]] for tensor in layer.parameters()}
    assert places == {CUDA}
    with NoWaiting():
        assert len(reranker(frame(2, 4))) == 8


def rankllama(**options: Any) -> LLMReranker:
    return RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", **options)


pooled = partial(MatroyshkaReranker, FULL, cutoff=4, compress_layers=[2], compress_ratio=2)

SHAPES: dict[str, Callable[..., LLMReranker]] = {
    "RankLLaMA": rankllama,
    "several cutoffs": partial(MatroyshkaReranker, FULL, cutoff=[2, 4]),
    "pooled twice": partial(MatroyshkaReranker, FULL, cutoff=4, compress_layers=[1, 3], compress_ratio=4),
    "cascade": partial(MatroyshkaReranker, FULL, cutoff=5, prune={2: 3, 4: 2}),
    "pooled cascade": partial(pooled, prune={3: 2}),
    "with a compensation": partial(pooled, token_adapters={2: MODELS / "adapter_comp_token2"}),
    "as released": partial(pooled, released=True),
    "fp32": partial(pooled, dtype="float32"),
    "eager": partial(pooled, attn_implementation="eager"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_scoring_never_waits(cuda: None, name: str) -> None:
    scored(SHAPES[name](batch_size=3))


def test_no_wait_for_a_whole_call_in_one_batch(cuda: None) -> None:
    scored(pooled())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_waits(cuda: None, families: dict[str, Path], family: str) -> None:
    scored(MatroyshkaReranker(families[family], start_layer=2, compress_layers=[2], compress_ratio=2, batch_size=4))


def test_a_batch_is_waited_for_when_the_next_has_started(cuda: None) -> None:
    scored(rankllama(batch_size=3))
    order = [step for step in Event.asked if step[0] != "made"]
    assert order == [("record", 0), ("record", 1), ("wait", 0), ("record", 2), ("wait", 1), ("wait", 2)]


# -- faults that these tests are there to catch

Fault = Callable[[pytest.MonkeyPatch], None]


def _of_kernel(change: Callable[[torch.Tensor], Any]) -> Fault:
    """Let something be done with the queries in attention."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        sound = attention._sdpa

        def faulty(query: torch.Tensor, *rest: Any) -> torch.Tensor:
            change(query)
            return sound(query, *rest)

        patch.setattr(attention, "_sdpa", faulty)

    return plant


def _of_copies(copy: Callable[[torch.Tensor, torch.device], torch.Tensor]) -> Fault:
    """Let indices be copied in another way."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        for module in (attention, decoder, packing, pooling):
            patch.setattr(module, "on_device", lambda array, device: copy(torch.from_numpy(array), device))

    return plant


MIXED = "same device|Device Propagation"  # torch 2.13's words and 2.11's

FAULTS: dict[str, tuple[str, Fault]] = {
    "a blocking copy to the device": ("blocking copy", _of_copies(lambda t, device: t.pin_memory().to(device))),
    "memory that is not pinned": ("not pinned", _of_copies(lambda t, device: t.to(device, non_blocking=True))),
    "indices that stay on the host": (MIXED, _of_copies(lambda t, device: t)),
    "a blocking copy of the scores": (
        "blocking copy",
        lambda patch: patch.setattr(scoring, "to_host", lambda made: lambda: made.cpu().numpy()),
    ),
    "a value that is asked for": ("DataDependentOutput", _of_kernel(lambda query: query.max().item())),
    "a condition": ("DataDependentOutput", _of_kernel(lambda query: bool(query.isfinite().all()))),
    "a size that depends on values": ("DynamicOutputShape", _of_kernel(lambda query: query[query > 0])),
    "a tensor on another device": (MIXED, _of_kernel(lambda query: query + torch.ones(query.shape[-1]))),
    "an index on the host": ("operand on the host", _of_kernel(lambda query: query[torch.tensor([0, 0])])),
    "a list as an index": ("blocking copy", _of_kernel(lambda query: query[[0, 0]])),
    "a wait for everything": ("synchronize", _of_kernel(lambda query: torch.cuda.synchronize())),
    "a mask on the host": (
        "blocking copy",
        lambda patch: patch.setattr(
            attention, "causal_mask", lambda queries, *rest: kernels.causal_mask(queries.cpu(), *rest)
        ),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(cuda: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    said, plant = FAULTS[name]
    reranker = pooled(batch_size=3)
    reranker.scorer().open()
    plant(monkeypatch)
    with pytest.raises(ScoringError, match=said), NoWaiting():
        reranker(frame(2, 4))
