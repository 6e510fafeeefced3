"""Configurations are read as data; one that does not describe a causal decoder is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MODELS, words

from pyterrier_llmrerank import MatroyshkaReranker
from pyterrier_llmrerank.checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint

RAW, FULL, SD = (str(MODELS / name) for name in ("mistral_base", "costwise_full", "adapter_sd"))
BASE, ADAPTER = str(MODELS / "rankllama_base"), str(MODELS / "rankllama_adapter")


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
def test_a_configuration_of_no_causal_decoder_is_refused(
    changed: Callable[..., str], config: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MatroyshkaCheckpoint(changed(RAW, config), (), None)


def test_kernels_that_a_configuration_names_are_not_fetched(changed: Callable[..., str]) -> None:
    names = dict.fromkeys(["attn_implementation", "_attn_implementation", "experts_implementation"], "someone/kernels")
    folder = changed(RAW, names | {"text_config": names})
    config = MatroyshkaCheckpoint(folder, (), None).config
    assert "someone/kernels" not in str(config.to_dict()) + str(config._attn_implementation)
    assert MatroyshkaReranker(folder).compute_score(("a", "b")) == MatroyshkaReranker(RAW).compute_score(("a", "b"))


def test_labels_without_number_take_no_memory(changed: Callable[..., str]) -> None:
    assert MatroyshkaCheckpoint(changed(RAW, {"num_labels": 10**12}), (), None).layers == 8
