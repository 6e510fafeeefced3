"""Result frames with judgements to what training takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import pandas as pd
import pyterrier as pt

from .validation import Validation

logger = logging.getLogger(__name__)

#: A column of the training results with a teacher's scores, to distil from.
TEACHER = "teacher"

Bodies = Callable[[pd.DataFrame], list[str]]


def judged(qrels: pd.DataFrame, argument: str) -> pd.DataFrame:
    """Judgements with ids as strings.

    Raises:
        ValueError: a column is missing, or there is no row.
    """
    for name in ("qid", "docno", "label"):
        if name not in qrels.columns:
            raise ValueError(f"{argument} has columns {list(qrels.columns)}; wanted qid, docno and label.")
    if qrels.empty:
        raise ValueError(f"{argument} is empty.")
    return qrels[["qid", "docno", "label"]].astype({"qid": str, "docno": str})


def records_of(
    results: pd.DataFrame, qrels: pd.DataFrame, bodies: Bodies, min_label: int, text: pt.Transformer | None
) -> list[dict[str, Any]]:
    """One record a query: what is judged relevant is positive, all else that was retrieved negative.

    A query of which nothing relevant was retrieved gets what the judgements name: out of the other queries'
    results, or from ``text``. It is left out where that has none of it either, or where nothing else was
    retrieved; one log line counts those.

    Args:
        results: columns ``qid``, ``query``, ``docno``, what ``bodies`` reads, and perhaps ``teacher``.
        qrels: as :func:`judged` gives them.
        bodies: the passages of a frame as the model reads them.
        min_label: the lowest label that is relevant.
        text: adds the columns that ``bodies`` reads to a frame with ``qid``, ``query`` and ``docno``.

    Raises:
        ValueError: no query is left.
    """
    results = results.assign(qid=results["qid"].astype(str), docno=results["docno"].astype(str))
    results["_body"] = bodies(results)
    relevant = qrels[qrels["label"] >= min_label].groupby("qid")["docno"].agg(set).to_dict()
    at_hand = dict(zip(results["docno"], results["_body"], strict=True))
    records, fetched, without_positive, without_negative = [], 0, 0, 0
    for (qid, query), rows in results.groupby(["qid", "query"], sort=False):
        wanted: set[str] = relevant.get(qid, set())
        hit = rows["docno"].isin(wanted)
        positives, negatives = list(rows.loc[hit, "_body"]), list(rows.loc[~hit, "_body"])
        record: dict[str, Any] = {"query_id": qid, "query": query, "pos": positives, "neg": negatives}
        if not negatives:
            without_negative += 1
            continue
        if positives and TEACHER in rows:
            record["pos_scores"], record["neg_scores"] = (list(rows.loc[which, TEACHER]) for which in (hit, ~hit))
        if not positives:
            record["pos"] = [at_hand[docno] for docno in sorted(wanted) if docno in at_hand]
            if not record["pos"] and wanted and text is not None:
                missing = pd.DataFrame({"qid": qid, "query": query, "docno": sorted(wanted)})
                try:
                    record["pos"] = bodies(cast(pd.DataFrame, text(missing)))
                except (KeyError, LookupError) as error:
                    logger.debug("no text for query %s: %r", qid, error)
            if not record["pos"]:
                without_positive += 1
                continue
            fetched += 1
        records.append(record)
    skipped = without_positive + without_negative
    logger.log(
        logging.WARNING if skipped else logging.INFO,
        "training on %d queries; %d had no relevant result and got theirs from elsewhere; "
        "left out: %d without a positive, %d without a negative",
        *(len(records), fetched, without_positive, without_negative),
    )
    if not records:
        raise ValueError(
            f"nothing to train on: {without_positive} queries have no positive (label of at least {min_label}) and "
            f"{without_negative} no negative among their results."
        )
    if not all("pos_scores" in record for record in records):
        for record in records:
            record.pop("pos_scores", None)
            record.pop("neg_scores", None)
    return records


def validation_of(results: pd.DataFrame, qrels: pd.DataFrame, bodies: Bodies) -> Validation:
    """Results to rerank, and what is relevant among them."""
    pairs = pd.DataFrame(
        {
            "qid": results["qid"].astype(str),
            "docno": results["docno"].astype(str),
            "query": results["query"],
            "body": bodies(results),
        }
    )
    return Validation(pairs, qrels)
