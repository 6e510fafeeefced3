"""RankLLaMA scores what the original scores, out of any layout, with the columns that a frame happens to have."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS, agree, frame, golden, words
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pyterrier_llmrerank import RankLLaMAReranker

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
    """The same model in each of the layouts that it comes in."""
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
    ids = reranker(query_max_length=3, passage_max_length=9)._encode(*_tokenizer_and_pair())[0]
    assert (len(ids.prefix), len(ids.body)) == (1, 10)  # both together are held to 3 + 9 - 2


def _tokenizer_and_pair() -> tuple:
    return AutoTokenizer.from_pretrained(BASE), [(words(1, 9), words(2, 40))]


def test_title_and_url_are_used_where_there_are_any() -> None:
    plain = frame()
    both = plain.assign(title="Title", url="u.org")
    model = reranker(url_field="url")
    body = "document: u.org Title " + plain["text"]
    assert model._bodies(both) == body.tolist()
    assert (
        model._bodies(both.assign(url=[None, float("nan"), pd.NA, "u", "u", "u"]))[0]
        == "document: Title " + plain["text"][0]
    )
    assert model._bodies(plain) == ("document: " + plain["text"]).tolist()
    assert reranker(title_field=None)._bodies(both) == ("document: " + plain["text"]).tolist()


@pytest.mark.parametrize(
    ("title", "problem"), [("\ud800", "not valid Unicode"), (["a"], "not a string"), (3, "not a string")]
)
def test_a_title_that_is_no_text_is_named(title: object, problem: str) -> None:
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
