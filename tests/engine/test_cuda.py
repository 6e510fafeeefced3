"""The CUDA path without a GPU: tensors without values, on a device that need not be there.

torch's fake tensors know shape, dtype and device. They raise where an operation mixes devices or needs a value; a mode
above them raises where the host would wait for the device.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import MODELS, RECORDS, frame
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker, replicas
from pyterrier_llmrerank.checkpoints.adapters import Adapter
from pyterrier_llmrerank.checkpoints.families import FAMILIES
from pyterrier_llmrerank.checkpoints.tensors import TensorFiles
from pyterrier_llmrerank.engine import (
    attention,
    attention_kernels,
    decoder,
    devices,
    elementwise,
    fallback,
    packing,
    pending,
    pooling,
    weights,
)
from pyterrier_llmrerank.errors import ScoringError
from pyterrier_llmrerank.training import DistillTraining, RankLLaMATraining, trainer
from pyterrier_llmrerank.training.batches import Batch, Collator, Groups
from pyterrier_llmrerank.training.lora import with_lora
from pyterrier_llmrerank.training.recipes import Recipe
from pyterrier_llmrerank.training.trainer import GroupTrainer

CUDA = torch.device("cuda", 0)
FULL = str(MODELS / "costwise_full")


class Waits(AssertionError):  # noqa: N818
    """The host would wait for the device."""


def tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, also in lists; torch's tree_leaves is slow."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


@cache
def is_composite(name: str) -> bool:
    """Whether an operation is made of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


class NoWaiting(TorchDispatchMode):
    """Raises at copies that make the host wait, and at operations with an index on the wrong device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.name()
        # Inference mode hands over .to() and the like as a whole.
        if function.namespace == "aten" and is_composite(name):
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        made = function(*args, **kwargs)
        sources = [*tensors(args), *tensors(kwargs.values())]
        results = list(tensors((made,)))
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
    """A CUDA event; all events record their calls in one list."""

    asked: list[tuple[str, int]] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        assert options == {"blocking": True}  # else a waiting thread takes a core from the tokeniser
        self.number = sum(name == "made" for name, _ in self.asked)
        self.asked.append(("made", self.number))

    def record(self) -> None:
        self.asked.append(("record", self.number))

    def synchronize(self) -> None:
        self.asked.append(("wait", self.number))


class Triton:
    """In place of the kernels in Triton, operations on tensors of the same shapes; counts the calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def normalise(self, states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        self.calls["normalise"] += 1
        return states * weight

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        self.calls["rotate"] += 1
        return states.addcmul_(cos[:, :, None], sin[:, :, None])

    def silu_times(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        self.calls["silu_times"] += 1
        return gate * up


TRITON = Triton()


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
    """Fake tensors, and stand-ins for CUDA's functions. Files are read for real."""
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
    TRITON.calls.clear()
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (torch.Tensor, "pin_memory", pin_memory),
            (FakeTensor, "numpy", lambda tensor: draw.standard_normal(tuple(tensor.shape)).astype(np.float32)),
            (torch.cuda, "Event", Event),
            (torch.cuda, "synchronize", refuse),
            (torch.cuda, "device", lambda device: nullcontext()),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch.backends.cuda, "is_flash_attention_available", lambda: True),
            (elementwise, "_checked", lambda name, *_: getattr(TRITON, name)),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (devices, "resolve_devices", lambda names: (CUDA,)),
            (devices, "has_bf16", lambda device: True),
            (replicas, "shared_weights", lambda key, create: create()),  # other tests shall not find these
            (TensorFiles, "read", real(TensorFiles.read)),
            (Adapter, "_read_finite", real(Adapter._read_finite)),
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
            family, vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, **window,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODELS / "mistral_base").save_pretrained(folder)
    return made


def scored(reranker: LLMReranker, queries: int = 1) -> None:
    """Open the weights, and score queries of four passages without a wait."""
    scorer = reranker.scorer()
    model: Any = scorer.open()
    own_forward = isinstance(model, fallback.FallbackDecoder)
    layers = [model] if own_forward else model.layers[: scorer.shape.cutoffs[-1]]
    assert {tensor.device for layer in layers for tensor in layer.parameters()} == {CUDA}
    with NoWaiting():
        assert len(reranker(frame(queries, 4))) == 4 * queries


