"""Validation: how well a model in training ranks, measured as a search would be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import pandas as pd
from ir_measures import nDCG

from .data import Body, candidates

MEASURE = "nDCG@10"


@dataclass(frozen=True)
class Validation:
    """Candidates to rank and what is relevant among them.

    Args:
        pairs: columns ``qid``, ``docno``, ``query`` and ``body``, the passage as the model reads it.
        qrels: columns ``qid``, ``docno`` and ``label``; what is relevant and no candidate counts too.

    Raises:
        ValueError: no query has both candidates and judgements.
    """

    pairs: pd.DataFrame
    qrels: pd.DataFrame

    def __post_init__(self) -> None:
        if not set(self.pairs["qid"]) & set(self.qrels["qid"]):
            raise ValueError("validation: no query has both candidates and judgements.")

    def __call__(self, score: Callable[[Sequence[tuple[str, str]]], Sequence[float]]) -> float:
        """Mean nDCG@10 over the queries with judgements.

        Args:
            score: from ``(query, body)`` pairs to their scores.
        """
        scores = score(list(zip(self.pairs["query"], self.pairs["body"], strict=True)))
        run = pd.DataFrame(
            {"query_id": self.pairs["qid"], "doc_id": self.pairs["docno"], "score": [float(s) for s in scores]}
        )
        qrels = self.qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
        return float(ir_measures.calc_aggregate([nDCG @ 10], qrels, run)[nDCG @ 10])

    @classmethod
    def of_records(cls, records: Iterable[Any], body: Body) -> Validation:
        """From data of the form that training takes: each line's positives against its negatives."""
        pairs: list[tuple[str, str, str, str]] = []
        qrels: list[tuple[str, str, int]] = []
        for number, record in enumerate(records):
            read = candidates(record, body)
            for docno, passage in enumerate(read.positives + read.negatives):
                pairs.append((str(number), str(docno), read.query, passage))
            qrels += [(str(number), str(docno), 1) for docno in range(len(read.positives))]
        return cls(
            pd.DataFrame(pairs, columns=["qid", "docno", "query", "body"]),
            pd.DataFrame(qrels, columns=["qid", "docno", "label"]),
        )
