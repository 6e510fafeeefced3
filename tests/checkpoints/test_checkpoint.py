"""Every layout that the systems are published in opens; what does not fit is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODELS, heads

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
from pyterrier_llmrerank.checkpoints.rankllama_checkpoint import RankLLaMACheckpoint

RAW, FULL, SD = (str(MODELS / name) for name in ("mistral_base", "costwise_full", "adapter_sd"))
BASE, ADAPTER = str(MODELS / "rankllama_base"), str(MODELS / "rankllama_adapter")


def test_remote_code_is_neither_needed_nor_run(changed: Callable[..., str]) -> None:
    folder = changed(FULL, {"auto_map": {"AutoModelForCausalLM": "code.Evil", "AutoConfig": "code.Evil"}})
    tokenizer = Path(folder) / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["code.Evil", "code.Evil"]}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | own))
    (Path(folder) / "code.py").write_text("raise SystemExit('executed')")
    assert heads(MatroyshkaCheckpoint(folder, (), None)).shape == (7, 64)
    pair = ("a query", "a passage")
    assert MatroyshkaReranker(folder).compute_score(pair) == MatroyshkaReranker(FULL).compute_score(pair)


def test_nothing_is_said_about_a_model_type_of_our_own(capfd: pytest.CaptureFixture[str]) -> None:
    MatroyshkaCheckpoint(FULL, (), None).tokenizer()
    assert capfd.readouterr().err == ""


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
def test_a_tensor_that_scores_would_ignore_is_refused_by_name(
    changed: Callable[..., str], model: str, name: str
) -> None:
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


def test_no_model_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"model='.*adapter_sd': .* has no config\.json"):
        MatroyshkaCheckpoint(SD, (), None)


def test_a_head_that_is_missing(changed: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.3\.linear_head\.weight'"):
        heads(MatroyshkaCheckpoint(changed(FULL, **{"lm_head.3.linear_head.weight": None}), (), None))
    with pytest.raises(ValueError, match="no score head"):
        heads(RankLLaMACheckpoint(BASE, None))


def test_no_tokenizer(changed: Callable[..., str]) -> None:
    folder = changed(RAW)
    for file in Path(folder).glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="no usable tokenizer"):
        MatroyshkaCheckpoint(folder, (), None).tokenizer()


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


def test_a_token_that_the_model_does_not_know(changed: Callable[..., str]) -> None:
    folder = changed(RAW)
    path = Path(folder) / "tokenizer.json"
    said = json.loads(path.read_text())
    said["added_tokens"].append(said["added_tokens"][-1] | {"id": 70_000, "content": "panda"})
    path.write_text(json.dumps(said))
    assert np.isfinite(MatroyshkaReranker(folder).compute_score(("a", "b")))
    with pytest.raises(ScoringError, match=r"pairs\[0\] holds token 70\d+ of the tokenizer, but the model knows 700 t"):
        MatroyshkaReranker(folder).compute_score(("a", "a panda"))