def without_values(model: torch.nn.Module, device: torch.device) -> None:
    """Put empty weights on a device in place of a model's own."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            there = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, torch.nn.Parameter(there, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def rankllama(**options: Any) -> LLMReranker:
    return RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", **options)


pooled = partial(MatroyshkaReranker, FULL, cutoff=3, compress_layers=[1], compress_ratio=2)

SHAPES: dict[str, Callable[..., LLMReranker]] = {
    "RankLLaMA": rankllama,
    "several cutoffs, pooled twice": partial(
        MatroyshkaReranker, FULL, cutoff=[2, 3], compress_layers=[1, 2], compress_ratio=4
    ),
    "cascade": partial(MatroyshkaReranker, FULL, cutoff=4, prune={2: 3, 3: 2}),
    "pooled cascade with a compensation": partial(
        pooled, prune={2: 2}, token_adapters={2: MODELS / "adapter_comp_token2"}
    ),
    "as released": partial(pooled, released=True),
    "fp32": partial(pooled, dtype="float32"),
    "eager": partial(pooled, attn_implementation="eager"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_scoring_never_waits(cuda: None, name: str) -> None:
    scored(SHAPES[name](batch_size=3))


def test_int8_weights_never_wait(cuda: None) -> None:
    pytest.importorskip("torchao")
    scored(MatroyshkaReranker(FULL, cutoff=2, quantization="int8"))


def test_no_wait_for_a_whole_call_in_one_batch(cuda: None) -> None:
    scored(pooled(), queries=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_waits(cuda: None, families: dict[str, Path], family: str) -> None:
    scored(MatroyshkaReranker(families[family], start_layer=2, compress_layers=[1], compress_ratio=2))


@pytest.fixture
def own_forward(cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LLMReranker]:
    """Make a reranker over a family that runs by its own ``forward``, opened on the CPU and placed without values.

    Of tensors with values, transformers asks whether a batch has padding, and waits once. It does not ask fake ones.
    """

    class Placed(fallback.FallbackDecoder):
        def __init__(self, checkpoint: Any, device: torch.device, dtype: torch.dtype, quantize: Any = None) -> None:
            with unset_fake_temporarily():
                super().__init__(checkpoint, torch.device("cpu"), dtype, quantize)
            without_values(self, device)

    def make(family: str) -> LLMReranker:
        with unset_fake_temporarily():
            config = AutoConfig.for_model(family, **OTHER_FAMILIES[family], vocab_size=700, pad_token_id=0)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
            AutoTokenizer.from_pretrained(MODELS / "mistral_base").save_pretrained(tmp_path)
        return MatroyshkaReranker(tmp_path, start_layer=1, cutoff=[2, 3], batch_size=3)

    monkeypatch.setattr(weights, "FallbackDecoder", Placed)
    return make


OTHER_FAMILIES: dict[str, dict[str, int]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "gemma2": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_no_family_with_its_own_forward_waits(own_forward: Callable[[str], LLMReranker], family: str) -> None:
    scored(own_forward(family))


def test_a_batch_is_waited_for_when_the_next_has_started(cuda: None) -> None:
    scored(MatroyshkaReranker(FULL, cutoff=2, batch_size=3), queries=2)
    order = [step for step in Event.asked if step[0] != "made"]
    assert order == [("record", 0), ("record", 1), ("wait", 0), ("record", 2), ("wait", 1), ("wait", 2)]


@pytest.mark.parametrize(
    ("dtype", "window", "capability", "repeated"),
    [
        ("bfloat16", None, (9, 0), False),
        ("bfloat16", None, (7, 5), True),
        ("bfloat16", 6, (9, 0), True),
        ("float32", None, (9, 0), True),
    ],
)
def test_key_heads_are_repeated_where_no_flash_kernel_runs(
    cuda: None, monkeypatch: pytest.MonkeyPatch, dtype: str, window: int | None, capability: tuple[int, int],
    repeated: bool,
) -> None:  # fmt: skip
    """Of the fused kernels on CUDA, flash alone takes grouped heads, and it takes no masks."""
    calls = []
    monkeypatch.setattr(attention_kernels, "_capability", lambda device: capability)
    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda query, key, value, **options: calls.append((key, options))
    )
    query = torch.empty(2, 8, 16, 4, device=CUDA, dtype=getattr(torch, dtype))
    with pytest.raises(AttributeError):  # the stand-in returns nothing
        attention._sdpa(query, query[:, :2], query[:, :2], None, 1.0, window, 0.0)
    [(key, options)] = calls
    assert (key.shape[1], options["enable_gqa"]) == ((8, False) if repeated else (2, True))


@pytest.mark.parametrize("name", SHAPES)
def test_attention_runs_over_the_packed_row_where_torch_has_flash(
    cuda: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not in fp32, and not while masked padding is in the sequence."""
    calls: Counter[str] = Counter()
    for module, kernel in ((attention, "packed_flash"), (attention, "_sdpa")):
        real = getattr(module, kernel)

        def counted(*arguments: Any, kernel: str = kernel, real: Callable[..., Any] = real) -> Any:
            calls[kernel] += 1
            return real(*arguments)

        monkeypatch.setattr(module, kernel, counted)
        if kernel == "packed_flash":
            monkeypatch.setattr(attention_kernels, kernel, counted)  # Layout compares them
    scored(SHAPES[name]())
    wanted = {"fp32": {"_sdpa"}, "as released": {"_sdpa", "packed_flash"}, "eager": set()}
    assert {*calls} == wanted.get(name, {"packed_flash"})


