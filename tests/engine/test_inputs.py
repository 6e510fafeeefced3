"""Texts become exactly the ids of the original programs."""

import pytest
from conftest import MODELS, golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from pyterrier_llmrerank.checkpoints.input_format import InputFormat
from pyterrier_llmrerank.engine.inputs import PROMPT, MatroyshkaInputs, RankLLaMAInputs, inputs_of, token_ids

RANKLLAMA = golden("rankllama.json")
MATROYSHKA = golden("matroyshka_inference.json")
document = InputFormat().body
TOKENIZER = AutoTokenizer.from_pretrained(MODELS / "mistral_base")


@pytest.mark.parametrize("run", ["main_unpadded", "title_fixed_unpadded"])
def test_rankllama_ids_are_the_original_ones(run: str) -> None:
    pairs, run_golden = RANKLLAMA["pairs"], next(r for r in RANKLLAMA["runs"] if r["id"] == run)
    got = RankLLaMAInputs()(TOKENIZER, [(p["query"], document(p["text"], p.get("title"))) for p in pairs])
    for pair, ids, wanted in zip(pairs, got, run_golden["input_ids"], strict=True):
        if "title" in pair or run == "title_fixed_unpadded":  # the other run drops prefix and title together
            assert ids.flat() == wanted


@pytest.mark.parametrize("name", MATROYSHKA["tokenisation"])
def test_matroyshka_ids_are_the_original_ones(name: str) -> None:
    setting = MATROYSHKA["tokenisation"][name]["settings"]
    inputs = MatroyshkaInputs(
        setting["prompt"] or PROMPT,
        setting["query_max_length"],
        setting["max_length"],
        setting["query_instruction_for_rerank"] or "",
        setting["passage_instruction_for_rerank"] or "",
    )
    got = inputs(TOKENIZER, [(p["query"], p["passage"]) for p in MATROYSHKA["pairs"]])
    for ids, wanted in zip(got, MATROYSHKA["tokenisation"][name]["pairs"], strict=True):
        assert ids.flat() == wanted["input_ids"]
        assert (len(ids.prefix), len(ids.suffix)) == (wanted["query_length"], wanted["prompt_length"])


@pytest.mark.parametrize("batch", ["mixed", "equal"])
def test_matroyshkas_training_ids_are_the_original_ones(batch: str) -> None:
    wanted = golden("matroyshka_train_self_distillation.json")["batches"][batch]
    query, passage = wanted["args"]["query_max_len"], wanted["args"]["passage_max_len"]
    inputs = MatroyshkaInputs(query_max_length=query, total=query + passage)
    for number, (row, mask) in enumerate(zip(wanted["input_ids"], wanted["attention_mask"], strict=True)):
        example = wanted["rows"][number // 4]
        texts = dict(zip(example["pos_scores"] + example["neg_scores"], example["pos"] + example["neg"], strict=True))
        (ids,) = inputs(TOKENIZER, [(example["query"], texts[wanted["teacher_scores"][number]])])
        assert ids.flat() == row[: sum(mask)]
        assert len(ids.prefix) == wanted["query_lengths"][number]


@given(st.text(max_size=60), st.text(max_size=300), st.integers(1, 40), st.integers(1, 60))
def test_rankllama_cuts_queries_rather_than_passages_to_its_limit(query: str, text: str, q: int, p: int) -> None:
    (ids,) = RankLLaMAInputs(q, p)(TOKENIZER, [(query, document(text))])
    body = token_ids(TOKENIZER, [document(text)], p)[0]
    assert ids.body == [1, *body]
    assert len(ids.prefix) <= q + 1
    assert ids.length <= max(q + p - 2, 1 + len(ids.body))


@given(st.text(max_size=60), st.text(max_size=300), st.integers(1, 60), st.integers(1, 60))
def test_matroyshka_keeps_its_suffix_whole(query: str, text: str, q: int, m: int) -> None:
    inputs = MatroyshkaInputs(query_max_length=q, max_length=m)
    ((prefix, body, suffix, *_),) = inputs(TOKENIZER, [(query, text)])
    assert suffix == sum(token_ids(TOKENIZER, ["\n", PROMPT], 100), [])
    assert len(body) <= m
    assert prefix[0] == TOKENIZER.bos_token_id
    assert body == token_ids(TOKENIZER, ["B: " + text], m)[0][: len(body)]


def test_bos_equal_to_pad_is_left_out_by_matroyshka_only() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "mistral_base", pad_token="<s>")
    assert MatroyshkaInputs()(tokenizer, [("q", "p")])[0].prefix[0] != 1
    assert RankLLaMAInputs()(tokenizer, [("q", "p")])[0].prefix[0] == 1


