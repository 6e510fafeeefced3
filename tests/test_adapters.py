"""Adapters merge to what PEFT itself merges, and what is no plain LoRA is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MODELS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pyterrier_llmrerank.adapters import Adapter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 7}},
        {"alpha_pattern": {"model.layers.0.mlp.down_proj": 5}},
    ],
)
def test_deltas_are_pefts_own(tmp_path: Path, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    before = {name: p.clone() for name, p in base.named_parameters()}
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    tuned = get_peft_model(base, lora)
    tuned.save_pretrained(tmp_path)
    merged = dict(tuned.merge_and_unload().named_parameters())
    adapter = Adapter(tmp_path, "adapters")
    assert len(adapter.modules) == 4
    for module in adapter.modules:
        name = f"model.{module}.weight"
        adapter.add_to(before[name], module)
        torch.testing.assert_close(before[name], merged[name])


@pytest.fixture
def change(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a good adapter with its configuration or tensors changed."""

    def changed(config: dict[str, object] | None = None, **tensors: torch.Tensor | None) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(MODELS / "adapter_sd", folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        stored = load_file(folder / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            key = next((k for k in stored if k.endswith(name)), name)
            stored.pop(key, None)
            if tensor is not None:
                stored[key] = tensor
        save_file(stored, folder / "adapter_model.safetensors")
        return folder

    return changed


def test_no_adapter_folder() -> None:
    with pytest.raises(FileNotFoundError, match="adapters: 'x': .* no adapter_config.json"):
        Adapter(MODELS / "mistral_base", "adapters: 'x'")


@pytest.mark.parametrize("config", [{"peft_type": "IA3"}, {"use_dora": True}])
def test_other_kinds_are_refused(change: Callable[..., Path], config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="only LoRA is allowed"):
        Adapter(change(config), "adapters")


def test_a_foreign_tensor_is_named(change: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="'lora_embedding_A' is no part"):
        Adapter(change(lora_embedding_A=torch.ones(2, 2)), "adapters")


def test_half_an_update_is_named(change: Callable[..., Path]) -> None:
    folder = change(**{"layers.0.mlp.up_proj.lora_B.weight": None})
    with pytest.raises(ValueError, match=r"'layers\.0\.mlp\.up_proj' has only lora_A"):
        Adapter(folder, "adapters")


def test_another_shape_is_named(change: Callable[..., Path]) -> None:
    folder = change(**{"layers.0.mlp.up_proj.lora_A.weight": torch.ones(8, 63)})
    adapter = Adapter(folder, "adapters: 'mine'")
    shapes = dict.fromkeys(adapter.modules, (160, 64))
    with pytest.raises(ValueError, match="adapters: 'mine': adapter of another shape"):
        adapter.check(shapes)


def test_an_unknown_module_is_named() -> None:
    adapter = Adapter(MODELS / "adapter_sd", "adapters")
    with pytest.raises(ValueError, match=r"no module 'layers\.0\.mlp\.down_proj'"):
        adapter.check({})
    assert len(adapter.ending("linear_head")) == 7
    assert adapter.ending("embed_tokens") == set()


def test_a_whole_tensor_is_kept_by_name() -> None:
    adapter = Adapter(MODELS / "rankllama_adapter", "model")
    assert set(adapter.whole) == {"score.weight"}
    assert adapter.read_whole("score.weight").shape == (1, 64)


MODULE = "layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "16"}, "lora_alpha is '16'; wanted a number"),
        ({"lora_alpha": None}, "lora_alpha is None; wanted a number"),
        ({"lora_alpha": True}, "lora_alpha is True; wanted a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; wanted a number"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 10+\.\.\.; wanted a number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; wanted an object"),
        ({"alpha_pattern": {"up_proj": "x"}}, "alpha_pattern 'up_proj' is 'x'; wanted a number"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern '\('.*unterminated subpattern"),
        ({"alpha_pattern": {"(a+)+$": 1, "(l|l|l)*": 1}}, "too intricate"),
        ({"alpha_pattern": {"(.*)(.*)(.*)x": 1}}, "too intricate"),
        ({"alpha_pattern": {"x" * 2000: 1}}, r"alpha_pattern 'x+\.\.\. is too intricate"),
    ],
)
def test_a_scale_that_is_no_number_is_named(
    change: Callable[..., Path], config: dict[str, object], message: str
) -> None:
    adapter = Adapter(change(config), "adapters: 'mine'")
    with pytest.raises(ValueError, match=f"adapters: 'mine': {message}|{message}"):
        adapter.factors(MODULE)


def test_patterns_as_peft_writes_them_are_read(change: Callable[..., Path]) -> None:
    plain = Adapter(MODELS / "adapter_sd", "adapters")
    alpha = plain.config["lora_alpha"]
    adapter = Adapter(change({"alpha_pattern": {r"layers\.\d+\.mlp\..*": 2 * alpha}}), "adapters")
    torch.testing.assert_close(adapter.factors(MODULE)[1], 2 * plain.factors(MODULE)[1])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((8, 64), float("nan")), "not all numbers of tensor .*up_proj.lora_A.weight' are finite"),
        (torch.ones(8, 64, dtype=torch.int64), r"up_proj.lora_A.weight' is torch\.int64; wanted one of"),
    ],
)
def test_numbers_that_are_no_update_are_named(change: Callable[..., Path], tensor: torch.Tensor, message: str) -> None:
    adapter = Adapter(change(**{f"{MODULE}.lora_A.weight": tensor}), "adapters")
    with pytest.raises(ValueError, match=message):
        adapter.factors(MODULE)


def test_an_update_of_no_rank_is_named(change: Callable[..., Path]) -> None:
    folder = change(**{f"{MODULE}.lora_A.weight": torch.ones(0, 64), f"{MODULE}.lora_B.weight": torch.ones(160, 0)})
    adapter = Adapter(folder, "adapters: 'mine'")
    with pytest.raises(ValueError, match="adapters: 'mine': adapter of another shape"):
        adapter.check(dict.fromkeys(adapter.modules, (160, 64)))


@pytest.mark.parametrize("base", [None, 3, "", ["a"], "x" * 10**6])
def test_a_base_that_is_no_name_is_shown(change: Callable[..., Path], base: object) -> None:
    adapter = Adapter(change({"base_model_name_or_path": base}), "model")
    with pytest.raises(ValueError, match="model: the adapter names no base model") as info:
        _ = adapter.base
    assert len(str(info.value)) < 300
