"""Every layout of files and keys that models and adapters are published in opens, with the same scores.

The numbers are random; files, names and configurations are laid out as the makers of models have them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, ids_of, words
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralModel,
)

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.input_format import InputFormat
from pyterrier_llmrerank.engine.inputs import MatroyshkaInputs, RankLLaMAInputs

TOKENIZER = AutoTokenizer.from_pretrained(MODELS / "rankllama_base")
PAIRS = [("panda", words(3, 9)), ("what is bread", words(4, 30)), ("coffee", "tide")]
SIZES = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
Tensors = dict[str, Tensor]


# -- files


def one(folder: Path, tensors: Tensors, stem: str = "model") -> None:
    """Save one safetensors file."""
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def one_bin(folder: Path, tensors: Tensors, stem: str = "pytorch_model") -> None:
    """Save one pickle."""
    torch.save(tensors, folder / f"{stem}.bin")


def older_bin(folder: Path, tensors: Tensors, stem: str = "pytorch_model") -> None:
    """Save one pickle in the format before torch 1.6."""
    torch.save(tensors, folder / f"{stem}.bin", _use_new_zipfile_serialization=False)


def shards(folder: Path, tensors: Tensors, suffix: str = "safetensors", stem: str = "model") -> None:
    """Save three files and their index."""
    names, where = sorted(tensors), {}
    for number in range(3):
        file = f"{stem}-{number + 1:05}-of-00003.{suffix}"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def shards_bin(folder: Path, tensors: Tensors) -> None:
    """Save three pickles and their index."""
    shards(folder, tensors, "bin", "pytorch_model")


def both_shards(folder: Path, tensors: Tensors) -> None:
    """Save twice, as in meta-llama/Llama-2-7b-hf: older pickles beside safetensors."""
    shards_bin(folder, tensors)
    shards(folder, tensors)


FILES: list[Callable[..., None]] = [one, one_bin, older_bin, shards, shards_bin, both_shards]


# -- RankLLaMA: an adapter over its base


def base_config(folder: Path) -> None:
    """A configuration like Llama 2's, from transformers 4."""
    said = SIZES | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))
    TOKENIZER.save_pretrained(folder)


class Trained:
    """A RankLLaMA adapter in PEFT: its tensors, the tensors of its base, and its scores."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(**SIZES, rms_norm_eps=1e-5, num_labels=1, pad_token_id=None)
        model = LlamaForSequenceClassification(config)
        self.base = {name: tensor.clone() for name, tensor in model.model.state_dict(prefix="model.").items()}
        self.base["lm_head.weight"] = torch.randn(len(TOKENIZER), 32)
        lora = LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=8, init_lora_weights=False,
            target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )  # fmt: skip
        self.peft: PeftModel = get_peft_model(model, lora).eval()
        self.peft.save_pretrained(folder)
        self.adapter = load_file(folder / "adapter_model.safetensors")
        self.config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        self.pairs = RankLLaMAInputs()(TOKENIZER, [(query, InputFormat().body(passage)) for query, passage in PAIRS])
        self.scores = self.reranker(self.peft)

    def reranker(self, model: torch.nn.Module) -> list[float]:
        """The scores of a sequence classifier."""
        with torch.inference_mode():
            return [model(input_ids=torch.tensor([pair.flat()])).logits.item() for pair in self.pairs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("peft"))


def renamed(*changes: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """Tensors with other endings of their names."""

    def rename(tensors: Tensors) -> Tensors:
        for old, new in changes:
            tensors = {
                name.removesuffix(old) + new if name.endswith(old) else name: tensor for name, tensor in tensors.items()
            }
        return tensors

    return rename


def with_angles(tensors: Tensors) -> Tensors:
    """Tensors with the buffers that transformers before 4.32 saved in each layer."""
    angles = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(4) for layer in range(4)}
    return tensors | angles


def headless(tensors: Tensors) -> Tensors:
    """Tensors as ``AutoModel`` saves them: without a head and without the prefix."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


#: How a base's tensors are called.
BASES: dict[str, Callable[[Tensors], Tensors]] = {
    "today's": dict,
    "of transformers before 4.32": with_angles,
    "of AutoModel": headless,
}

#: How an adapter's tensors are called.
ADAPTERS: dict[str, Callable[[Tensors], Tensors]] = {
    "today's": dict,  # castorini/rankllama-v1-7b-lora-passage too: PEFT leaves out the adapter's name
    "with the adapter's name": renamed(
        (".lora_A.weight", ".lora_A.default.weight"),
        (".lora_B.weight", ".lora_B.default.weight"),
        ("score.weight", "score.modules_to_save.default.weight"),
    ),
    "with modules_to_save": renamed(("score.weight", "score.modules_to_save.weight")),
}


