"""Texts become exactly the ids of the original programs."""

import pytest
from conftest import MODELS, golden
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pyterrier_llmrerank.engine.inputs import PROMPT, MatroyshkaInputs, RankLLaMAInputs, document, token_ids

RANKLLAMA = golden("rankllama.json")
MATROYSHKA = golden("matroyshka_inference.json")
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


def test_parts_of_a_document() -> None:
    assert document("text", "title", "url") == "document: url title text"
    assert document("text") == "document: text"
    assert document("text", "") == "document:  text"


def test_no_texts_have_no_ids() -> None:
    assert token_ids(TOKENIZER, [], 5) == []
