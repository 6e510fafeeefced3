"""Decoders of other families run by their own forward, which gives supported families the same scores."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODELS, ids_of, words
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BioGptConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.checkpoints import checkpoint as checkpoints
from pyterrier_llmrerank.engine.inputs import Ids
from pyterrier_llmrerank.training import RankLLaMATraining
from pyterrier_llmrerank.training.model import RankingModel

FULL, BASE = str(MODELS / "costwise_full"), str(MODELS / "mistral_base")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 700}
LLAMA_LIKE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=700, pad_token_id=0),
    "gemma2": Gemma2Config(**LLAMA_LIKE, head_dim=8, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48, pad_token_id=0),
    "mixtral": MixtralConfig(**LLAMA_LIKE, num_local_experts=2, pad_token_id=0),
    "phi3": Phi3Config(**LLAMA_LIKE, pad_token_id=0),
    "qwen2_moe": Qwen2MoeConfig(  # saved with a sliding window of 0
        **LLAMA_LIKE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, pad_token_id=0
    ),
}
PAIRS = [("panda", words(3, 9)), ("panda", words(4, 30)), ("bear tree", words(5, 2))]


def saved(folder: Path, config: PreTrainedConfig, kind: type = AutoModelForSequenceClassification) -> torch.nn.Module:
    """Save a random model, with the tokenizer of another."""
    torch.manual_seed(3)
    options = {"num_labels": 1} if kind is AutoModelForSequenceClassification else {}
    config = type(config)(**{**config.to_dict(), **options})
    model = kind.from_config(config).eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return model


def add(folder: Path, name: str, tensor: torch.Tensor | None = torch.ones(3)) -> None:  # noqa: B008
    """Add a tensor to a model's file, or remove one."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", CONFIGS)
def test_rankllama_over_another_family_scores_as_transformers_does(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path, CONFIGS[name])
    reranker = RankLLaMAReranker(tmp_path, dtype="float32")
    scores = reranker.compute_score(PAIRS)
    ids = ids_of(reranker, PAIRS)
    with torch.inference_mode():
        wanted = [model(input_ids=torch.tensor([pair.flat()])).logits.item() for pair in ids]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)
    assert np.ptp(wanted) > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_matroyshka_over_another_family_reads_layers_through_the_final_norm(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path, CONFIGS[name], AutoModelForCausalLM)
    reranker = MatroyshkaReranker(tmp_path, start_layer=1, cutoff=[2, 3], dtype="float32")
    scores = reranker.compute_score(PAIRS)
    _, _, tokenizer = reranker.scorer().weights[0].at_depth(3)
    yes = tokenizer("Yes", add_special_tokens=False)["input_ids"][-1]
    shallow = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2).eval()
    for layers, of in zip((shallow, model), scores, strict=True):
        head = layers.get_output_embeddings().weight[yes]
        for score, pair in zip(of, ids_of(reranker, PAIRS), strict=True):
            with torch.inference_mode():
                state = layers.base_model(input_ids=torch.tensor([pair.flat()])).last_hidden_state[0, -1]
                assert score == pytest.approx((state @ head).item(), abs=1e-5)


def test_a_model_without_attention_heads_scores_as_transformers_does(tmp_path: Path) -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=700, state_size=8, pad_token_id=0)
    model = saved(tmp_path, config, AutoModelForCausalLM)
    reranker = MatroyshkaReranker(tmp_path, start_layer=1, cutoff=3, dtype="float32", device="cpu")
    yes = reranker.scorer().weights[0].at_depth(3)[2]("Yes", add_special_tokens=False)["input_ids"][-1]
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids.flat()])).logits for ids in ids_of(reranker, PAIRS)]
    wanted = [of[0, -1, yes].item() for of in logits]
    np.testing.assert_allclose(reranker.compute_score(PAIRS), wanted, atol=1e-5)


