"""RankLLaMA gives the original scores, from every checkpoint layout and with any optional columns."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS, Cache, agree, frame, golden, words
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from pyterrier_llmrerank import RankLLaMAReranker, rankllama
from pyterrier_llmrerank.checkpoints.input_format import NAMED, InputFormat

GOLDEN = golden("rankllama.json")
ADAPTER, BASE = MODELS / "rankllama_adapter", MODELS / "rankllama_base"


def reranker(**options: object) -> RankLLaMAReranker:
    return RankLLaMAReranker(ADAPTER, base_model=BASE, dtype="float32", **options)


def golden_frame() -> pd.DataFrame:
    return pd.DataFrame(GOLDEN["pairs"]).rename(columns={"query_id": "qid", "docid": "docno"})


def scores(run: str) -> np.ndarray:
    return np.array(next(r["scores"] for r in GOLDEN["runs"] if r["id"] == run))


@pytest.fixture(params=["adapter", "adapter in .bin", "merged"])
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> RankLLaMAReranker:
    """The same model in each checkpoint layout."""
    if request.param == "adapter":
        return reranker()
    if request.param == "adapter in .bin":
        torch.save(load_file(ADAPTER / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
        shutil.copy(ADAPTER / "adapter_config.json", tmp_path)
        return RankLLaMAReranker(tmp_path, base_model=BASE, dtype="float32")
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()
    merged.score = torch.nn.Linear(64, 1, bias=False)
    head = load_file(ADAPTER / "adapter_model.safetensors")["base_model.model.score.weight"]
    merged.score.weight = torch.nn.Parameter(head)
    merged.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    return RankLLaMAReranker(tmp_path, dtype="float32")


def test_scores_are_the_original_ones(layout: RankLLaMAReranker) -> None:
    got = layout.transform(golden_frame())["score"].to_numpy()
    agree("RankLLaMA", got, scores("title_fixed_unpadded"))
    titled = golden_frame()["title"].notna().to_numpy()
    for run in ("main_unpadded", "main_padded"):
        agree("RankLLaMA", got[titled], scores(run)[titled])


def test_lengths_are_honoured() -> None:
    rows = golden_frame()
    usual = reranker().transform(rows)["score"]
    assert (reranker(query_max_length=3).transform(rows)["score"] != usual).sum() >= 5
    assert (reranker(passage_max_length=9).transform(rows)["score"] != usual).sum() >= 5
    (ids,) = reranker(query_max_length=3, passage_max_length=9).scorer().ids([(words(1, 9), words(2, 40))])
    assert (len(ids.prefix), len(ids.body)) == (1, 10)  # 3 + 9 - 2 tokens in all


def test_title_and_url_are_used_where_there_are_any() -> None:
    """The scores equal those of texts that already include title and URL."""
    plain, untitled = frame(), reranker(title_field=None)
    both = plain.assign(title="Title", url=["u.org"] * 3 + [None, float("nan"), pd.NA])

    def scores_of(prefixes: list[str]) -> np.ndarray:
        return untitled.transform(plain.assign(text=pd.Series(prefixes) + plain["text"]))["score"].to_numpy()

    with_url = reranker(url_field="url")
    wanted = scores_of(["u.org Title "] * 3 + ["Title "] * 3)
    np.testing.assert_allclose(with_url.transform(both)["score"], wanted, atol=1e-4)
    np.testing.assert_allclose(reranker().transform(both)["score"], scores_of(["Title "] * 6), atol=1e-4)
    for other in (with_url.transform(plain), untitled.transform(both)):
        np.testing.assert_allclose(other["score"], scores_of([""] * 6), atol=1e-4)


@pytest.mark.parametrize(
    ("title", "problem"), [("\ud800", "not valid Unicode"), (["a"], "not a string"), (3, "not a string")]
)
def test_an_invalid_title_is_named(title: object, problem: str) -> None:
    rows = frame().assign(title=pd.Series(["t", None, float("nan"), title, "", "t"], dtype=object))
    with pytest.raises(ValueError, match=rf"'title' is .*{problem}.* for qid 'q1', docno 'd0'"):
        reranker().transform(rows)


def test_pairs_and_frames_agree() -> None:
    rows = frame()
    got = reranker().transform(rows)["score"]
    pairs = list(zip(rows["query"], rows["text"], strict=True))
    np.testing.assert_allclose(reranker().compute_score(pairs), got, atol=1e-5)
    assert reranker().compute_score(pairs[0]) == pytest.approx(got[0], abs=1e-4)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("query_max_length", 0),
        ("query_max_length", True),
        ("passage_max_length", -1),
        ("passage_max_length", 2.5),
        ("passage_max_length", "164"),
        ("title_field", ""),
        ("url_field", 3),
        ("base_model", ""),
    ],
)
def test_arguments_are_checked(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{argument}={value!r}; allowed: "):
        RankLLaMAReranker(**{argument: value})


def test_the_default_is_the_published_passage_model() -> None:
    assert repr(RankLLaMAReranker()) == "RankLLaMAReranker('castorini/rankllama-v1-7b-lora-passage')"
    assert RankLLaMAReranker().deepest() is None


def peft_scores(
    folder: Path, base: torch.nn.Module, pairs: list[tuple[str, str]], ours: RankLLaMAReranker
) -> list[float]:
    """PEFT's scores for the token ids that our reranker reads."""
    opened = PeftModel.from_pretrained(base, folder).eval()
    ids = ours.scorer().ids([(query, f"document: {passage}") for query, passage in pairs])
    with torch.inference_mode():
        return [opened(input_ids=torch.tensor([pair.flat()])).logits.item() for pair in ids]


