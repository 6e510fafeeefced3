"""Rerankers share one copy of their weights, which is no deeper than they need."""

import gc
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODELS, Cache, frame, layers_in_memory
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
from pyterrier_llmrerank.engine import devices
from pyterrier_llmrerank.engine import weights as module

FULL = str(MODELS / "costwise_full")
PAIR = ("what is panda", "a bear")


def test_shapes_and_equal_rerankers_share_one_copy() -> None:
    first = MatroyshkaReranker(FULL, dtype="float32")
    first.compute_score(PAIR)
    for other in (
        first.at(cutoff=4),
        first.at(normalize=True),
        MatroyshkaReranker(FULL, dtype="float32", max_length=64),
    ):
        other.compute_score(PAIR)
        assert other.scorer().weights[0] is first.scorer().weights[0]
        assert other.scorer().weights[0].at_depth(1)[0] is first.scorer().weights[0].at_depth(1)[0]


def test_arguments_of_the_same_meaning_share_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    first = MatroyshkaReranker(FULL)
    dtype = str(first.scorer().dtype)
    monkeypatch.chdir(MODELS)
    for other in (
        MatroyshkaReranker(FULL + "/"),
        MatroyshkaReranker(FULL, device=f"{first.scorer().device.type}:0"),
        MatroyshkaReranker("costwise_full"),
        MatroyshkaReranker(FULL, device=str(first.scorer().device), dtype=dtype),
    ):
        assert other.scorer().weights[0] is first.scorer().weights[0]


