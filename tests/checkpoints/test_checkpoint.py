"""Every layout that the systems are published in opens; what does not fit is refused by name."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODELS, words
from safetensors.torch import load_file, save_file

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.checkpoints.checkpoint import MatroyshkaCheckpoint, RankLLaMACheckpoint
from pyterrier_llmrerank.checkpoints.locate import absolute
from pyterrier_llmrerank.engine.weights import build_decoder

RAW, FULL, SD = (str(MODELS / name) for name in ("mistral_base", "costwise_full", "adapter_sd"))
BASE, ADAPTER = str(MODELS / "rankllama_base"), str(MODELS / "rankllama_adapter")


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """A copy of a model with its configuration changed and some tensors left out or replaced."""

    def change(model: str, config: dict[str, object] | None = None, **tensors: torch.Tensor | None) -> str:
        folder = tmp_path / Path(model).name
        shutil.copytree(model, folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        stored = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            stored.pop(name, None)
            if tensor is not None:
                stored[name] = tensor
        save_file(stored, folder / "model.safetensors")
        return str(folder)

    return change


def heads(checkpoint: RankLLaMACheckpoint | MatroyshkaCheckpoint) -> torch.Tensor:
    return checkpoint.heads(checkpoint.tokenizer())


def test_layer_wise_heads_are_the_files() -> None:
    checkpoint = MatroyshkaCheckpoint(FULL, (), None)
    assert list(checkpoint.head_layers) == [2, 3, 4, 5, 6, 7, 8]
    stored = load_file(MODELS / "costwise_full" / "model.safetensors")
    wanted = torch.cat([stored[f"lm_head.{k}.linear_head.weight"] for k in range(7)])
    assert torch.equal(heads(checkpoint), wanted)


def test_a_plain_model_starts_from_the_row_of_yes() -> None:
    row = load_file(MODELS / "mistral_base" / "model.safetensors")["lm_head.weight"][351]
    assert torch.equal(heads(MatroyshkaCheckpoint(RAW, (), 6)), torch.stack([row] * 3))
    only = MatroyshkaCheckpoint(RAW, (), None)
    assert list(only.head_layers) == [8]
    assert torch.equal(heads(only), row[None])


def test_a_tied_head_is_found_in_the_embedding(changed: Callable[..., str]) -> None:
    tied = changed(RAW, {"tie_word_embeddings": True}, **{"lm_head.weight": None})
    row = load_file(MODELS / "mistral_base" / "model.safetensors")["model.embed_tokens.weight"][351]
    assert torch.equal(heads(MatroyshkaCheckpoint(tied, (), None)), row[None])


def test_steps_between_heads(changed: Callable[..., str]) -> None:
    assert list(MatroyshkaCheckpoint(changed(FULL, {"layer_sep": 2}), (), None).head_layers) == [2, 4, 6, 8]


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


def test_adapters_below_the_models_folder(tmp_path: Path) -> None:
    shutil.copytree(FULL, tmp_path / "model")
    shutil.copytree(SD, tmp_path / "model" / "compensate" / "layer" / "full")
    checkpoint = MatroyshkaCheckpoint(str(tmp_path / "model"), ["compensate/layer/full"], None)
    assert len(checkpoint.adapters[0].modules_ending_in("linear_head")) == 7


def test_remote_code_is_neither_needed_nor_run(changed: Callable[..., str]) -> None:
    folder = changed(FULL, {"auto_map": {"AutoModelForCausalLM": "code.Evil", "AutoConfig": "code.Evil"}})
    tokenizer = Path(folder) / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["code.Evil", "code.Evil"]}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | own))
    (Path(folder) / "code.py").write_text("raise SystemExit('executed')")
    assert heads(MatroyshkaCheckpoint(folder, (), None)).shape == (7, 64)
    pair = ("a query", "a passage")
    assert MatroyshkaReranker(folder).compute_score(pair) == MatroyshkaReranker(FULL).compute_score(pair)


def test_rankllama_adapter_names_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MODELS)  # the adapter says "rankllama_base"
    named, given = RankLLaMACheckpoint(ADAPTER, None), RankLLaMACheckpoint(ADAPTER, BASE)
    assert torch.equal(heads(named), heads(given))
    assert list(given.head_layers) == [4]


def test_rankllama_adapter_as_bin_and_merged(tmp_path: Path, changed: Callable[..., str]) -> None:
    safe = RankLLaMACheckpoint(ADAPTER, BASE)
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(load_file(Path(ADAPTER) / "adapter_model.safetensors"), tmp_path / "adapter" / "adapter_model.bin")
    in_bin = RankLLaMACheckpoint(str(tmp_path / "adapter"), BASE)
    name = "layers.0.self_attn.q_proj.weight"
    merged = RankLLaMACheckpoint(
        changed(BASE, **{"score.weight": heads(safe), f"model.{name}": safe.tensor(name)}), None
    )
    for other in (in_bin, merged):
        assert torch.equal(heads(other), heads(safe))
        assert torch.equal(other.tensor(name), safe.tensor(name))


def test_the_adapters_own_tokenizer_is_preferred(tmp_path: Path) -> None:
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(BASE) / name, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "tokenizer_config.json").read_text())
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))
    assert RankLLaMACheckpoint(str(tmp_path / "adapter"), BASE).tokenizer().pad_token == "</s>"
    assert RankLLaMACheckpoint(ADAPTER, BASE).tokenizer().pad_token is None


def test_nothing_is_said_about_a_model_type_of_our_own(capfd: pytest.CaptureFixture[str]) -> None:
    MatroyshkaCheckpoint(FULL, (), None).tokenizer()
    assert capfd.readouterr().err == ""


def test_a_missing_lm_head_is_not_replaced_by_the_embedding(changed: Callable[..., str]) -> None:
    untied = changed(RAW, {"tie_word_embeddings": False}, **{"lm_head.weight": None})
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight'"):
        heads(MatroyshkaCheckpoint(untied, (), None))


#: Tensors that the fixtures lack and other models have, by the tensor that they accompany.
UNUSED = [
    (RAW, "model.layers.1.self_attn.q_proj.bias"),
    (RAW, "model.layers.1.self_attn.q_norm.weight"),
    (RAW, "model.layers.0.pre_feedforward_layernorm.weight"),
    (RAW, "model.layers.11.input_layernorm.weight"),
    (RAW, "model.layers.0.mlp.up_proj.weight_scale"),
    (RAW, "lm_head.bias"),
    (RAW, "lm_head.0.linear_head.weight"),
    (RAW, "score.weight"),
    (FULL, "model.norm.bias"),
    (FULL, "lm_head.7.linear_head.weight"),
    (FULL, "lm_head.0.linear_head.bias"),
    (BASE, "model.layers.3.mlp.down_proj.bias"),
    (BASE, "score.bias"),
]


@pytest.mark.parametrize(("model", "name"), UNUSED)
def test_a_tensor_that_scores_would_ignore_is_named(changed: Callable[..., str], model: str, name: str) -> None:
    folder = changed(model, **{name: torch.ones(1, 64)})
    reranker = RankLLaMAReranker(ADAPTER, base_model=folder) if model == BASE else MatroyshkaReranker(folder)
    with pytest.raises(
        ValueError, match=rf"model='{folder}': .* a tensor '{name.removeprefix('model.')}', which a mode"
    ):
        reranker.compute_score(("a", "b"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (RAW, "model.rotary_emb.inv_freq"),
        (FULL, "model.layers.7.self_attn.rotary_emb.inv_freq"),
        (FULL, "model.layers.7.self_attn.rotary_emb.cos_cached"),
        (FULL, "lm_head.weight"),
        (BASE, "score.weight"),  # the adapter has its own
        (BASE, "lm_head.0.linear_head.weight"),
    ],
)
def test_a_tensor_of_no_account_changes_nothing(changed: Callable[..., str], model: str, name: str) -> None:
    folder, score = changed(model, **{name: torch.full((1, 64), 9.0)}), []
    for place in (folder, model):
        reranker = RankLLaMAReranker(ADAPTER, base_model=place) if model == BASE else MatroyshkaReranker(place)
        score.append(reranker.compute_score(("a", "b")))
    assert score[0] == score[1]


def test_a_tensor_by_two_names(changed: Callable[..., str]) -> None:
    folder = changed(RAW, **{"norm.weight": torch.ones(64)})
    with pytest.raises(
        ValueError, match=r"has both '(model\.)?norm\.weight' and '(model\.)?norm\.weight'; expected one"
    ):
        MatroyshkaReranker(folder).compute_score(("a", "b"))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "phi3", "gpt2", "minicpm"])
def test_a_layer_wise_type_that_names_no_certain_family(changed: Callable[..., str], family: str) -> None:
    why = "; published models of this type hold Gemma 2 weights" if family == "gemma" else ""
    message = rf"model_type 'cost_wise_{family}' is not supported{why}; layer-wise models that open: cost_wise_llama, "
    with pytest.raises(ValueError, match=message):
        MatroyshkaReranker(changed(FULL, {"model_type": f"cost_wise_{family}"}))


@pytest.mark.parametrize("config", [{}, {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}])
def test_a_sliding_window_of_0_is_off(changed: Callable[..., str], config: dict[str, object]) -> None:
    biases = {}
    if config:
        rows = {"q": 64, "k": 32, "v": 32}
        biases = {
            f"model.layers.{layer}.self_attn.{name}_proj.bias": torch.ones(rows[name])
            for layer in range(8)
            for name in "qkv"
        }
    pair, score = ("a query", words(1, 40)), []
    folder = changed(RAW, config, **biases)
    for window in (0, None, 8):
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": window}))
        score.append(MatroyshkaReranker(folder, dtype="float32").compute_score(pair))
    assert score[0] == score[1] != score[2]


@pytest.mark.parametrize("start", [1, 3])
def test_an_adapter_trained_from_another_start_layer(start: int) -> None:
    with pytest.raises(ValueError, match=rf"updates 7 layer-wise heads .* has {9 - start} from start_layer={start} on"):
        MatroyshkaCheckpoint(RAW, [SD], start)


def test_a_rankllama_adapter_with_more_whole_tensors(tmp_path: Path) -> None:
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.embed_tokens.weight": torch.ones(704, 64)}, file)
    checkpoint = RankLLaMACheckpoint(str(tmp_path / "adapter"), BASE)
    assert torch.equal(checkpoint.tensor("embed_tokens.weight"), torch.ones(704, 64))
    assert build_decoder(checkpoint).embed_tokens.weight.shape == (704, 64)


@pytest.mark.parametrize("rotary", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_batch_are_refused(changed: Callable[..., str], rotary: str) -> None:
    parameters = {
        "rope_type": rotary,
        "rope_theta": 1e4,
        "factor": 2.0,
        "long_factor": [1.0] * 8,
        "short_factor": [1.0] * 8,
    }
    with pytest.raises(ValueError, match=f"rope_type '{rotary}' is not supported"):
        MatroyshkaCheckpoint(changed(RAW, {"rope_parameters": parameters, "rope_theta": None}), (), None)


def test_no_model_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"model='.*adapter_sd': .* has no config\.json"):
        MatroyshkaCheckpoint(SD, (), None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit"}, "model_type 'vit' is not supported; allowed: llama, mistral"),
        ({"model_type": "bart"}, "model_type 'bart' is an encoder and a decoder; expected a decoder alone"),
        ({"quantization_config": {"bits": 4}}, "weights are quantised"),
        ({"is_causal": False}, r"is_causal is False in config\.json; allowed: true"),
        ({"model_type": "llama", "is_causal": False}, r"is_causal is False in config\.json; allowed: true"),
        ({"is_causal": "no"}, r"is_causal is 'no' in config\.json; allowed: true"),
        ({"attention_dropout": "much"}, r"config\.json does not describe a model_type 'mistral'"),
        ({"num_attention_heads": "many"}, "num_attention_heads is 'many'; allowed: integers from 1 to 16777216"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; allowed: integers from 1 to 10000"),
        ({"hidden_size": -1}, "hidden_size is -1; allowed: integers from 1 to"),
        ({"model_type": "x" * 10**6}, r"model_type 'x{50,60}\.\.\. is not supported"),
    ],
)
def test_a_configuration_that_does_not_do(changed: Callable[..., str], config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatroyshkaCheckpoint(changed(RAW, config), (), None)


@pytest.mark.parametrize(("model", "start"), [(FULL, 3), (RAW, 9)])
def test_a_start_layer_that_does_not_fit(model: str, start: int) -> None:
    with pytest.raises(ValueError, match=rf"start_layer={start}"):
        MatroyshkaCheckpoint(model, (), start)


@pytest.mark.parametrize("config", [{"start_layer": None}, {"start_layer": 0}, {"layer_sep": 0}, {"layer_sep": "1"}])
def test_a_layer_wise_configuration_out_of_bounds(changed: Callable[..., str], config: dict) -> None:
    with pytest.raises(ValueError, match="start_layer=.*layer_sep=.*allowed"):
        MatroyshkaCheckpoint(changed(FULL, config), (), None)


def test_a_head_that_is_missing(changed: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.3\.linear_head\.weight'"):
        heads(MatroyshkaCheckpoint(changed(FULL, **{"lm_head.3.linear_head.weight": None}), (), None))
    with pytest.raises(ValueError, match="no score head"):
        heads(RankLLaMACheckpoint(BASE, None))


def test_a_head_of_two_labels(changed: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"'score\.weight' is \[2, 64\]; expected \[1, 64\]"):
        heads(RankLLaMACheckpoint(changed(BASE, **{"score.weight": torch.ones(2, 64)}), None))


def test_layer_wise_adapter_on_a_model_without_such_heads() -> None:
    with pytest.raises(ValueError, match=r"updates layer-wise heads \(linear_head\).*has none; give the start_layer"):
        MatroyshkaCheckpoint(RAW, [SD], None)


def test_a_rankllama_adapter_among_matroyshkas() -> None:
    with pytest.raises(ValueError, match=r"holds whole tensors"):
        MatroyshkaCheckpoint(RAW, [ADAPTER], 2)


def test_base_model_without_an_adapter() -> None:
    with pytest.raises(ValueError, match="base_model='.*' is given, but model='.*' is no adapter"):
        RankLLaMACheckpoint(BASE, BASE)


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model .*; write one there"):
        RankLLaMACheckpoint(str(tmp_path / "adapter"), None)


def test_a_base_out_of_reach_is_named() -> None:
    with pytest.raises(ConnectionError, match="the base model that model='.*' names='rankllama_base'"):
        RankLLaMACheckpoint(ADAPTER, None)


def test_no_tokenizer(changed: Callable[..., str]) -> None:
    folder = changed(RAW)
    for file in Path(folder).glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="no usable tokenizer"):
        MatroyshkaCheckpoint(folder, (), None).tokenizer()


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Copy a RankLLaMA adapter, and let it name another base."""

    def naming(base: str) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(ADAPTER, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        return folder

    return naming


@pytest.mark.parametrize("base", ["../../../../../etc", "/etc", "/dev/zero", "/etc/passwd", "~/nowhere/at/all", "a\0b"])
def test_an_adapter_that_names_a_path_outside_gets_nothing_of_it(adapter: Callable[..., Path], base: str) -> None:
    """A base may be anywhere, because PEFT writes absolute paths; its files are only read as a model."""
    folder = adapter(base)
    with pytest.raises(FileNotFoundError, match=r"no config\.json|a file\. Allowed|no such model folder") as info:
        RankLLaMAReranker(folder).compute_score(("a", "b"))
    assert repr(absolute(base))[1:-1] in str(info.value)


class Command:
    """The shell command that a pickle of it would run when opened."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return (os.system, (self.command,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_command_in_an_adapter_is_not_run(adapter: Callable[..., Path], tmp_path: Path, zipped: bool) -> None:
    folder = adapter(BASE)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    command = Command(f"echo owned > {tmp_path / 'owned'}")
    torch.save({**tensors, "evil": command}, folder / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: refused, it is not a plain file of tensors"):
        RankLLaMAReranker(folder).compute_score(("a", "b"))
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(command))  # which would have
    assert (tmp_path / "owned").exists()


def test_kernels_that_a_configuration_names_are_not_fetched(changed: Callable[..., str]) -> None:
    names = dict.fromkeys(["attn_implementation", "_attn_implementation", "experts_implementation"], "someone/kernels")
    folder = changed(RAW, names | {"text_config": names})
    config = MatroyshkaCheckpoint(folder, (), None).config
    assert "someone/kernels" not in str(config.to_dict()) + str(config._attn_implementation)
    assert MatroyshkaReranker(folder).compute_score(("a", "b")) == MatroyshkaReranker(RAW).compute_score(("a", "b"))


def test_labels_without_number_take_no_memory(changed: Callable[..., str]) -> None:
    assert MatroyshkaCheckpoint(changed(RAW, {"num_labels": 10**12}), (), None).layers == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 9}, r"num_hidden_layers is 9, but the checkpoint has no layers\.8\.\*"),
        ({"num_hidden_layers": 7}, r"num_hidden_layers is 7, but the checkpoint has layers\.7\.\* too"),
        (
            {"hidden_size": 2**20},
            r"tensor 'embed_tokens\.weight' is \[700, 64\], its config\.json asks for \[700, 1048576",
        ),
        ({"intermediate_size": 2**24}, r"mlp\.gate_proj\.weight' is \[160, 64\], its config\.json asks for \[16777216"),
        ({"head_dim": 2**24}, r"q_proj\.weight' is \[64, 64\], its config\.json asks for"),
        ({"vocab_size": 10**6}, r"'embed_tokens\.weight' is \[700, 64\], its config\.json asks for \[1000000, 64\]"),
        ({"num_attention_heads": 3}, "its config.json asks for|does not describe a model_type"),
        ({"hidden_act": "nothing"}, "does not describe a model_type 'mistral'"),
        ({"rope_theta": "x"}, "does not describe a model_type 'mistral'"),
        ({"rope_parameters": [1]}, "does not describe a model_type 'mistral'"),
        ({"rope_parameters": {"rope_type": "x"}}, "does not describe a model_type 'mistral'"),
        ({"pad_token_id": 10**9}, "does not describe a model_type 'mistral'"),
        ({"to_dict": 1}, "does not describe a model_type 'mistral'"),
    ],
)
def test_sizes_that_the_files_do_not_have_are_named(changed: Callable[..., str], config: dict, message: str) -> None:
    folder = changed(RAW, config)
    with pytest.raises(ValueError, match=f"model='.*mistral_base'.*({message})"):
        MatroyshkaReranker(folder).compute_score(("a", "b"))


def test_a_family_without_a_walk_describes_no_more_than_its_files_hold(changed: Callable[..., str]) -> None:
    folder = changed(RAW, {"model_type": "gpt2", "n_embd": 64, "n_layer": 8, "n_head": 4, "vocab_size": 2**24})
    with pytest.raises(ValueError, match=r"config\.json describes a model of \d+ weights, its files hold \d+"):
        MatroyshkaReranker(folder).compute_score(("a", "b"))
    with pytest.raises(ValueError, match="n_layer is 1000000000; allowed: integers from 1 to 10000"):
        MatroyshkaCheckpoint(changed(FULL, {"model_type": "gpt2", "n_layer": 10**9}), (), None)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[" * 100_000, b'{"model": 3}', b"\xff\xfe", b'{"model": {"type": "BPE", "vocab": []}}'],
)
def test_a_broken_tokenizer_is_named(changed: Callable[..., str], content: bytes) -> None:
    folder = changed(RAW)
    (Path(folder) / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model='.*mistral_base': no usable tokenizer in .*mistral_base"):
        MatroyshkaReranker(folder).compute_score(("a", "b"))


def test_a_tokenizers_setting_that_is_none_is_named(changed: Callable[..., str]) -> None:
    folder = changed(RAW)
    path = Path(folder) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "64"}))
    with pytest.raises(ValueError, match=r"no usable tokenizer in .*mistral_base: .*not supported between"):
        MatroyshkaReranker(folder).compute_score(("a", "b"))


@pytest.mark.parametrize("start", [None, 0, 9, 2.0, True, "y" * 10**5])
def test_a_start_layer_that_is_none_is_shown(changed: Callable[..., str], start: object) -> None:
    with pytest.raises(ValueError, match=r"start_layer=.*: model='.*' has 8 layers; allowed: integers") as info:
        MatroyshkaCheckpoint(changed(FULL, {"start_layer": start}), (), None)
    assert len(str(info.value)) < 500


def test_a_token_that_the_model_does_not_know(changed: Callable[..., str]) -> None:
    folder = changed(RAW)
    path = Path(folder) / "tokenizer.json"
    said = json.loads(path.read_text())
    said["added_tokens"].append(said["added_tokens"][-1] | {"id": 70_000, "content": "panda"})
    path.write_text(json.dumps(said))
    assert np.isfinite(MatroyshkaReranker(folder).compute_score(("a", "b")))
    with pytest.raises(ScoringError, match=r"pairs\[0\] holds token 70\d+ of the tokenizer, but the model knows 700 t"):
        MatroyshkaReranker(folder).compute_score(("a", "a panda"))
