"""Adapters merge to what PEFT itself merges, and what is no plain LoRA is refused by name."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pyterrier_llmrerank.checkpoints.adapters import (
    FIELDS_READ,
    INITIALISATIONS,
    VARIANTS,
    WITHOUT_EFFECT,
    Adapter,
)
from pyterrier_llmrerank.checkpoints.merging import merged


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 7}},
        {"alpha_pattern": {"model.layers.0.mlp.down_proj": 5}},
        *({"init_lora_weights": way} for way in INITIALISATIONS),
        {"bias": "all"},
        {"ensure_weight_tying": True},
    ],
)
def test_deltas_are_pefts_own(tmp_path: Path, options: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if not options.keys() <= known or (options.get("init_lora_weights") == "mica" and "kasa_config" not in known):
        pytest.skip("newer than the PEFT that is installed")
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eva would like data
        tuned = get_peft_model(llama(), LoraConfig(**{**settings, "init_lora_weights": False, **options}))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        tuned.save_pretrained(tmp_path)
        base = llama()
        before = {name: p.clone() for name, p in base.named_parameters()}
        peft = dict(PeftModel.from_pretrained(base, tmp_path).merge_and_unload().named_parameters())
    adapter = Adapter(tmp_path, "adapters")
    assert len(adapter.modules) == 4
    for module in adapter.modules:
        name = f"model.{module}.weight"
        got = merged(before[name], [adapter.factors(module)], torch.float32)
        torch.testing.assert_close(got, peft[name])


def llama() -> LlamaForCausalLM:
    """A tiny model, the same each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


