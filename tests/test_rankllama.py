"""RankLLaMA scores what the original scores, out of any layout, with the columns that a frame happens to have."""

import numpy as np
import pandas as pd
import pytest
from conftest import MODELS, frame, golden

from pyterrier_llmrerank import RankLLaMAReranker, rankllama

GOLDEN = golden("rankllama.json")
ADAPTER, BASE = MODELS / "rankllama_adapter", MODELS / "rankllama_base"


def reranker(**options: object) -> RankLLaMAReranker:
    return RankLLaMAReranker(ADAPTER, base_model=BASE, dtype="float32", **options)


def golden_frame() -> pd.DataFrame:
    return pd.DataFrame(GOLDEN["pairs"]).rename(columns={"query_id": "qid", "docid": "docno"})


def scores(run: str) -> np.ndarray:
    return np.array(next(r["scores"] for r in GOLDEN["runs"] if r["id"] == run))


def test_scores_are_the_original_ones() -> None:
    got = reranker().transform(golden_frame())["score"].to_numpy()
    np.testing.assert_allclose(got, scores("title_fixed_unpadded"), atol=2e-4)
    titled = golden_frame()["title"].notna().to_numpy()
    for run in ("main_unpadded", "main_padded"):
        np.testing.assert_allclose(got[titled], scores(run)[titled], atol=2e-4)


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
    assert rankllama.RankLLaMAReranker().deepest() is None