def test_element_wise_work_runs_in_triton(cuda: None) -> None:
    """In every layer, and in the norm before the head; never with another dtype than the weight's."""
    scored(MatroyshkaReranker(FULL, cutoff=3))
    assert TRITON.calls == {"normalise": 7, "rotate": 6, "silu_times": 3}
    TRITON.calls.clear()
    states = torch.empty(1, 4, 2, 8, device=CUDA, dtype=torch.bfloat16)
    table = states[:, :, 0].contiguous()
    strided = states.mT.contiguous().mT
    for given, angles in ((states, table.float()), (states.double(), table.double()), (strided, table)):
        with torch.inference_mode():
            assert elementwise.rotate(given, angles, angles).dtype == torch.promote_types(given.dtype, angles.dtype)
    elementwise.silu_times(states, states)  # with gradients
    for owner, name, value in ((torch.cuda, "current_device", 1), (torch.compiler, "is_compiling", True)):
        with torch.inference_mode(), mock.patch.object(owner, name, return_value=value):
            elementwise.silu_times(states, states)
    assert not TRITON.calls


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_deepest_layers_parts_are_compiled_if_quantised(
    cuda: None, monkeypatch: pytest.MonkeyPatch, quantization: str | None
) -> None:
    """Uncompiled, torchao's product of int8 matrices waits."""
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda called, **_: called)  # the compiler alone takes a second to import
    monkeypatch.setattr(weights, "quantization_of", lambda *options: given.append(options) or (lambda layer: None))
    reranker = MatroyshkaReranker(FULL, cutoff=2, quantization=quantization, torch_compile=True)
    model: Any = reranker.scorer().open()
    linear = [module for module in model.layers[1].modules() if isinstance(module, torch.nn.Linear)]
    compiled = {module._compiled_call_impl is not None for module in linear}
    assert compiled == {quantization is not None}
    assert given == ([("int8", CUDA, torch.bfloat16, True)] if quantization else [])