@pytest.mark.parametrize("layout", FILES, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("names", BASES)
def test_a_base_scores_as_peft_does(trained: Trained, tmp_path: Path, names: str, layout: Callable[..., None]) -> None:
    (tmp_path / "base").mkdir()
    base_config(tmp_path / "base")
    layout(tmp_path / "base", BASES[names](trained.base))
    adapter(trained, tmp_path / "adapter", "today's", one)
    reranker = RankLLaMAReranker(tmp_path / "adapter", base_model=tmp_path / "base", dtype="float32")
    np.testing.assert_allclose(reranker.compute_score(PAIRS), trained.scores, atol=1e-4)


def adapter(trained: Trained, folder: Path, names: str, layout: Callable[..., None], **config: object) -> None:
    """An adapter's folder."""
    folder.mkdir()
    layout(folder, ADAPTERS[names](trained.adapter), stem="adapter_model")
    (folder / "adapter_config.json").write_text(json.dumps(config or trained.config))


#: What the first versions of PEFT write into an adapter's configuration, as in castorini's.
EARLY = {
    "auto_mapping": None, "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_alpha": 8, "lora_dropout": 0.1, "modules_to_save": None, "peft_type": "LORA",
    "r": 4, "revision": None, "task_type": "SEQ_CLS",
    "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj", "up_proj", "gate_proj"],
}  # fmt: skip