def test_threads_may_share_a_reranker() -> None:
    """Eight threads that use a reranker first at the same time get one copy and one score."""
    reranker = MatroyshkaReranker(FULL, dtype="float16", max_length=77)
    scores, start = [], threading.Barrier(8)

    def work() -> None:
        start.wait()
        scores.append((reranker.at(cutoff=8).compute_score(PAIR), reranker.compute_score(PAIR)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({score for both in scores for score in both}) == 1
    assert len(scores) == 8


def test_shapes_of_a_hub_model_open_it_once(cached: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub model is opened on first use, so only the template keeps the weights that its shapes share."""
    cached.add("owner/model", MODELS / "mistral_base", "a" * 40, "main")
    opened = []
    real = MatroyshkaCheckpoint.__init__
    monkeypatch.setattr(
        MatroyshkaCheckpoint, "__init__", lambda self, *a, **named: opened.append(1) or real(self, *a, **named)
    )
    rows = frame(1, 2)
    template = MatroyshkaReranker("owner/model", start_layer=3, dtype="float16")
    for cutoff in (3, 8, 5):
        template.at(cutoff=cutoff).transform(rows)
    assert len(opened) == 1
    del template
    gc.collect()
    features = (
        MatroyshkaReranker(FULL, dtype="float16", cutoff=4) ** MatroyshkaReranker(FULL, dtype="float16")
    ).compile()
    for _ in range(3):
        features.transform(rows)
        assert len(layers_in_memory(features.rerankers[0].scorer().weights[0])) == 8
    assert len(opened) <= 2  # other tests may hold the second model


def test_overwritten_weights_are_read_again(tmp_path: Path) -> None:
    shutil.copytree(FULL, tmp_path / "model")
    before = MatroyshkaReranker(tmp_path / "model", dtype="float32")
    old = before.compute_score(PAIR)
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: -t if "linear_head" in name else t for name, t in load_file(file).items()}, file)
    assert MatroyshkaReranker(tmp_path / "model", dtype="float32").compute_score(PAIR) == pytest.approx(-old)


def compensated(model: Path = MODELS / "mistral_base", **changes: object) -> MatroyshkaReranker:
    """A distilled model with compensation adapters for depth and for a ratio of 2."""
    return MatroyshkaReranker(
        model,
        **{
            "adapters": [MODELS / "adapter_sd", MODELS / "adapter_comp_layer"],
            "token_adapters": {2: MODELS / "adapter_comp_token2"},
            "start_layer": 2, "dtype": "float32", "compress_layers": 2, **changes,
        },
    )  # fmt: skip


def test_a_token_adapter_shares_the_weights_below_it() -> None:
    plain, narrow, narrower = compensated(), compensated(compress_ratio=2), compensated(compress_ratio=4)
    merged = compensated(
        adapters=[MODELS / name for name in ("adapter_sd", "adapter_comp_layer", "adapter_comp_token2")],
        token_adapters={}, compress_ratio=2,
    )  # fmt: skip
    assert narrow.compute_score(PAIR) == pytest.approx(merged.compute_score(PAIR), abs=5e-5)  # rounding differs
    assert narrow.compute_score(PAIR) != pytest.approx(
        compensated(token_adapters={}, compress_ratio=2).compute_score(PAIR), abs=1e-3
    )
    assert narrower.scorer().weights[0] is narrow.scorer().weights[0] is not plain.scorer().weights[0]
    below, over = (dict(reranker.scorer().weights[0].at_depth(8)[0].named_parameters()) for reranker in (plain, narrow))
    assert below.keys() == over.keys()
    assert all(below[name] is over[name] for name in below)
    assert repr(narrow).endswith("adapter_comp_token2")
    assert repr(plain).endswith("adapter_comp_layer")
    assert repr(compensated(adapters=(), start_layer=None)).endswith(" over no adapter")


def test_layers_below_an_overlay_are_dropped_and_loaded_with_it(tmp_path: Path) -> None:
    own = Path(shutil.copytree(MODELS / "mistral_base", tmp_path / "own"))  # no other test uses this copy
    deep, shallow = compensated(own, compress_ratio=2), compensated(own, compress_ratio=2, cutoff=4)
    wanted, over = deep.compute_score(PAIR), deep.scorer().weights[0]
    shallow.compute_score(PAIR)
    below = compensated(own, cutoff=2)
    below.compute_score(PAIR)
    assert len(layers_in_memory(over)) == len(layers_in_memory(below.scorer().weights[0])) == 8
    del deep
    gc.collect()
    assert len(layers_in_memory(over)) == len(layers_in_memory(below.scorer().weights[0])) == 4
    assert compensated(own, compress_ratio=2).compute_score(PAIR) == pytest.approx(wanted, abs=1e-6)
    del shallow, over
    gc.collect()
    assert layers_in_memory(below.scorer().weights[0]) == [1, 2]


def test_another_shape_of_a_reranker_loads_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(shutil.copytree(MODELS / "mistral_base", tmp_path / "own"))
    reranker = compensated(own)
    reranker.compute_score(PAIR)
    filled: list[str] = []
    monkeypatch.setattr(module, "fill", lambda part, checkpoint, prefix, *_: filled.append(prefix))
    for ratio in (2, 1, 4):
        reranker.set_parameter("compress_ratio", ratio)
        reranker.compute_score(PAIR)
    assert filled == []
    below = reranker.scorer().weights[0].stack[-1]
    del reranker
    gc.collect()
    assert layers_in_memory(below) == []


def test_garbage_collection_while_a_layer_loads_does_not_deadlock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread loads a layer and collects a reranker with an overlay; another needs the layer for the overlay."""
    own = Path(shutil.copytree(MODELS / "mistral_base", tmp_path / "own"))
    kept, collected = compensated(own, compress_ratio=2), [compensated(own, compress_ratio=2)]
    over, below = kept.scorer().weights[0].stack
    assert collected[0].scorer().weights[0] is over
    lives = weakref.ref(collected[0])
    loads, wants, fill = threading.Event(), threading.Event(), module.fill

    def collecting(*arguments: object) -> None:
        if not loads.is_set():
            loads.set()
            assert wants.wait(20)
            time.sleep(0.2)  # until the other thread waits for this one
            collected.clear()
            gc.collect()
        fill(*arguments)

    def want() -> None:
        loads.wait()
        wants.set()
        over.at_depth(1)

    monkeypatch.setattr(module, "fill", collecting)
    threads = [threading.Thread(target=work, daemon=True) for work in (lambda: below.at_depth(1), want)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert lives() is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (str(MODELS), r"token_adapters='.*'; allowed: a folder for each ratio, \{2: folder, 4: folder\}"),
        ({1: "x"}, r"token_adapters=\{1: 'x'\}; allowed: .*powers of two from 2 to 64"),
        ({"2": "x"}, "token_adapters='2'; allowed"),
        ({2: ""}, "token_adapters=''; allowed: a folder"),
        ({2: "./nowhere"}, "token_adapters='./nowhere': no such model folder"),
    ],
)
def test_invalid_token_adapters_are_refused(value: object, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compensated(token_adapters=value)


def test_other_weights_are_not_shared() -> None:
    first = MatroyshkaReranker(FULL, dtype="float32")
    others = (
        MatroyshkaReranker(FULL, dtype="bfloat16"),
        MatroyshkaReranker(FULL, dtype="float32", adapters=[MODELS / "adapter_sd"]),
        MatroyshkaReranker(str(MODELS / "mistral_base"), dtype="float32"),
        RankLLaMAReranker(FULL, dtype="float32"),
        MatroyshkaReranker(FULL, dtype="float32", quantization="int8"),
        MatroyshkaReranker(FULL, dtype="float32", quantization="float8"),
        MatroyshkaReranker(FULL, dtype="float32", torch_compile=True),
    )
    assert len({id(reranker.scorer().weights[0]) for reranker in (first, *others)}) == len(others) + 1


def test_layers_are_loaded_on_demand_and_dropped_when_unused() -> None:
    shallow = MatroyshkaReranker(FULL, cutoff=3, dtype="float16")  # no other test uses these weights
    weights = shallow.scorer().weights[0]
    shallow.compute_score(PAIR)
    assert layers_in_memory(weights) == [1, 2, 3]
    deep = shallow.at(cutoff=7)
    before = shallow.compute_score(PAIR)
    assert layers_in_memory(weights) == [1, 2, 3]
    deep.compute_score(PAIR)
    assert layers_in_memory(weights) == [1, 2, 3, 4, 5, 6, 7]
    del deep
    gc.collect()
    assert layers_in_memory(weights) == [1, 2, 3]
    assert shallow.compute_score(PAIR) == before


def test_compiled_layers_give_the_same_for_batches_of_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced but run uncompiled, so that the test does not wait for a compiler."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend="eager", **options))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    made = [graphs["unique_graphs"]]
    kept = MatroyshkaReranker(FULL, dtype="float32", torch_compile=True)
    for size, queries, documents in ((1, 1, 1), (2, 2, 2), (5, 3, 4), (None, 2, 6)):
        shape = {"cutoff": [3, 4], "compress_layers": 2, "compress_ratio": 2}
        wanted = MatroyshkaReranker(FULL, dtype="float32", **shape)(frame(queries, documents))
        compiled = kept.at(**shape)
        compiled.batch_size = size
        got = compiled(frame(queries, documents))
        np.testing.assert_allclose(got[["score_3", "score_4"]], wanted[["score_3", "score_4"]], atol=1e-4)
        made.append(graphs["unique_graphs"])
    assert made[2] == made[-1]
    assert 0 < made[-1] - made[0] <= 8


def test_a_living_template_keeps_the_layers_it_needs() -> None:
    template = MatroyshkaReranker(FULL)
    template.compute_score(PAIR)
    shallow = template.at(cutoff=3)
    shallow.compute_score(PAIR)
    del shallow
    gc.collect()
    assert len(layers_in_memory(template.scorer().weights[0])) == 8


def test_weights_are_freed_with_the_last_reranker() -> None:
    reranker = MatroyshkaReranker(str(MODELS / "mistral_base"), max_length=100)
    reranker.compute_score(PAIR)
    weights = weakref.ref(reranker.scorer().weights[0])
    del reranker
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_weights_have_the_dtype_of_the_argument(dtype: str) -> None:
    reranker = MatroyshkaReranker(
        str(MODELS / "mistral_base"), adapters=[MODELS / "adapter_sd"], start_layer=2, dtype=dtype
    )
    model, heads, _ = reranker.scorer().weights[0].at_depth(8)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert heads.dtype == torch.float32


def test_a_tensor_whose_shape_contradicts_the_configuration_is_named(tmp_path: Path) -> None:
    shutil.copytree(FULL, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 161}))
    with pytest.raises(ValueError, match=r"'layers\.0\.mlp\.gate_proj\.weight' is \[160, 64\].* asks for \[161, 64\]"):
        MatroyshkaReranker(tmp_path / "model").compute_score(PAIR)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    shutil.copytree(FULL, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'layers\.1\.mlp\.up_proj\.weight'"):
        MatroyshkaReranker(tmp_path / "model").compute_score(PAIR)


TWO_CPUS = torch.device("cpu"), torch.device("cpu", 0)  # different devices to torch


def test_each_device_has_one_copy_shared_by_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        devices, "resolve_devices", lambda names: TWO_CPUS if isinstance(names, tuple) else TWO_CPUS[:1]
    )
    both = MatroyshkaReranker(FULL, dtype="float32", cutoff=3, device=["cuda:0", "cuda:1"], max_length=99)
    first, second = both.scorer().weights
    assert (first.device, second.device) == TWO_CPUS
    assert both.scorer().weights[0] is first is not second
    assert MatroyshkaReranker(FULL, dtype="float32").scorer().weights == (first,)
    deep = both.at(cutoff=7)
    assert deep.scorer().weights == (first, second)
    deep.compute_score([(f"{number} panda", "a panda") for number in range(8)])
    assert len(layers_in_memory(second)) == 7
    parts = [dict(weights.at_depth(1)[0].named_parameters()) for weights in (first, second)]
    name = "layers.0.mlp.up_proj.weight"
    assert parts[0][name] is not parts[1][name]
    plain = [part[name].to_dense() if part[name].is_mkldnn else part[name] for part in parts]
    assert plain[0].data_ptr() != plain[1].data_ptr()
    assert torch.equal(*plain)
    del deep
    gc.collect()
    assert layers_in_memory(second) == [1, 2, 3]
    second = weakref.ref(second)
    parts.clear()
    both.set_parameter("device", None)
    assert both.scorer().weights == (first,)
    gc.collect()
    assert second() is None
    assert len(layers_in_memory(first)) >= 3


def test_a_changed_argument_frees_the_old_weights() -> None:
    reranker = MatroyshkaReranker(FULL, dtype="float16")
    reranker.compute_score(PAIR)
    old = reranker.scorer().weights[0]
    reranker.set_parameter("dtype", "float32")
    assert reranker.scorer().weights[0] is not old
    assert layers_in_memory(old) == []
    reranker.compute_score(PAIR)
    assert reranker.scorer().dtype == torch.float32


MEMORY = """
import sys, resource, torch
from pyterrier_llmrerank import MatroyshkaReranker
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
reranker = MatroyshkaReranker(sys.argv[1], adapters=[sys.argv[2]], start_layer=1, dtype="bfloat16")
tiny = MatroyshkaReranker(sys.argv[3], dtype="bfloat16"); tiny.compute_score(("a", "b"))
before = peak()
model, _, _ = reranker.scorer().weights[0].at_depth(8)
reranker.at(cutoff=4).scorer().weights[0].at_depth(4), reranker.at(normalize=True).scorer().weights[0].at_depth(8)
own = sum(p.numel() * p.element_size() for p in model.parameters())
layer = 4 * sum(p.numel() for p in model.layers[0].parameters())
print((peak() - before) / own, layer / own)
"""


def test_opening_peaks_at_the_models_own_size_and_a_layer(tmp_path: Path) -> None:
    """Files are fp32, memory is bf16, an adapter is merged in fp32, and more shapes need no more memory."""
    config = MistralConfig(
        vocab_size=700, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, dtype="float32",
    )  # fmt: skip
    base = MistralForCausalLM(config)
    base.save_pretrained(tmp_path / "model")
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"])
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(FULL) / name, tmp_path / "model")
    paths = [str(tmp_path / "model"), str(tmp_path / "adapter"), FULL]
    done = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=True)
    peak, layer = (float(number) for number in done.stdout.split())
    assert peak < 1 + layer + 0.25  # the allocator's own overhead