def test_both_decoders_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    makers = [
        lambda: MatroyshkaReranker(BASE, adapters=[MODELS / "adapter_sd"], start_layer=2, cutoff=[2, 5, 8]),
        lambda: RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base"),
    ]
    for make in makers:
        layerwise = make()
        layerwise.dtype = "float32"
        wanted = layerwise.compute_score(PAIRS)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "FAMILIES", ())
            plain = make()
            plain.dtype = "float32"
            del layerwise  # else its weights are shared
            np.testing.assert_allclose(plain.compute_score(PAIRS), wanted, atol=1e-4)
            assert not plain.scorer().checkpoint.supports_layerwise


def test_layers_may_differ_in_size(tmp_path: Path) -> None:
    """Gemma 3n has layers of several widths, and several states per token between them."""
    config = Gemma3nTextConfig(
        **LLAMA_LIKE | {"intermediate_size": [48, 64, 32]}, head_dim=8, hidden_size_per_layer_input=8, laurel_rank=4,
        vocab_size_per_layer_input=700, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 3, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    model = saved(tmp_path, config, AutoModelForCausalLM)
    reranker = MatroyshkaReranker(tmp_path, start_layer=1, cutoff=3, dtype="float32")
    scores, tokenizer = reranker.compute_score(PAIRS), reranker.tokenizer
    head = model.get_output_embeddings().weight[tokenizer("Yes", add_special_tokens=False)["input_ids"][-1]]
    for score, pair in zip(scores, ids_of(reranker, PAIRS), strict=True):
        with torch.inference_mode():
            state = model.base_model(input_ids=torch.tensor([pair.flat()])).last_hidden_state[0, -1]
            assert score == pytest.approx((state @ head).item(), abs=1e-5)
    with pytest.raises(ValueError, match="cutoff=2: the final norm of .* is not known; allowed: 3"):
        reranker.at(cutoff=2).compute_score(PAIRS)
    path = tmp_path / "config.json"
    for sizes in ([0, 64, 32], [48, 64, 2.5], "48"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": sizes}))
        with pytest.raises(ValueError, match="intermediate_size is .*; allowed: integers from 1 to"):
            MatroyshkaReranker(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.scale"),
        ("gpt2", "transformer.h.3.ln_1.weight"),
        ("gpt2", "score.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.q_norm.weight"),
        ("mixtral", "model.layers.0.self_attn.q_proj.bias"),
        ("gemma2", "model.layers.0.self_attn.k_norm.weight"),
    ],
)
def test_a_tensor_that_scores_would_ignore_is_named(tmp_path: Path, name: str, tensor: str) -> None:
    for kind, cls in (
        (AutoModelForSequenceClassification, RankLLaMAReranker),
        (AutoModelForCausalLM, MatroyshkaReranker),
    ):
        saved(tmp_path, CONFIGS[name], kind)
        add(tmp_path, tensor)
        with pytest.raises(ValueError, match=rf"has a tensor '{tensor}', which a model_type '{name}' with this config"):
            cls(tmp_path).compute_score(PAIRS[0])


def test_gemma_2_under_the_name_of_gemma_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["gemma2"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gemma"}))
    with pytest.raises(
        ValueError, match=r"has a tensor 'model\.layers\.0\.p\w+_feedforward_layernorm\.weight'.*'gemma'"
    ):
        RankLLaMAReranker(tmp_path).compute_score(PAIRS[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 64, 9, 9), (1, 1, 9, 8)])
def test_a_bias_of_attention_is_no_mask(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    saved(tmp_path, CONFIGS[name])
    add(tmp_path, "model.layers.0.attn.bias", torch.ones(shape))
    with pytest.raises(ValueError, match=r"has a tensor '.*attn\.bias', which a model_type"):
        RankLLaMAReranker(tmp_path).compute_score(PAIRS[0])


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForCausalLM])
def test_a_merged_model_is_not_written(tmp_path: Path, kind: type) -> None:
    saved(tmp_path / "model", CONFIGS["gpt_neox"], kind)
    cls = RankLLaMAReranker if kind is AutoModelForSequenceClassification else MatroyshkaReranker
    with pytest.raises(ValueError, match=r"merged=True: the layers of model='.*' \(model_type 'gpt_neox'\) cannot be"):
        cls(tmp_path / "model").save(tmp_path / "saved", merged=True)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("buffer", "shape"),
    [
        ("attn.masked_bias", ()),
        ("attention.bias", (1, 1, 9, 9)),
        ("attn.causal_mask", (1, 1, 9, 9)),
        ("attn.embed_positions", (9, 4)),
        ("rotary_emb.inv_freq", (3,)),
        ("self_attention.maybe_rotary.inv_freq", (3,)),
        ("self_attn.rotary_emb.cos_cached", (1, 1, 9, 4)),
        ("lm_head.weight", (3,)),
    ],
)
def test_tensors_that_are_computed_or_unused_change_nothing(
    tmp_path: Path, name: str, buffer: str, shape: tuple[int, ...]
) -> None:
    saved(tmp_path, CONFIGS[name])
    wanted = RankLLaMAReranker(tmp_path).compute_score(PAIRS)
    add(tmp_path, buffer if buffer == "lm_head.weight" else f"model.layers.0.{buffer}", torch.ones(shape))
    np.testing.assert_array_equal(RankLLaMAReranker(tmp_path).compute_score(PAIRS), wanted)