def test_a_document_has_its_url_title_and_text() -> None:
    assert document("text", "title", "url") == "document: url title text"
    assert document("text") == "document: text"
    assert document("text", "") == "document:  text"


def test_no_texts_have_no_ids() -> None:
    assert token_ids(TOKENIZER, [], 5) == []


#: Texts with spaces, dashes, tokens and letters in odd places.
ODD = st.text(max_size=40) | st.lists(
    st.sampled_from(
        [" ", "  ", "-", "\n", "\t", "\u00a0", "</s>", "<s>", "▁", "大熊猫", "é", "panda", "query:", "{x}", "?"]
    ),
    max_size=60,
).map("".join)


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(ODD, ODD, st.none() | ODD, st.sampled_from(["query: ", "", "q"]), st.integers(2, 60), st.booleans())
def test_the_string_of_2024_has_tevatrons_ids(
    query: str, text: str, title: str | None, prefix: str, longest: int, eos: bool
) -> None:
    """Against a plain writing of the documented steps: one string, stripped, tokenised once and cut at its end."""
    form = InputFormat("tevatron-2024", prefix, "document: " if prefix else "", eos)
    plain = f"{prefix} {query} {form.passage_prefix} {(title or '').replace('-', ' ').strip()} {text}".strip()
    wanted = TOKENIZER(plain, truncation=True, max_length=longest - eos)["input_ids"] + [2] * eos
    (ids,) = inputs_of(form, 1, longest - 1)(TOKENIZER, [(query, form.body(text, title))])
    assert ids.flat() == wanted
    whole = TOKENIZER(plain)["input_ids"]
    assert ids.passage_truncated == (len(whole) > longest - eos)


@pytest.mark.parametrize("name", ["tevatron-2024", "qwen3-reranker", "{query}\n{title}\n{text} relevant?"])
def test_passages_of_a_query_share_its_ids(name: str) -> None:
    form = InputFormat(name)
    pairs = [("what is tea", form.body(text, "-")) for text in ("Leaves.", "", "  Water")]
    one, *others = inputs_of(form, 32, 164)(TOKENIZER, pairs)
    assert TOKENIZER.decode(one.prefix).strip().endswith("what is tea")
    assert all(other.prefix == one.prefix for other in others)


def test_all_of_a_template_survives_truncation() -> None:
    form = InputFormat("Q: {query} A: {text}</s>yes?")
    short, long = inputs_of(form, 4, 6)(TOKENIZER, [("a", form.body("b")), ("a", form.body("b " * 50))])
    assert (short.passage_truncated, long.passage_truncated) == (False, True)
    assert long.suffix == short.suffix == token_ids(TOKENIZER, ["</s>yes?"])[0]
    own = len(token_ids(TOKENIZER, ["Q: "])[0]) + len(token_ids(TOKENIZER, [" A: "])[0])
    assert len(long.prefix + long.body) == 1 + own + 4 + 6
    (lost,) = inputs_of(form, 4, 6)(TOKENIZER, [("a " * 50, form.body("b"))])
    assert (lost.query_truncated, lost.body, lost.suffix) == (True, [], short.suffix)


def test_a_tokenizers_own_last_token_stays() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "mistral_base")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    form = InputFormat("tevatron-2024", append_eos=True)
    (ids,) = inputs_of(form, 5, 5)(tokenizer, [("panda", form.body("bamboo " * 9))])
    assert ids.flat() == [
        *tokenizer(form.head("panda") + form.body("bamboo " * 9), truncation=True, max_length=9)["input_ids"],
        2,
    ]
    assert ids.flat()[-2:] == [2, 2]


def test_no_end_token_to_append() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "mistral_base", eos_token=None)
    with pytest.raises(ValueError, match="append_eos=True: the tokenizer has no end token"):
        inputs_of(InputFormat("tevatron-2024", append_eos=True), 5, 5)(tokenizer, [("a", "b")])