@pytest.mark.parametrize("layout", [one, one_bin, older_bin], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("names", ADAPTERS)
@pytest.mark.parametrize("config", [{}, EARLY], ids=["today's config", "early config"])
def test_an_adapter_scores_as_peft_does(
    trained: Trained, tmp_path: Path, names: str, layout: Callable[..., None], config: dict[str, object]
) -> None:
    (tmp_path / "base").mkdir()
    base_config(tmp_path / "base")
    one(tmp_path / "base", trained.base)
    adapter(trained, tmp_path / "adapter", names, layout, **config)
    reranker = RankLLaMAReranker(tmp_path / "adapter", base_model=tmp_path / "base", dtype="float32")
    np.testing.assert_allclose(reranker.compute_score(PAIRS), trained.scores, atol=1e-4)
    assert np.ptp(trained.scores) > 0.01


# -- RankLLaMA: merged models

#: What the configuration of a merged model says, beside its sizes, by who wrote it.
MERGED: dict[str, dict[str, Any]] = {
    "transformers 4": {"model_type": "llama", "rope_theta": 5e4, "torch_dtype": "float32"},
    "transformers 5": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "dtype": "float32",
    },
    "rope_scaling of 4.31": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_scaling of Llama 3.1": {
        "model_type": "llama",
        "rope_theta": 5e4,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "Mistral": {"model_type": "mistral", "sliding_window": 8, "rope_theta": 1e4},
    "Mistral Nemo": {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "Qwen 2.5": {
        "model_type": "qwen2",
        "sliding_window": 8,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "rope_theta": 1e6,
    },
    "Qwen 3": {
        "model_type": "qwen3",
        "head_dim": 12,
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("layout", [one, shards_bin], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("made", MERGED)
def test_a_merged_model_scores_as_transformers_does(tmp_path: Path, made: str, layout: Callable[..., None]) -> None:
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[MERGED[made]["model_type"]]
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    said = SIZES | MERGED[made] | labels | {"architectures": [f"{kind}ForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    TOKENIZER.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path))
    layout(tmp_path, {name: torch.randn_like(t) * 0.2 + (t == 1) for name, t in model.state_dict().items()})
    reranker = RankLLaMAReranker(tmp_path, dtype="float32")
    scores = reranker.compute_score(PAIRS)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    wanted = []
    for query, passage in PAIRS:
        (pair,) = ids_of(reranker, [(query, passage)])
        with torch.inference_mode():
            wanted.append(opened(input_ids=torch.tensor([pair.flat()])).logits.item())
    np.testing.assert_allclose(scores, wanted, atol=1e-4)
    assert np.ptp(wanted) > 0.01


# -- Matroyshka

#: As BAAI/Matroyshka-ReRanker-passage says it, in small.
LAYER_WISE = SIZES | {
    "_name_or_path": "mistralai/Mistral-7B-v0.1", "architectures": ["CostWiseMistralForCausalLM"],
    "auto_map": {
        "AutoConfig": "mistral_config.CostWiseMistralConfig",
        "AutoModelForCausalLM": "mistral_model.CostWiseMistralForCausalLM",
    },
    "hidden_act": "silu", "layer_sep": 1, "layer_wise": True, "model_type": "cost_wise_mistral", "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "sliding_window": 4096, "start_layer": 2, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.1", "use_cache": True,
}  # fmt: skip
HEADS = [f"lm_head.{k}.linear_head" for k in range(3)]


def matroyshka() -> Tensors:
    """A layer-wise model's tensors."""
    torch.manual_seed(0)
    model = MistralModel(MistralConfig(**SIZES, rms_norm_eps=1e-5))
    return model.state_dict(prefix="model.") | {f"{head}.weight": torch.randn(1, 32) for head in HEADS}


def compensation(seed: int) -> Tensors:
    """A LoRA adapter's tensors, of all linear layers and heads, by the names of its modules."""
    torch.manual_seed(seed)
    linear = {name: tensor for name, tensor in matroyshka().items() if "_proj" in name or "linear_head" in name}
    sides = {}
    for name, tensor in linear.items():
        module = "base_model.model." + name.removesuffix(".weight")
        sides[f"{module}.lora_A.weight"] = torch.randn(2, tensor.shape[1]) * 0.1
        sides[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], 2) * 0.1
    return sides


def naive(tensors: Tensors, updates: list[Tensors], pairs: list[Any], alpha: float = 8) -> np.ndarray:
    """Scores ``[layers, pairs]`` of a model whose updates, of rank 2, are added to its weights one by one."""
    merged = {name: tensor.float().clone() for name, tensor in tensors.items()}
    for sides in updates:
        for key in [key for key in sides if key.endswith(".lora_A.weight")]:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            merged[name] += sides[key.replace("lora_A", "lora_B")] @ sides[key] * alpha / 2
    model = MistralModel(MistralConfig(**SIZES, rms_norm_eps=1e-5)).eval()
    model.load_state_dict({name.removeprefix("model."): t for name, t in merged.items() if "lm_head" not in name})
    scores = []
    with torch.inference_mode():
        for pair in pairs:
            states = model(input_ids=torch.tensor([pair.flat()]), output_hidden_states=True).hidden_states
            normed = [model.norm(states[2]), model.norm(states[3]), states[4]]
            heads = [merged[f"{head}.weight"] for head in HEADS]
            scores.append([(h @ state[0, -1]).item() for h, state in zip(heads, normed, strict=True)])
    return np.transpose(scores)


def modules_of(tensors: Tensors) -> set[str]:
    """The last parts of the names of the modules that an adapter updates."""
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name}


def lora(folder: Path, tensors: Tensors, layout: Callable[..., None]) -> None:
    """An adapter's folder as the original training writes it."""
    folder.mkdir(parents=True)
    layout(folder, tensors, stem="adapter_model")
    said = EARLY | {"r": 2, "task_type": "CAUSAL_LM", "target_modules": sorted(modules_of(tensors))}
    (folder / "adapter_config.json").write_text(json.dumps(said))


@pytest.mark.parametrize("layout", FILES, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_wise_model_scores_as_computed_naively(
    tmp_path: Path, layout: Callable[..., None], dtype: torch.dtype
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LAYER_WISE))
    TOKENIZER.save_pretrained(tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in matroyshka().items()}
    layout(tmp_path, tensors)
    reranker = MatroyshkaReranker(tmp_path, cutoff=[2, 3, 4], dtype="float32")
    wanted = naive(tensors, [], MatroyshkaInputs()(TOKENIZER, PAIRS))
    np.testing.assert_allclose(reranker.compute_score(PAIRS), wanted, atol=1e-4)
    assert np.ptp(wanted, axis=1).min() > 0.01


@pytest.mark.parametrize("layout", [one, one_bin], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("names", ["today's", "with the adapter's name"])
def test_compensation_below_a_layer_wise_model_scores_as_computed_naively(
    tmp_path: Path, layout: Callable[..., None], names: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LAYER_WISE))
    TOKENIZER.save_pretrained(tmp_path)
    shards(tmp_path, matroyshka())
    places = ["compensate/layer/full", "compensate/token/full/2"]
    updates = [compensation(1), compensation(2)]
    for place, update in zip(places, updates, strict=True):
        lora(tmp_path / place, ADAPTERS[names](update), layout)
    reranker = MatroyshkaReranker(tmp_path, adapters=places, cutoff=[2, 3, 4], dtype="float32")
    wanted = naive(matroyshka(), updates, MatroyshkaInputs()(TOKENIZER, PAIRS))
    np.testing.assert_allclose(reranker.compute_score(PAIRS), wanted, atol=1e-4)


@pytest.mark.parametrize("layout", FILES, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("names", ["today's", "of transformers before 4.32"])
def test_a_causal_language_model_scores_as_computed_naively(
    tmp_path: Path, layout: Callable[..., None], names: str
) -> None:
    plain = {k: v for k, v in LAYER_WISE.items() if k not in ("auto_map", "start_layer", "layer_sep", "layer_wise")}
    said = plain | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    TOKENIZER.save_pretrained(tmp_path)
    rows = torch.randn(len(TOKENIZER), 32, generator=torch.Generator().manual_seed(3))
    tensors = {name: t for name, t in matroyshka().items() if "lm_head" not in name}
    layout(tmp_path, BASES[names](tensors | {"lm_head.weight": rows}))
    lora(tmp_path / "distilled", compensation(1), one)
    reranker = MatroyshkaReranker(tmp_path, adapters="distilled", start_layer=2, cutoff=[2, 3, 4], dtype="float32")
    yes = rows[TOKENIZER("Yes", add_special_tokens=False)["input_ids"][-1]]
    started = tensors | {f"{head}.weight": yes[None] for head in HEADS}
    wanted = naive(started, [compensation(1)], MatroyshkaInputs()(TOKENIZER, PAIRS))
    np.testing.assert_allclose(reranker.compute_score(PAIRS), wanted, atol=1e-4)
