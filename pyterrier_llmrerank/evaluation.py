"""Evaluation: one measure, query by query, for many rankings of the same candidates."""

from __future__ import annotations

import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Evaluation:
    """A measure of rankings of the same rows, as PyTerrier's experiments compute it.

    Args:
        measure: of ir_measures, by name or itself.
        rows: a result frame: ``qid`` and ``docno``.
        qrels: judgements: ``qid``, ``docno`` and ``label``; those of queries in the frame count.

    Raises:
        ValueError: there is no such measure, or nothing installed that computes it.
    """

    def __init__(self, measure: str | ir_measures.Measure, rows: pd.DataFrame, qrels: pd.DataFrame) -> None:
        self._qids = rows["qid"].astype(str).to_numpy()
        self._docnos = rows["docno"].astype(str).to_numpy()
        #: The queries, in the order of the rows.
        self.queries = list(dict.fromkeys(self._qids))
        own = qrels[qrels["qid"].astype(str).isin(set(self.queries))].astype({"qid": str, "docno": str})
        try:
            self.measure = ir_measures.parse_measure(measure) if isinstance(measure, str) else measure
            self._evaluator = ir_measures.evaluator([self.measure], pt.model.to_ir_measures(own))
        except (ValueError, NameError, AttributeError, RuntimeError) as error:
            raise ValueError(f"measure={measure!r}; allowed: one of ir_measures, 'nDCG@10'. ({error})") from error

    def __call__(self, scores: Floats) -> Floats:
        """The measure of each query, ``[queries]``, where the rows have these scores."""
        run: dict[str, dict[str, float]] = {query: {} for query in self.queries}
        for query, docno, score in zip(self._qids, self._docnos, scores.tolist(), strict=True):
            run[query][docno] = score
        values = {metric.query_id: metric.value for metric in self._evaluator.iter_calc(run)}
        return np.array([values[query] for query in self.queries], dtype=float)

    def as_they_came(self, rows: pd.DataFrame) -> float | None:
        """The mean measure of the rows by their own ``score``, or else ``rank``; None where they have neither."""
        if "score" in rows:
            return float(self(rows["score"].to_numpy(dtype=float)).mean())
        return float(self(-rows["rank"].to_numpy(dtype=float)).mean()) if "rank" in rows else None