def test_a_missing_language_model_head_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, CONFIGS["phi3"])
    add(tmp_path, "score.weight", None)
    with pytest.raises(ValueError, match=r"the checkpoint has no tensor 'lm_head\.weight'"):
        MatroyshkaReranker(tmp_path).compute_score(PAIRS[0])


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForCausalLM])
def test_weights_are_read_from_the_complete_format(tmp_path: Path, kind: type) -> None:
    """A leftover index of another format is ignored."""
    saved(tmp_path, CONFIGS["gpt2"], kind)
    reranker = RankLLaMAReranker if kind is AutoModelForSequenceClassification else MatroyshkaReranker
    wanted = reranker(tmp_path, dtype="float32").compute_score(PAIRS)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "gone.safetensors"}}')
    np.testing.assert_allclose(reranker(tmp_path, dtype="float32").compute_score(PAIRS), wanted, atol=1e-5)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    model = saved(tmp_path / "base", CONFIGS["gpt_neox"])
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query_key_value"], init_lora_weights=False)
    peft = get_peft_model(model, lora)
    peft.save_pretrained(tmp_path / "adapter")
    with_adapter = RankLLaMAReranker(tmp_path / "adapter", base_model=tmp_path / "base", dtype="float32")
    score = with_adapter.compute_score(PAIRS[0])
    (pair,) = ids_of(with_adapter, PAIRS[:1])
    with torch.inference_mode():
        assert score == pytest.approx(peft(input_ids=torch.tensor([pair.flat()])).logits.item(), abs=1e-5)
    assert score != pytest.approx(
        RankLLaMAReranker(tmp_path / "base", dtype="float32").compute_score(PAIRS[0]), abs=1e-4
    )


def test_linear_layers_are_quantised(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    saved(tmp_path / "phi3", CONFIGS["phi3"])
    wanted = RankLLaMAReranker(tmp_path / "phi3", dtype="float32").compute_score(PAIRS)
    quantised = RankLLaMAReranker(tmp_path / "phi3", dtype="float32", quantization="int8", attn_implementation="sdpa")
    np.testing.assert_allclose(quantised.compute_score(PAIRS), wanted, atol=0.1 * np.abs(wanted).max())
    model, _, _ = quantised.scorer().weights[0].at_depth(3)
    kinds = [type(m.weight.data).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert kinds == ["Int8Tensor"] * 3 * 4
    saved(tmp_path / "gpt2", CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="model_type 'gpt2' has no linear layers to quantise; allowed: quantization=N"):
        RankLLaMAReranker(tmp_path / "gpt2", quantization="int8").compute_score(PAIRS)


def test_unsupported_options_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "gpt2", CONFIGS["gpt2"], AutoModelForCausalLM)
    with pytest.raises(ValueError, match=r"compress_ratio=2: the layers of .*'gpt2'.* cannot be run one by one"):
        MatroyshkaReranker(tmp_path / "gpt2", compress_layers=1, compress_ratio=2)
    for option in ({"torch_compile": True}, {"attn_implementation": "eager"}):
        ((name, value),) = option.items()
        for cls in (MatroyshkaReranker, RankLLaMAReranker):
            with pytest.raises(
                ValueError, match=f"{name}={value!r}: the layers of .*'gpt2'.* cannot be run one by one"
            ):
                cls(tmp_path / "gpt2", **option).compute_score(PAIRS[0])
    untrained = RankLLaMATraining().open(str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match="model_type 'gpt2' cannot be trained here; allowed: llama"):
        RankingModel(untrained, torch.zeros(1, 32))
    opt = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=700, word_embed_proj_dim=32
    )
    saved(tmp_path / "opt", opt, AutoModelForCausalLM)
    assert np.isfinite(MatroyshkaReranker(tmp_path / "opt", start_layer=1).compute_score(PAIRS[0]))
    with pytest.raises(ValueError, match="cutoff=2: the final norm of .* is not known; allowed: 3"):
        MatroyshkaReranker(tmp_path / "opt", start_layer=1, cutoff=2).compute_score(PAIRS[0])
    bert = BertConfig(**SIZES, intermediate_size=48)
    saved(tmp_path / "bert", bert)
    with pytest.raises(ValueError, match="in model_type 'bert' a token sees later ones"):
        RankLLaMAReranker(tmp_path / "bert").compute_score(PAIRS[0])