def test_cudnn_is_left_out_while_pairs_are_scored(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    during = []
    _of_kernel(lambda query: during.append(enabled()))(monkeypatch)
    before = enabled()
    pooled()(frame(1, 2))
    assert set(during) == {False}
    assert enabled() == before


# -- training


def trained(recipe: Recipe, base: Path, kind: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A model with LoRA, whose weights are on a device without values."""
    checkpoint = recipe.open(str(base))
    with unset_fake_temporarily():
        model = with_lora(checkpoint, recipe.heads(checkpoint, checkpoint.tokenizer(), 0), recipe, dtype)
    without_values(model, kind)
    return model.train()


def batch_of(recipe: Recipe, base: Path) -> Batch:
    tokenizer = recipe.open(str(base)).tokenizer()
    records = [{**record, "pos_scores": [1.0], "neg_scores": [0.5] * len(record["neg"])} for record in RECORDS]
    with unset_fake_temporarily():
        groups = Groups(records, recipe.group_size, 0, recipe.body)
        return Collator(tokenizer, recipe.inputs)([groups[0], groups[1]])


RECIPES: dict[str, Recipe] = {
    "RankLLaMA": RankLLaMATraining(group_size=3, teacher_weight=0.5, lora_rank=2),
    "Matroyshka": DistillTraining(
        group_size=3, start_layer=2, compress_layers=(1,), compress_ratios=(2,), lora_rank=2, lora_alpha=4
    ),
}


def loss_of(recipe: Recipe, model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """A micro-step's loss by the trainer's own code."""
    stand_in: Any = SimpleNamespace(
        recipe=recipe, state=SimpleNamespace(global_step=0), _batch=(0, -1), unchecked_losses=deque(),
        widths=SimpleNamespace(draw=lambda *_: ((1,), 2)), _get_learning_rate=lambda: 1e-4,
        args=SimpleNamespace(device=device, output_dir=""),
    )  # fmt: skip
    stand_in.check_losses = partial(GroupTrainer.check_losses, stand_in)
    assert batch.teacher is not None
    with unset_fake_temporarily():
        scores = np.array(batch.teacher.tolist(), dtype=np.float32)
    known: Any = SimpleNamespace(numpy=lambda: scores)  # the modes would make a tensor without values of it
    loss: torch.Tensor = GroupTrainer.compute_loss(stand_in, model, {"batch": replace(batch, teacher=known)})
    assert len(stand_in.unchecked_losses) == (device.type == "cuda")  # the last loss is not waited for
    return loss


@pytest.mark.parametrize(("name", "checkpointing"), [("RankLLaMA", False), ("Matroyshka", True)])
def test_a_training_loss_never_waits(cuda: None, families: dict[str, Path], name: str, checkpointing: bool) -> None:
    recipe = RECIPES[name]
    model = trained(recipe, families["qwen3"], CUDA, torch.bfloat16)
    if checkpointing:
        cast(Any, model).get_base_model().gradient_checkpointing_enable()
    batch = batch_of(recipe, families["qwen3"])
    with NoWaiting(), torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(recipe, model, batch, CUDA)
    assert (loss.device, loss.shape, loss.requires_grad) == (CUDA, (), True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RECIPES)
def test_gradients_need_no_values(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, family: str
) -> None:
    """Forward and backward on the meta device, where a value cannot be asked for."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="": False)  # torch does not know it for meta
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    recipe, meta = RECIPES[name], torch.device("meta")
    model = trained(recipe, families[family], meta, torch.float32)
    batch = batch_of(recipe, families[family])
    scores = model(batch.packed, (1,), 2)
    assert scores.device == meta
    size = (-1, len(batch.packed) // batch.size, batch.size)
    assert batch.teacher is not None
    loss = recipe.loss(scores.view(size), scores.detach().view(size), batch.teacher.to(meta))
    loss.backward()
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.device == meta for parameter in learns)


# -- faults that these tests are there to catch

Fault = Callable[[pytest.MonkeyPatch], None]


def _of_kernel(change: Callable[[torch.Tensor], Any]) -> Fault:
    """Let something be done with the queries in attention, by flash in scoring and by SDPA in training."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        flash, sdpa = attention.Layout.attend_packed, attention.scaled_dot_product_attention

        def faulty_flash(layout: attention.Layout, query: torch.Tensor, *rest: Any) -> torch.Tensor:
            change(query)
            return flash(layout, query, *rest)

        def faulty_sdpa(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            change(query)
            return sdpa(query, *rest, **options)

        patch.setattr(attention.Layout, "attend_packed", faulty_flash)
        patch.setattr(attention, "scaled_dot_product_attention", faulty_sdpa)

    return plant


def _of_copies(copy: Callable[[torch.Tensor, torch.device], torch.Tensor]) -> Fault:
    """Let indices be copied in another way."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        for module in (attention, decoder, fallback, packing, pooling):
            patch.setattr(module, "on_device", lambda array, device: copy(torch.from_numpy(array), device))

    return plant


MIXED = "same device|Device Propagation"  # torch 2.13's words and 2.11's

FAULTS: dict[str, tuple[str, Fault]] = {
    "a blocking copy to the device": ("blocking copy", _of_copies(lambda t, device: t.pin_memory().to(device))),
    "memory that is not pinned": ("not pinned", _of_copies(lambda t, device: t.to(device, non_blocking=True))),
    "indices that stay on the host": (MIXED, _of_copies(lambda t, device: t)),
    "a blocking copy of the scores": (
        "blocking copy",
        lambda patch: patch.setattr(pending, "to_host", lambda made: lambda: made.cpu().numpy()),
    ),
    "a value that is asked for": ("DataDependentOutput", _of_kernel(lambda query: query.max().item())),
    "a condition": ("DataDependentOutput", _of_kernel(lambda query: bool(query.isfinite().all()))),
    "a size that depends on values": ("DynamicOutputShape", _of_kernel(lambda query: query[query > 0])),
    "a tensor on another device": (MIXED, _of_kernel(lambda query: query + torch.ones(query.shape[-1]))),
    "an index on the host": ("operand on the host", _of_kernel(lambda query: query[torch.tensor([0, 0])])),
    "a wait for everything": ("synchronize", _of_kernel(lambda query: torch.cuda.synchronize())),
    "a mask on the host": (
        "blocking copy",
        lambda patch: patch.setattr(
            attention, "causal_mask", lambda queries, *rest: attention_kernels.causal_mask(queries.cpu(), *rest)
        ),
    ),
}

if not torch.backends.cuda.is_built():  # with CUDA built in, torch copies the list before any mode sees it
    FAULTS["a list as an index"] = ("blocking copy", _of_kernel(lambda query: query[[0, 0]]))


TRAINING_FAULTS: dict[str, tuple[str, Fault]] = {
    "a teacher that is copied late": (
        "blocking copy",
        lambda patch: patch.setattr(trainer, "on_device", lambda array, device: torch.from_numpy(array).to(device)),
    ),
    "a loss that is waited for": (
        "DataDependentOutput|_local_scalar_dense",
        lambda patch: patch.setattr(trainer, "to_host", lambda loss: torch.isfinite(loss).item()),
    ),
    "a mask on the host": (
        "blocking copy",
        lambda patch: patch.setattr(attention, "on_device", lambda array, device: torch.from_numpy(array).to(device)),
    ),
}


@pytest.mark.parametrize("name", TRAINING_FAULTS)
def test_a_fault_planted_in_training_is_caught(
    cuda: None, families: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    said, plant = TRAINING_FAULTS[name]
    recipe = RECIPES["RankLLaMA"]
    model = trained(recipe, families["llama"], CUDA, torch.bfloat16)
    batch = batch_of(recipe, families["llama"])
    plant(monkeypatch)
    with pytest.raises(Exception, match=said), NoWaiting(), torch.autocast("cuda", torch.bfloat16):
        loss_of(recipe, model, batch, CUDA)


@pytest.mark.parametrize(
    "name", ["a blocking copy to the device", "memory that is not pinned", "indices that stay on the host"]
)
def test_a_fault_planted_below_a_models_own_forward_is_caught(
    own_forward: Callable[[str], LLMReranker], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    said, plant = FAULTS[name]
    reranker = own_forward("gpt2")
    reranker.scorer().open()
    plant(monkeypatch)
    with pytest.raises(ScoringError, match=said), NoWaiting():
        reranker(frame(1, 4))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(cuda: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    said, plant = FAULTS[name]
    reranker = pooled(cutoff=2, batch_size=3)
    reranker.scorer().open()
    plant(monkeypatch)
    with pytest.raises(ScoringError, match=said), NoWaiting():
        reranker(frame(2, 4))
