"""Whatever comes in: right results or a clear error; nothing is executed, nothing changed that was there.

``LLMRERANK_FRAMES`` says how many random frames go through ``transform``, 60 by default.
"""

import os
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyterrier as pt
import pytest
from conftest import MODELS
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker

FULL = str(MODELS / "costwise_full")
RERANKERS: dict[str, LLMReranker] = {
    "rankllama": RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32"),
    "matroyshka": MatroyshkaReranker(FULL, dtype="float32", cutoff=2),
    "several cutoffs": MatroyshkaReranker(FULL, dtype="float32", cutoff=[2, 3], normalize=True),
    "cascade": MatroyshkaReranker(FULL, dtype="float32", cutoff=3, prune={2: 1}),
}
#: What some of them add beside score and rank.
ADDED = {"several cutoffs": ["score_2", "score_3"], "cascade": ["score_2", "exit_layer"]}
FRAMES = int(os.environ.get("LLMRERANK_FRAMES", "60"))

# -- frames

#: Strings that are harder than most: empty, other scripts and directions, emoji that are several characters, NULs, line
#: ends, tokens of the model, and what is long enough to be cut.
ODD_TEXTS = (
    "", " ", "\0", "a\0b", "\r\n\u2028\x85", "\ufeffbom", "e\u0301\u0301\u0301", "\u202eright to left", "大熊猫",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0010ffff", "\uffff", "<s></s><unk>", "query: document: A: B: \n",
    "nan", "None", "1e400", "%s {0}", "panda " * 300, "\u0600" * 500,
)  # fmt: skip
#: What is no text.
NO_TEXTS = ("\ud83d", "ok \udfff", None, np.nan, pd.NA, pd.NaT, 3, -0.5, True, b"bytes", ("a",), ["a"], {"a": 1})
TEXTS = st.text(max_size=12) | st.sampled_from(ODD_TEXTS)
IDS = st.sampled_from(["q1", "q2", "1", "", "\0", "大", " q1"])
ODD_IDS = st.sampled_from([1, 2, 1.0, 2**70, -(2**63), np.inf, True, "1", ("t", 1), pd.Timestamp(0), b"b", frozenset()])
NO_IDS = st.sampled_from([None, np.nan, pd.NA, pd.NaT, ["unhashable"], {}, "\ud83d"])
DTYPES: tuple[Any, ...] = (
    object, "str", "string[python]", "string[pyarrow]", pd.ArrowDtype(pa.string()), "category",
)  # fmt: skip
OTHERS = st.sampled_from([None, 0, -1.5, np.nan, np.inf, "text", "\ud83d", np.zeros(2), [1], pd.NA, b"", True, 2**80])
NAMES = (
    "score",
    "rank",
    "exit_layer",
    "score_2",
    "score_3",
    "title",
    "url",
    "features",
    "_body",
    "level_0",
    "",
    0,
    None,
)


def column(values: list[Any], dtype: Any) -> pd.Series:
    """A column of a dtype, where the dtype can hold these values."""
    series = pd.Series(values, dtype=object)
    try:
        return series.astype(dtype)
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        return series


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    """A frame that may or may not be one of results."""
    count = draw(st.integers(0, 4))

    def drawn(values: st.SearchStrategy[Any]) -> list[Any]:
        return [draw(values) for _ in range(count)]

    odd = draw(st.sampled_from(["", "", "", "", "ids", "no ids", "texts"]))
    ids = {"ids": IDS | ODD_IDS, "no ids": IDS | NO_IDS}.get(
        odd, IDS | st.integers(0, 2) if draw(st.booleans()) else IDS
    )
    texts = TEXTS | st.sampled_from(NO_TEXTS) if odd == "texts" else TEXTS
    columns = {
        name: column(drawn(values), draw(st.sampled_from(DTYPES)))
        for name, values in (("qid", ids), ("docno", ids), ("query", texts), ("text", texts))
    }
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True)):
        columns[name] = pd.Series(drawn(texts if name in ("title", "url") else OTHERS), dtype=object)
    for name in draw(st.sampled_from([(), (), (), (), (), (), ("text",), ("qid", "query"), ("docno",)])):
        del columns[name]
    frame = pd.DataFrame({name: columns[name] for name in draw(st.permutations(list(columns)))})
    index = draw(st.sampled_from(["", "", "repeated", "words", "several", "missing"]))
    if index == "repeated":
        frame.index = pd.Index(drawn(st.integers(-1, 1)))
    elif index == "words":
        frame.index = pd.Index(drawn(st.sampled_from(["qid", "a", "b"])), name="qid")
    elif index == "several":
        frame.index = pd.MultiIndex.from_arrays([drawn(st.integers(0, 1)), range(count)], names=["score", "rank"])
    elif index == "missing":
        frame.index = pd.Index(drawn(st.sampled_from([np.nan, 1.5])), dtype=float)
    if draw(st.sampled_from([False] * 15 + [True])):
        frame = pd.concat([frame, frame[[draw(st.sampled_from(list(frame.columns)))]]], axis=1)
    return frame


def is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def is_sound(frame: pd.DataFrame, reranker: LLMReranker) -> bool:
    """Whether a frame is one of results, by the words of ``transform``'s documentation."""
    if not {"qid", "docno", "query", "text"} <= set(frame.columns) or frame.columns.has_duplicates:
        return False
    titles = [v for v in frame.get("title", ()) if not (pd.api.types.is_scalar(v) and pd.isna(v))]
    texts = [*frame["query"], *frame["text"], *(titles if isinstance(reranker, RankLLaMAReranker) else ())]
    ids = [*frame["qid"], *frame["docno"]]
    hashable = not any(isinstance(value, list | dict) for value in ids)
    there = not any(pd.isna(value) for value in ids if pd.api.types.is_scalar(value))
    return hashable and there and all(map(is_text, [*texts, *(value for value in ids if isinstance(value, str))]))


@pytest.mark.parametrize("name", RERANKERS)
@settings(
    max_examples=FRAMES, derandomize=FRAMES == 60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(frames())
def test_any_frame_is_ranked_or_refused(name: str, rows: pd.DataFrame) -> None:
    reranker, before = RERANKERS[name], rows.copy()
    try:
        got = reranker.transform(rows)
    except (ValueError, pt.validate.InputValidationError):
        if is_sound(before, reranker):
            raise
        event("refused")
        return
    finally:
        pd.testing.assert_frame_equal(rows, before)
    assert is_sound(before, reranker) or before.empty
    event("ranked")
    added = ["score", "rank", *ADDED.get(name, ())]
    assert set(got.columns) == {*before.columns, *added}
    kept = [column for column in before.columns if column not in added]
    pd.testing.assert_frame_equal(got[kept], before[kept])
    assert got["score"].dtype == np.float64
    assert np.isfinite(got["score"]).all()
    of_query: dict[Any, list[tuple[int, float]]] = {}
    for qid, rank, score in zip(got["qid"], got["rank"], got["score"], strict=True):
        of_query.setdefault(qid, []).append((rank, score))
    for ranked in of_query.values():
        ranks, scores = zip(*sorted(ranked), strict=True)
        assert ranks == tuple(range(len(ranked)))
        assert list(scores) == sorted(scores, reverse=True)
