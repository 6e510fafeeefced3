"""Random small models with random adapters score as transformers and PEFT have it.

``LLMRERANK_FUZZ`` says how many random models each test makes of a family, 10 by default.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, ids_of, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker

TOKENIZER = AutoTokenizer.from_pretrained(MODELS / "mistral_base")
PAIRS = [("panda", words(3, 9)), ("what is bread", words(4, 30)), ("coffee", "tide")]
MODELS_MADE = int(os.environ.get("LLMRERANK_FUZZ", "10"))
FUZZED = settings(
    max_examples=MODELS_MADE,
    derandomize=MODELS_MADE == 10,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROTARY = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]  # fmt: skip


@st.composite
def configs(draw: st.DrawFn, family: str) -> PreTrainedConfig:
    """A configuration of a family whose layers are run one by one."""
    kv_heads, sharing, head_dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 8, 12]))
    heads = kv_heads * sharing
    layers = draw(st.integers(1, 4))
    said: dict[str, Any] = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": heads * head_dim if draw(st.booleans()) else 2 * heads * draw(st.integers(2, 5)),
        "intermediate_size": draw(st.integers(3, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu", "gelu_pytorch_tanh"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": draw(st.sampled_from(ROTARY)) | {"rope_theta": draw(st.sampled_from([100.0, 1e4, 1e6]))},
        "attention_dropout": draw(st.sampled_from([0.0, 0.1])),
    }
    if family == "qwen2":
        del said["head_dim"]  # has none of its own
        said["hidden_size"] = heads * head_dim
    if family in ("llama", "qwen3"):
        said["attention_bias"] = draw(st.booleans())
    if family == "llama":
        said["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        said["sliding_window"] = draw(st.sampled_from([None, 1, 7, 100]))
    if family.startswith("qwen"):
        said["use_sliding_window"] = draw(st.booleans())
        said["sliding_window"] = draw(st.sampled_from([1, 7, 100]))
        said["max_window_layers"] = draw(st.integers(0, layers))
    if draw(st.booleans()):
        said["is_causal"] = draw(st.sampled_from([True, True, False]))
    return FAMILIES[family](**said, bos_token_id=1, eos_token_id=2, pad_token_id=None)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of ``LoraConfig`` for a plain LoRA adapter."""
    target = draw(st.lists(st.sampled_from(LINEAR), min_size=1, max_size=4, unique=True))
    said: dict[str, Any] = {
        "target_modules": target,
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.sampled_from([1, 3, 16, 0.5])),
        "use_rslora": draw(st.booleans()),
        "lora_dropout": draw(st.sampled_from([0.0, 0.1])),
    }
    if draw(st.booleans()):
        said["rank_pattern"] = {target[0]: draw(st.integers(1, 5))}
    if draw(st.booleans()):
        name = draw(st.sampled_from([target[-1], rf".*\.0\.\w+\.{target[0]}", f"layers.0.self_attn.{target[0]}"]))
        said["alpha_pattern"] = {name: draw(st.sampled_from([2, 7]))}
    if draw(st.booleans()):
        said["layers_to_transform"] = [0]
    return said


def shaken(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter random numbers; zeros and ones would hide that a parameter is not read."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.8 + 0.2 * noise if parameter.dim() == 1 and parameter.data.eq(1).all() else 0.3 * noise


def base(
    folder: Path, kind: Any, config: PreTrainedConfig, seed: int, dtype: torch.dtype, shard: str
) -> PreTrainedModel:
    """A random model, saved in a folder with a tokenizer."""
    model = kind.from_config(config)
    shaken(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    TOKENIZER.save_pretrained(folder)
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(model: PreTrainedModel, said: dict[str, Any], task: str, seed: int, folder: Path) -> PeftModel:
    """The model with a random adapter, which is saved, too."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(task_type=task, init_lora_weights=False, **said))
    peft.save_pretrained(folder)
    return peft.eval()


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHARDS = st.sampled_from(["5GB", "20KB"])
SEEDS = st.integers(0, 2**31)


@pytest.mark.parametrize("family", FAMILIES)
@FUZZED
@given(st.data(), adapters(), SEEDS, DTYPES, SHARDS)
def test_rankllama_scores_as_peft_does(
    family: str, data: st.DataObject, said: dict[str, Any], seed: int, dtype: torch.dtype, shard: str
) -> None:
    config = data.draw(configs(family))
    config.num_labels = 1
    with tempfile.TemporaryDirectory() as temporary:
        folder, adapter = Path(temporary) / "base", Path(temporary) / "adapter"
        model = base(folder, AutoModelForSequenceClassification, config, seed, dtype, shard)
        peft = adapted(model, said, "SEQ_CLS", seed, adapter)
        reranker = RankLLaMAReranker(adapter, base_model=folder, dtype="float32")
        if not getattr(config, "is_causal", True):
            with pytest.raises(ValueError, match="is_causal is False"):
                reranker.compute_score(PAIRS)
            return
        scores = reranker.compute_score(PAIRS)
        pairs = ids_of(reranker, PAIRS)
    with torch.inference_mode():
        wanted = [peft(input_ids=torch.tensor([pair.flat()])).logits.item() for pair in pairs]
    np.testing.assert_allclose(scores, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@FUZZED
@given(st.data(), st.lists(adapters(), max_size=2), SEEDS, DTYPES, SHARDS)
def test_matroyshka_scores_as_peft_does_at_every_layer(
    family: str, data: st.DataObject, said: list[dict[str, Any]], seed: int, dtype: torch.dtype, shard: str
) -> None:
    config = data.draw(configs(family))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        model = base(folder, AutoModelForCausalLM, config, seed, dtype, shard)
        names = [Path(temporary) / f"adapter{number}" for number in range(len(said))]
        for number, (options, name) in enumerate(zip(said, names, strict=True)):
            model = adapted(model, options, "CAUSAL_LM", seed + number, name).merge_and_unload()
        cutoffs = list(range(1, config.num_hidden_layers + 1))
        if not getattr(config, "is_causal", True):
            with pytest.raises(ValueError, match="is_causal is False"):
                MatroyshkaReranker(folder, adapters=names, start_layer=1, cutoff=cutoffs, dtype="float32")
            return
        reranker = MatroyshkaReranker(folder, adapters=names, start_layer=1, cutoff=cutoffs, dtype="float32")
        scores, tokenizer = reranker.compute_score(PAIRS), reranker.tokenizer  # as transformers opens it for a family
        pairs = ids_of(reranker, PAIRS)
    row = model.lm_head.weight[tokenizer("Yes", add_special_tokens=False)["input_ids"][-1]]
    wanted = []
    with torch.inference_mode():
        for pair in pairs:
            states = model.model(input_ids=torch.tensor([pair.flat()]), output_hidden_states=True).hidden_states
            normed = [model.model.norm(state) for state in states[1:-1]] + [states[-1]]
            wanted.append([(state[0, -1] @ row).item() for state in normed])
    scores = np.reshape(scores, (len(cutoffs), len(PAIRS)))
    np.testing.assert_allclose(scores, np.transpose(wanted), atol=1e-4, rtol=0)