TABLES = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=700, n_positions=40, pad_token_id=0),
    "gpt_neo": GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=700, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=40,
    ),
    "gptj": GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=700, n_positions=40),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=700, word_embed_proj_dim=32,
        max_position_embeddings=40,
    ),
    "biogpt": BioGptConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=700,
        max_position_embeddings=40,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_pair_longer_than_the_models_positions_is_named(tmp_path: Path, name: str) -> None:
    """The longest pair that fits is scored; one more token is refused before its chunk is scored."""
    saved(tmp_path, TABLES[name], AutoModelForCausalLM)
    scorer = MatroyshkaReranker(tmp_path, dtype="float32").scorer()

    def encode(_: object, pairs: list[tuple[str, str]]) -> list[Ids]:
        return [Ids([1, 2], list(range(3, int(text))), [7, 8, 9]) for _, text in pairs]

    scorer = replace(scorer, encode=encode)
    assert np.isfinite(scorer.score([("a", "38"), ("a", "9")])).all()  # 40 tokens
    said = r"^pairs\[1\] has 41 tokens, but the model has 40 positions; use fewer"
    with pytest.raises(ScoringError, match=said) as info:
        scorer.score([("a", "9"), ("a", "39")])
    assert np.isnan(info.value.scores).all()


def test_computed_positions_allow_any_length(tmp_path: Path) -> None:
    config = Phi3Config(**LLAMA_LIKE, pad_token_id=0, max_position_embeddings=8, original_max_position_embeddings=8)
    saved(tmp_path, config)
    assert np.isfinite(RankLLaMAReranker(tmp_path, dtype="float32").compute_score(PAIRS)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_states_that_are_read_are_kept(tmp_path: Path, name: str) -> None:
    """Layers hand them over; transformers is not asked for its record of all states."""
    saved(tmp_path / name, CONFIGS[name], AutoModelForCausalLM)
    reranker = MatroyshkaReranker(tmp_path / name, start_layer=1, cutoff=[1, 3], dtype="float32")
    asked = []
    reranker.scorer().open().model.register_forward_pre_hook(
        lambda model, args, options: asked.append(options.get("output_hidden_states", False)), with_kwargs=True
    )
    assert np.isfinite(reranker.compute_score(PAIRS)).all()
    assert asked == [False]


def test_threads_read_their_own_states(tmp_path: Path) -> None:
    """Rerankers of several cutoffs share one model, and each call runs in a thread of its own."""
    saved(tmp_path, CONFIGS["gpt2"], AutoModelForCausalLM)
    reranker = MatroyshkaReranker(tmp_path, start_layer=1, cutoff=[1, 2], dtype="float32")
    pairs = [[("panda", words(number, 5 + 3 * number))] for number in range(6)]
    wanted = [np.asarray(reranker.compute_score(pair)) for pair in pairs]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda number: np.asarray(reranker.compute_score(pairs[number % 6])), range(90)))
    for number, scores in enumerate(got):
        np.testing.assert_allclose(scores, wanted[number % 6], atol=1e-5)