PAIRS = [("panda", words(3, 9)), ("tide", words(4, 30))]


def classifier(folder: Path | str = BASE) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


def test_an_adapter_with_the_untrained_head_beside_its_own_scores_as_in_peft(tmp_path: Path) -> None:
    tuned = get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=4))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    stored["base_model.model.score.original_module.weight"] = torch.ones(1, 64)
    save_file(stored, tmp_path / "adapter_model.safetensors")
    ours = RankLLaMAReranker(tmp_path, base_model=BASE, dtype="float32")
    np.testing.assert_allclose(ours.compute_score(PAIRS), peft_scores(tmp_path, classifier(), PAIRS, ours), atol=1e-4)


@pytest.mark.parametrize("family", ["walked", "plain"])
@pytest.mark.parametrize("more", ["tokens", "weights"])
def test_an_adapter_with_its_own_embeddings_scores_as_in_peft(tmp_path: Path, family: str, more: str) -> None:
    """With four added tokens, for which PEFT saves the whole embedding, or with whole tensors by name."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    kind = LlamaConfig if family == "walked" else PhiConfig
    config = kind(**sizes, vocab_size=700, pad_token_id=0, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.save_pretrained(base)
    model = classifier(base)
    whole = ["score"] if more == "tokens" else ["score", "embed_tokens", *(["norm"] if family == "walked" else [])]
    if more == "tokens":
        tokenizer.add_tokens([f"<extra {n}>" for n in range(4)])
        model.resize_token_embeddings(704)
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=whole, init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(folder, save_embedding_layers=more == "tokens")
    tokenizer.save_pretrained(folder)
    opened = classifier(base)
    if more == "tokens":
        opened.resize_token_embeddings(704)
    ours = RankLLaMAReranker(folder, base_model=base, dtype="float32")
    pairs = [*PAIRS, ("<extra 3>", "panda <extra 0>")] if more == "tokens" else PAIRS
    wanted = peft_scores(folder, opened, pairs, ours)
    np.testing.assert_allclose(ours.compute_score(pairs), wanted, atol=1e-4)
    if family == "walked":
        ours.save(tmp_path / "merged", merged=True)
        merged = RankLLaMAReranker(tmp_path / "merged", dtype="float32")
        np.testing.assert_allclose(merged.compute_score(pairs), wanted, atol=1e-4)
        with pytest.raises(ValueError, match=r"holds the whole tensor 'embed_tokens.weight', which cannot be trained"):
            ours.fit(frame(1), frame(1).assign(label=[1, 0, 0])[["qid", "docno", "label"]])


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (
            "model.embed_tokens",
            torch.ones(704, 63),
            r"'embed_tokens.weight', \[704, 63\]; in the model it is \[704, 64\]",
        ),
        ("model.embed_tokens", torch.ones(704), r"'embed_tokens.weight', \[704\]; in the model it is \[704, 64\]"),
        ("model.norm", torch.ones(63), r"'norm.weight', \[63\]; in the model it is \[64\]"),
        ("classifier", torch.ones(1, 64), r"'classifier.weight', \[1, 64\]; the model has none"),
    ],
)
def test_a_whole_tensor_of_the_wrong_shape_is_named(
    tmp_path: Path, key: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^model='{tmp_path}': holds the whole tensor {message}"):
        RankLLaMAReranker(with_tensor(tmp_path, key, tensor), base_model=BASE).compute_score(PAIRS)


def test_an_adapter_with_two_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^model='{tmp_path}': head 'score.weight' is \[2, 64\]; expected \[1, 64\]"):
        RankLLaMAReranker(with_tensor(tmp_path, "score", torch.ones(2, 64)), base_model=BASE).compute_score(PAIRS)


def with_tensor(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    """A copy of the adapter with one more tensor."""
    shutil.copy(ADAPTER / "adapter_config.json", folder)
    stored = load_file(ADAPTER / "adapter_model.safetensors")
    save_file(stored | {f"base_model.model.{name}.weight": tensor}, folder / "adapter_model.safetensors")
    return folder


def test_the_format_of_2024_scores_as_transformers_do() -> None:
    """Ids of its one string, made plainly."""
    ours = reranker(input_format="tevatron-2024", append_eos=True)
    rows = golden_frame()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    opened = PeftModel.from_pretrained(classifier(), ADAPTER).eval()
    opened.config.pad_token_id = 0
    wanted = []
    for query, title, text in rows[["query", "title", "text"]].itertuples(index=False):
        title = title.replace("-", " ").strip() if isinstance(title, str) else ""
        ids = tokenizer(f"query:  {query} document:  {title} {text}".strip(), truncation=True, max_length=195)[
            "input_ids"
        ]
        with torch.inference_mode():
            wanted.append(opened(input_ids=torch.tensor([[*ids, 2]])).logits.item())
    np.testing.assert_allclose(ours.transform(rows)["score"], wanted, atol=1e-4)
    assert np.abs(wanted - reranker().transform(rows)["score"]).max() > 0.01


FORMATS = [
    {"input_format": "tevatron-2024"},
    {"input_format": "tevatron-2024", "query_prefix": "", "passage_prefix": "", "append_eos": True},
    {"query_prefix": "q: "},
    {"input_format": "Q: {query} {title}: {text}</s>?"},
]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("given", FORMATS)
def test_a_saved_reranker_keeps_its_input_format(tmp_path: Path, given: dict[str, object], merged: bool) -> None:
    wanted = reranker(**given)
    wanted.save(tmp_path / "saved", merged=merged)
    opened = RankLLaMAReranker(tmp_path / "saved", dtype="float32")
    rows = frame().assign(title="State-of-the-art")
    np.testing.assert_allclose(opened.transform(rows)["score"], wanted.transform(rows)["score"], atol=1e-5)
    shown = "".join(f", {name}={value!r}" for name, value in given.items())
    assert repr(opened) == f"RankLLaMAReranker({str(tmp_path / 'saved')!r}{shown}, dtype='float32')"
    said = eval(repr(opened))
    assert said == opened
    assert hash(said) == hash(opened)
    other = RankLLaMAReranker(tmp_path / "saved", dtype="float32", input_format="tevatron-2023", query_prefix="other ")
    assert other != opened
    assert other.compute_score(PAIRS)[0] != opened.compute_score(PAIRS)[0]


def test_a_hub_models_own_format_is_not_taken_for_another(tmp_path: Path, cached: Cache) -> None:
    """The format in the repository is not known without a download, so it equals no format that the user names."""
    reranker(input_format="tevatron-2024").save(tmp_path / "saved", merged=True)
    cached.add("owner/model", tmp_path / "saved", "a" * 40, "main")
    own = RankLLaMAReranker("owner/model", dtype="float32")
    older = RankLLaMAReranker("owner/model", dtype="float32", input_format="tevatron-2023")
    assert own != older
    assert repr(own) != repr(older)
    assert own.compute_score(PAIRS)[0] != older.compute_score(PAIRS)[0]
    assert eval(repr(older)) == older
    ended = RankLLaMAReranker("owner/model", dtype="float32", append_eos=True)  # allowed in the model's own format
    assert eval(repr(ended)) == ended != own
    assert ended.compute_score(PAIRS)[0] != own.compute_score(PAIRS)[0]


def test_a_format_that_is_not_allowed_is_refused_before_it_is_set() -> None:
    changed = reranker()
    with pytest.raises(ValueError, match="append_eos=True: input_format 'tevatron-2023' has no end token"):
        changed.append_eos = True
    assert changed == reranker()


def test_an_explicit_format_is_shown(tmp_path: Path) -> None:
    reranker(input_format="tevatron-2024").save(tmp_path / "saved")
    other = RankLLaMAReranker(tmp_path / "saved", input_format="tevatron-2023")
    assert eval(repr(other)) == other != RankLLaMAReranker(tmp_path / "saved")


def test_the_end_token_does_not_pad_where_it_ends_every_input(tmp_path: Path) -> None:
    base, adapter = (shutil.copytree(source, tmp_path / source.name) for source in (BASE, ADAPTER))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    for folder in (base, adapter):
        tokenizer.save_pretrained(folder)
    padded = RankLLaMAReranker(adapter, base_model=base, dtype="float32", input_format="tevatron-2024", append_eos=True)
    padded.save(tmp_path / "merged", merged=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    query, text = PAIRS[0]
    (ids,) = padded.scorer().ids([(query, InputFormat("tevatron-2024").body(text))])
    assert ids.flat()[-1] == tokenizer.eos_token_id
    with torch.inference_mode():
        logit = model(input_ids=torch.tensor([ids.flat()])).logits.item()
    assert logit == pytest.approx(padded.compute_score(PAIRS[:1])[0], abs=1e-4)


def test_another_format_has_its_own_defaults_and_the_same_one_the_models(tmp_path: Path) -> None:
    reranker(**FORMATS[1]).save(tmp_path / "saved")
    opened = RankLLaMAReranker(tmp_path / "saved", input_format="tevatron-2024", append_eos=False, dtype="float32")
    wanted = reranker(**FORMATS[1] | {"append_eos": False})
    np.testing.assert_array_equal(opened.compute_score(PAIRS), wanted.compute_score(PAIRS))
    older = RankLLaMAReranker(tmp_path / "saved", input_format="tevatron-2023", dtype="float32")
    np.testing.assert_array_equal(older.compute_score(PAIRS), reranker().compute_score(PAIRS))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_format": "tevatron-2025"},
            "input_format='tevatron-2025'; allowed: tevatron-2023, tevatron-2024, qwen",
        ),
        ({"input_format": "{text} {query}"}, "input_format='{text} {query}'; allowed: "),
        ({"input_format": "{query} {text"}, "input_format='{query} {text'; allowed: "),
        ({"input_format": "{query} {text!r}"}, "input_format='{query} {text!r}'; allowed: "),
        ({"input_format": "{query} {text} {docno}"}, "input_format='{query} {text} {docno}'; allowed: "),
        ({"append_eos": True}, "append_eos=True: input_format 'tevatron-2023' has no end token"),
        ({"input_format": "{query}{text}", "query_prefix": "q"}, "query_prefix='q': input_format is a template"),
        (
            {"input_format": "tevatron-2024", "url_field": "url"},
            "url_field='url': input_format 'tevatron-2024' reads no",
        ),
        ({"passage_prefix": 3}, "passage_prefix=3; allowed: a string"),
    ],
)
def test_formats_are_checked(given: dict[str, object], message: str) -> None:
    for model in ("castorini/rankllama-v1-7b-lora-passage", ADAPTER):
        if model is ADAPTER or "append_eos" not in given:  # the format of a hub model is not known yet
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                RankLLaMAReranker(model, **given)


def qwen(folder: Path) -> None:
    """A tiny classifier of Qwen 3's kind, with its special tokens and its way to split a text."""
    splits = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(splits), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["what?\n", "a!\n\n", *(words(i, 12) for i in range(300))], trainer)
    made.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_labels=1, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def test_qwen3s_classifiers_score_as_in_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    from sentence_transformers import CrossEncoder

    qwen(tmp_path)
    theirs = CrossEncoder(str(tmp_path), device="cpu", activation_fn=torch.nn.Identity())
    before, after = NAMED["qwen3-reranker"].split("{query}")
    between, end = after.split("{text}")
    pairs = [
        *[(words(i, 4), words(50 + i, 3 + 6 * i)) for i in range(8)],
        ("what?", "\n a "), ("a \n", "  two"), ("", ""), ("a!", "x<|im_end|>y"), ("大熊猫?", "naïve\n\n"),
    ]  # fmt: skip
    wanted = theirs.predict([(f"{before}{q}\n", f"{between.removeprefix(chr(10))}{t}{end}") for q, t in pairs])
    ours = RankLLaMAReranker(tmp_path, input_format="qwen3-reranker", passage_max_length=8192, dtype="float32")
    np.testing.assert_allclose(ours.compute_score(pairs), wanted, atol=1e-4)
    assert np.ptp(wanted) > 0.1
    ours.save(tmp_path / "saved", merged=True)
    np.testing.assert_allclose(
        RankLLaMAReranker(tmp_path / "saved", dtype="float32", passage_max_length=8192).compute_score(pairs),
        wanted,
        atol=1e-4,
    )


def test_the_format_is_read_once_and_again_where_its_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparing and scoring build no format anew, and read no description that is known."""
    folder = tmp_path / "saved"
    RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32").save(folder)
    ours = RankLLaMAReranker(folder, dtype="float32")
    pair = ("panda", "a panda")
    first = ours.compute_score(pair)
    read, made = [], []
    read_description, chosen = rankllama.read_description, InputFormat.chosen
    monkeypatch.setattr(rankllama, "read_description", lambda *args: [read.append(args), read_description(*args)][1])
    monkeypatch.setattr(InputFormat, "chosen", lambda *args: [made.append(args), chosen(*args)][1])
    for _ in range(3):
        assert ours == RankLLaMAReranker(folder, dtype="float32")
        assert ours.compute_score([pair]) == first
    assert (len(read), made) == (3, [])  # the three new rerankers read it
    description = json.loads((folder / "reranker.json").read_text())
    description |= {"input_format": "tevatron-2024", "query_prefix": "ask: "}
    (folder / "reranker.json").write_text(json.dumps(description))
    wanted = RankLLaMAReranker(folder, dtype="float32")
    assert wanted != ours
    assert ours.compute_score(pair) == wanted.compute_score(pair) != first
