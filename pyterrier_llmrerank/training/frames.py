"""Result frames with judgements, converted to training records."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, cast

import pandas as pd
import pyterrier as pt

from ..errors import short
from ..values import problem_of
from .validation import Validation, no_common_query

logger = logging.getLogger(__name__)

#: The column of training results that holds a teacher's scores.
TEACHER = "teacher"

Bodies = Callable[[pd.DataFrame], list[str]]


def check_qrels(qrels: pd.DataFrame, argument: str) -> pd.DataFrame:
    """Check judgements, and return them with string ids and number labels, each pair once.

    Args:
        qrels: columns ``qid``, ``docno`` and ``label``.
        argument: the caller's name for them, used in errors.

    Raises:
        ValueError: a column is missing or repeated, there are no rows, an id or label is missing, a label is not
            a number, or a pair has two different labels.
    """
    wanted = ["qid", "docno", "label"]
    for name in wanted:
        if list(qrels.columns).count(name) != 1:
            raise ValueError(f"{argument} has columns {list(qrels.columns)}; expected qid, docno and label, once each.")
    if qrels.empty:
        raise ValueError(f"{argument} is empty.")
    rows = qrels[wanted].reset_index(drop=True)
    for name in ("qid", "docno"):
        if rows[name].isna().any():
            raise ValueError(f"{argument}: {name} is missing in row {int(rows[name].isna().argmax())}.")
    rows = rows.astype({"qid": str, "docno": str})
    rows["label"] = numbers(rows, "label", argument)
    rows = rows.drop_duplicates()
    if (repeated := rows[rows.duplicated(["qid", "docno"])]).size:
        qid, docno = repeated[["qid", "docno"]].iloc[0]
        raise ValueError(f"{argument}: qid {qid!r}, docno {docno!r} has two different labels.")
    return rows


def numbers(rows: pd.DataFrame, name: str, argument: str) -> pd.Series[Any]:
    """Return a column as finite numbers.

    Raises:
        ValueError: a value is not a finite number; names its qid and docno.
    """
    for qid, docno, value in zip(rows["qid"], rows["docno"], rows[name], strict=True):
        try:
            finite = math.isfinite(value)
        except (TypeError, OverflowError):
            finite = False
        if not finite:
            raise ValueError(
                f"{argument}: {name!r} is {short(value)} for qid {qid!r}, docno {docno!r}; expected a finite number."
            )
    return pd.to_numeric(rows[name])


def records_of(
    results: pd.DataFrame,
    qrels: pd.DataFrame,
    bodies: Bodies,
    min_label: int,
    text: pt.Transformer | None,
    text_field: str,
) -> list[dict[str, Any]]:
    """Make one record for each query: relevant results are positives, all other results negatives.

    A query without a relevant result takes its judged positives from other queries' results or from ``text``. The query
    is left out if neither has one, if it has no negatives, or if it has no positive and the results have a column
    ``teacher``, because positives from elsewhere have no teacher scores. A warning counts the queries left out.

    Args:
        results: columns ``qid``, ``query``, ``docno``, the columns that ``bodies`` reads, and optionally ``teacher``.
        qrels: from :func:`check_qrels`.
        bodies: formats the passages of a frame as the model reads them.
        min_label: the lowest label of a positive.
        text: adds the columns that ``bodies`` reads to a frame with ``qid``, ``query`` and ``docno``; None without one.
        text_field: the column with texts.

    Raises:
        ValueError: a teacher's score is missing, ``text`` adds no texts, or no query remains.
    """
    results = _with_bodies(results, bodies)
    positive = qrels[qrels["label"] >= min_label].groupby("qid")["docno"]
    relevant = {str(qid): set(docnos) for qid, docnos in positive}
    queries = [(str(qid), str(query), rows) for (qid, query), rows in results.groupby(["qid", "query"], sort=False)]
    lacking = [qid for qid, _, rows in queries if not rows["docno"].isin(relevant.get(qid, set())).any()]
    elsewhere = {} if TEACHER in results else _fetch_positives(lacking, relevant, results, bodies, text, text_field)
    made = [_record(*query, relevant.get(query[0], set()), elsewhere.get(query[0], [])) for query in queries]
    records = [record for record in made if record["pos"] and record["neg"]]
    without_positive = sum(not record["pos"] for record in made)
    without_negative = len(made) - len(records) - without_positive
    if without_positive or without_negative:
        logger.warning(
            "Training leaves out %d of %d queries: %d have no positive, %d no negative.",
            *(len(made) - len(records), len(made), without_positive, without_negative),
        )
    if not records:
        raise ValueError(
            f"nothing to train on: {without_positive} queries have no positive (label of at least {min_label}) and "
            f"{without_negative} no negative among their results{no_common_query(results['qid'], qrels['qid'])}."
        )
    return records


def _record(qid: str, query: str, rows: pd.DataFrame, relevant: set[str], elsewhere: list[str]) -> dict[str, Any]:
    """Make the record of a query; its positives are from elsewhere if its results have none."""
    is_relevant = rows["docno"].isin(relevant)
    positives, negatives = rows[is_relevant], rows[~is_relevant]
    record = {
        "query_id": qid, "query": query, "pos": list(positives["_body"]) or elsewhere, "neg": list(negatives["_body"])
    }  # fmt: skip
    if TEACHER in rows:
        record |= {"pos_scores": list(positives[TEACHER]), "neg_scores": list(negatives[TEACHER])}
    return record


def _with_bodies(results: pd.DataFrame, bodies: Bodies) -> pd.DataFrame:
    """Add the column ``_body``, with each passage as the model reads it; ids become strings, teacher scores numbers."""
    results = results.reset_index(drop=True)  # an index named qid would hide the column
    results = results.assign(qid=results["qid"].astype(str), docno=results["docno"].astype(str))
    if TEACHER in results:
        results[TEACHER] = numbers(results, TEACHER, "the training results")
    return results.assign(_body=bodies(results))


def _fetch_positives(
    lacking: list[str],
    relevant: dict[str, set[str]],
    results: pd.DataFrame,
    bodies: Bodies,
    text: pt.Transformer | None,
    text_field: str,
) -> dict[str, list[str]]:
    """Fetch the positives of queries without a relevant result from other queries' results, else from ``text``."""
    found_bodies = dict(zip(results["docno"], results["_body"], strict=True))
    wanted = {docno for qid in lacking for docno in relevant.get(qid, set())}
    if text is not None and (unseen := sorted(wanted - set(found_bodies))):
        asked = pd.DataFrame({"qid": "0", "query": "", "docno": unseen})
        try:
            found = cast(pd.DataFrame, text(asked))
        except LookupError as error:
            logger.warning("text failed to load %d passages: %s", len(unseen), repr(error))
        else:
            if text_field not in found.columns:
                raise ValueError(f"text returns columns {list(found.columns)}; missing: {text_field}.")
            found = found[[problem_of(value) is None for value in found[text_field]]]
            found_bodies |= dict(zip(found["docno"].astype(str), bodies(found), strict=True))
    return {qid: [found_bodies[d] for d in sorted(relevant.get(qid, set())) if d in found_bodies] for qid in lacking}


def validation_of(results: pd.DataFrame, qrels: pd.DataFrame, bodies: Bodies) -> Validation:
    """Make validation data from results and judgements."""
    pairs = pd.DataFrame(
        {
            "qid": results["qid"].astype(str),
            "docno": results["docno"].astype(str),
            "query": results["query"],
            "body": bodies(results),
            "prompt": None,
        }
    )
    return Validation(pairs, qrels)