def test_every_field_of_lora_is_known() -> None:
    """If a new PEFT has more fields, find out whether they change the base or the forward pass, and list them."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - (FIELDS_READ | WITHOUT_EFFECT | VARIANTS) == set()
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants <= VARIANTS
    assert not FIELDS_READ & WITHOUT_EFFECT
    assert not (FIELDS_READ | WITHOUT_EFFECT) & VARIANTS


def test_an_adapter_with_pefts_defaults_is_plain_lora(tmp_path: Path) -> None:
    """The defaults of the fields do not matter."""
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert Adapter(tmp_path, "adapters").modules


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "tomorrows", ["x"]])
def test_an_initialisation_that_changes_the_base_is_refused(change: Callable[..., Path], way: object) -> None:
    folder = change({"init_lora_weights": way})
    with pytest.raises(
        ValueError, match=r"adapters: 'mine': init_lora_weights is .*; allowed: True, False, 'gaussian'"
    ):
        Adapter(folder, "adapters: 'mine'")


def test_pissa_is_another_model_than_its_update_on_the_base(tmp_path: Path) -> None:
    """The reason for the refusal: PEFT changes the base when it opens the adapter."""
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(llama(), tmp_path)
    name = "model.layers.0.self_attn.q_proj.base_layer.weight"
    assert not torch.equal(opened.base_model.model.state_dict()[name], llama().model.layers[0].self_attn.q_proj.weight)


#: What each variant is where it is on.
ON = {
    "alora_invocation_tokens": [3], "arrow_config": {"top_k": 2}, "kasa_config": {"beta": 0.1},
    "layer_replication": [[0, 2], [1, 2]], "lora_bias": True, "megatron_config": {"a": 1},
    "monteclora_config": {"a": 1}, "target_parameters": ["experts"], "trainable_token_indices": [1],
    "use_bdlora": {"nblocks": 2},    "use_dora": True, "use_qalora": True, "velora_config": {"num_groups": 2},
}  # fmt: skip


@pytest.mark.parametrize("key", [*sorted(VARIANTS), "a_field_of_tomorrow"])
def test_variants_of_lora_are_refused_by_name(change: Callable[..., Path], key: str) -> None:
    folder = change({key: ON.get(key, "on")})
    with pytest.raises(ValueError, match=f"adapters: 'mine': '{key}' in adapter_config.json is .*only plain LoRA"):
        Adapter(folder, "adapters: 'mine'")
    config = json.loads((folder / "adapter_config.json").read_text())
    for off in (None, False, [], {}):
        (folder / "adapter_config.json").write_text(json.dumps(config | {key: off}))
        assert Adapter(folder, "adapters").modules


def test_without_lora_alpha_it_is_pefts(tmp_path: Path) -> None:
    tuned = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    base = llama()
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    peft = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    factors = Adapter(tmp_path, "adapters").factors("layers.0.self_attn.q_proj")
    torch.testing.assert_close(merged(weight, [factors], torch.float32), peft.model.layers[0].self_attn.q_proj.weight)


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


def test_other_kinds_are_refused(change: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="peft_type is 'IA3'; only LoRA is allowed"):
        Adapter(change({"peft_type": "IA3"}), "adapters")


def test_the_original_weight_beside_a_trained_one_is_passed_over(change: Callable[..., Path]) -> None:
    original, trained = (f"base_model.model.score.{part}weight" for part in ("original_module.", ""))
    folder = change(**{original: torch.zeros(1, 64), trained: torch.ones(1, 64)})
    assert set(Adapter(folder, "adapters").whole) == {"score.weight"}
    assert Adapter(folder, "adapters").read_whole("score.weight").sum() == 64
    stored = load_file(folder / "adapter_model.safetensors")
    save_file({key: tensor for key, tensor in stored.items() if key != trained}, folder / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"'base_model.model.score.original_module.weight' is the original of a trained tensor"
    ):
        Adapter(folder, "adapters")


def test_an_update_beside_a_whole_weight_is_named(change: Callable[..., Path]) -> None:
    folder = change(**{f"base_model.model.model.{MODULE}.weight": torch.ones(160, 64)})
    with pytest.raises(ValueError, match=rf"'{MODULE}' has an update and a whole weight"):
        Adapter(folder, "adapters")


@pytest.mark.parametrize(
    ("key", "twin"),
    [
        ("score.weight", "score.modules_to_save.weight"),
        ("score.weight", "model.score.weight"),
        ("score.original_module.weight", "model.score.original_module.weight"),
        ("model.layers.0.mlp.up_proj.lora_B.weight", "model.layers.0.mlp.up_proj.lora_B.default.weight"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "layers.0.mlp.up_proj.lora_A.weight"),
    ],
)
def test_a_tensor_by_two_names_is_refused(change: Callable[..., Path], key: str, twin: str) -> None:
    folder = change(**{f"base_model.model.{name}": torch.ones(1, 64) for name in (key, twin)})
    with pytest.raises(ValueError, match="adapters: 'mine': the adapter has both ") as info:
        Adapter(folder, "adapters: 'mine'")
    assert f"'base_model.model.{key}'" in str(info.value)
    assert f"'base_model.model.{twin}'" in str(info.value)


def test_a_foreign_tensor_is_named(change: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="'lora_embedding_A' is not part"):
        Adapter(change(lora_embedding_A=torch.ones(2, 2)), "adapters")


def test_half_an_update_is_named(change: Callable[..., Path]) -> None:
    folder = change(**{"layers.0.mlp.up_proj.lora_B.weight": None})
    with pytest.raises(ValueError, match=r"'layers\.0\.mlp\.up_proj' has only lora_A"):
        Adapter(folder, "adapters")


def test_another_shape_is_named(change: Callable[..., Path]) -> None:
    folder = change(**{"layers.0.mlp.up_proj.lora_A.weight": torch.ones(8, 63)})
    adapter = Adapter(folder, "adapters: 'mine'")
    shapes = dict.fromkeys(adapter.modules, (160, 64))
    with pytest.raises(ValueError, match="adapters: 'mine': the adapter has the wrong shape"):
        adapter.check(shapes)


def test_an_unknown_module_is_named() -> None:
    adapter = Adapter(MODELS / "adapter_sd", "adapters")
    with pytest.raises(ValueError, match=r"no module 'layers\.0\.mlp\.down_proj'"):
        adapter.check({})
    assert len(adapter.modules_ending_in("linear_head")) == 7
    assert adapter.modules_ending_in("embed_tokens") == set()


def test_a_whole_tensor_is_kept_by_name() -> None:
    adapter = Adapter(MODELS / "rankllama_adapter", "model")
    assert set(adapter.whole) == {"score.weight"}
    assert adapter.read_whole("score.weight").shape == (1, 64)


MODULE = "layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "16"}, "lora_alpha of .*up_proj' is '16', by .*expected a number"),
        ({"lora_alpha": None}, "lora_alpha of .*up_proj' is None, by .*expected a number"),
        ({"lora_alpha": True}, "lora_alpha of .*up_proj' is True, by .*expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha of .*up_proj' is nan, by .*expected a number"),
        ({"lora_alpha": 10**400}, r"lora_alpha of .*up_proj' is 10+\.\.\., by .*expected a number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; expected an object"),
        (
            {"alpha_pattern": {"up_proj": "x"}},
            "lora_alpha of .*up_proj' is 'x', by lora_alpha or alpha_pattern; expected a number",
        ),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern '\('.*unterminated subpattern"),
        ({"alpha_pattern": {"(a+)+$": 1, "(l|l|l)*": 1}}, "too complex"),
        ({"alpha_pattern": {"(.*)(.*)(.*)x": 1}}, "too complex"),
        ({"alpha_pattern": {"x" * 2000: 1}}, r"alpha_pattern 'x+\.\.\. is too complex"),
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
        (torch.full((8, 64), float("nan")), "not all values of tensor .*up_proj.lora_A.weight' are finite"),
        (torch.ones(8, 64, dtype=torch.int64), r"up_proj.lora_A.weight' is torch\.int64; allowed:"),
    ],
)
def test_numbers_that_are_no_update_are_named(change: Callable[..., Path], tensor: torch.Tensor, message: str) -> None:
    adapter = Adapter(change(**{f"{MODULE}.lora_A.weight": tensor}), "adapters")
    with pytest.raises(ValueError, match=message):
        adapter.factors(MODULE)


def test_an_update_of_no_rank_is_named(change: Callable[..., Path]) -> None:
    folder = change(**{f"{MODULE}.lora_A.weight": torch.ones(0, 64), f"{MODULE}.lora_B.weight": torch.ones(160, 0)})
    with pytest.raises(ValueError, match=r"adapters: 'mine': lora_A of '.*up_proj' is \[0, 64\], but its rank"):
        Adapter(folder, "adapters: 'mine'")


@pytest.mark.parametrize("base", [None, 3, "", ["a"], "x" * 10**6])
def test_a_base_that_is_no_name_is_shown(change: Callable[..., Path], base: object) -> None:
    adapter = Adapter(change({"base_model_name_or_path": base}), "model")
    with pytest.raises(ValueError, match="model: the adapter names no base model") as info:
        _ = adapter.base
    assert len(str(info.value)) < 300


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 16}, r"lora_A of '.*' is \[8, \d+\], but its rank in adapter_config.json is 16"),
        ({"rank_pattern": {"down_proj": 4}}, r"lora_A of '.*down_proj' is \[8, \d+\], but its rank .* is 4"),
        (
            {"target_modules": ["q_proj"]},
            r"module '.*' has an update, but is not among the modules that target_",
        ),
        (
            {"layers_to_transform": [0]},
            "has an update, but is not among the modules that layers_to_transform, target",
        ),
        ({"exclude_modules": ["v_proj"]}, r"module '.*v_proj' has an update, but is not among"),
        ({"target_modules": "(.*"}, "target_modules in adapter_config.json: "),
    ],
)
def test_a_configuration_that_contradicts_its_tensors_is_refused(
    change: Callable[..., Path], config: dict[str, object], message: str
) -> None:
    """PEFT either refuses these or ignores updates in the file."""
    with pytest.raises(ValueError, match=message):
        Adapter(change(config), "adapters: 'mine'")


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*proj|.*linear_head"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"exclude_modules": ["embed_tokens"]},
    ],
)
def test_targets_as_peft_writes_them_agree(change: Callable[..., Path], config: dict[str, object]) -> None:
    assert Adapter(change(config), "adapters").modules == Adapter(MODELS / "adapter_sd", "adapters").modules
