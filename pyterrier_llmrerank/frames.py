"""Result frames: check them, name their rows, find their distinct pairs, and rank them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import pyterrier as pt
from numpy.typing import NDArray

from .values import problem_of, problem_of_id

logger = logging.getLogger(__name__)

Value = TypeVar("Value", bound=Hashable)


def check_rows(frame: pd.DataFrame, text_field: str) -> None:
    """Check the columns of a result frame that a reranker reads.

    Args:
        frame: the frame; no such column is missing.
        text_field: the column with the text.

    Raises:
        ValueError: a column is repeated, a qid or docno is missing, or a query or text is not a string.
    """
    if repeated := list(frame.columns[frame.columns.duplicated()]):
        raise ValueError(f"the frame has several columns {repeated[0]!r}; expected one.")
    for name in ("qid", "docno"):
        if frame[name].isna().any():
            raise ValueError(f"{name} is missing in row {int(frame[name].isna().argmax())} of the frame.")
        for row, value in enumerate(frame[name]):
            if problem := problem_of_id(value):
                raise ValueError(f"{name} is {problem} in row {row} of the frame.")
    for name in ("query", text_field):
        problems = [(row, problem) for row, value in enumerate(frame[name]) if (problem := problem_of(value))]
        if not problems:
            continue
        row, problem = problems[0]
        if isinstance(frame[name].dtype, pd.StringDtype) and pd.isna(frame[name].iloc[row]):  # shows None as nan
            problem = cast(str, problem_of(None))
        more = f" and {len(problems) - 1} more rows" if len(problems) > 1 else ""
        raise ValueError(f"{name!r} is {problem} for {row_name(frame, row)}{more}.")


def check_columns(name: str, frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raise ValueError if a frame, given as the argument ``name``, lacks columns."""
    if missing := [column for column in columns if column not in frame.columns]:
        raise ValueError(f"{name} has columns {list(frame.columns)}; missing: {', '.join(missing)}.")


def row_name(frame: pd.DataFrame, row: int) -> str:
    """Name a row by its qid and docno."""
    qid, docno = (getattr(value, "item", lambda value=value: value)() for value in frame[["qid", "docno"]].iloc[row])
    return f"qid {qid!r}, docno {docno!r}"


def distinct(values: Sequence[Value]) -> tuple[list[Value], NDArray[np.intp]]:
    """Return the distinct values in order of appearance, and the index of each value among them, ``[values]``."""
    index: dict[Value, int] = {}
    positions = np.array([index.setdefault(value, len(index)) for value in values], dtype=np.intp)
    return list(index), positions


def with_ranks(scored: pd.DataFrame, logits: np.ndarray | None = None) -> pd.DataFrame:
    """Add PyTerrier's ranks to a copy of a frame, which may have any index.

    Args:
        scored: the frame, with ``score``.
        logits: values to rank by, ``[rows]``; None to rank by the score.
    """
    numbered = scored.reset_index(drop=True)  # an index named qid would hide the column
    if logits is not None:
        numbered["score"] = logits
    numbered = pt.model.add_ranks(numbered)
    order = numbered.index.to_numpy()
    numbered["score"] = scored["score"].to_numpy()[order]
    numbered.index = scored.index.take(order)
    return numbered


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Map logits to numbers between 0 and 1, without overflow."""
    tail = np.exp(-np.abs(logits))
    return cast(np.ndarray, np.where(logits < 0, tail, 1.0) / (1.0 + tail))


def warn_of_ties(reranker: object, qids: pd.Series[Any], scores: np.ndarray, logits: np.ndarray) -> bool:
    """Warn if normalisation makes different logits of a query equal in single precision, which evaluators use.

    Args:
        reranker: the transformer to name in the warning.
        qids: the qid of each row, ``[rows]``.
        scores: normalised scores, ``[rows]``.
        logits: the scores before normalisation, ``[rows]``.

    Returns:
        Whether it warned.
    """
    if scores is logits:
        return False
    query = pd.factorize(qids)[0]
    order = np.lexsort((logits, query))
    single = scores[order].astype(np.float32)
    same_score, same_logit, same_query = (column[1:] == column[:-1] for column in (single, logits[order], query[order]))
    count = int((same_query & same_score & ~same_logit).sum())
    if count:
        logger.warning(
            "%s: normalize=True makes %d scores equal to another score of their query in single precision, in which "
            "trec_eval compares them, though their logits differ. Ranks follow the logits; for measures by score use "
            "normalize=False.", repr(reranker), count,
        )  # fmt: skip
    return bool(count)
