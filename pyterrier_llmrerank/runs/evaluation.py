"""Evaluation: one measure, query by query, for many rankings of the same candidates; or runs against each other."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
from numpy.typing import NDArray

from .formats import Judgement, RunRow, best_first, by_query

logger = logging.getLogger(__name__)

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
            self.measure = parse_measure(measure) if isinstance(measure, str) else measure
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


def parse_measure(name: str) -> ir_measures.Measure:
    """A measure by its name in ir_measures, ``nDCG@10``, ``RR(rel=2)@10``, or in trec_eval: ``ndcg_cut_10``.

    Raises:
        ValueError: there is none of this name, its parameters are not what is allowed, or nothing installed
            computes it.
    """
    try:
        measure = _of_trec_eval(name) or ir_measures.parse_measure(name)
    except (ValueError, NameError) as error:
        known = ", ".join(sorted({kind.NAME for kind in ir_measures.measures.registry.values()}))
        raise ValueError(f"measure={name!r}; allowed: nDCG@10, RR(rel=2)@10 and the like, out of {known}.") from error
    try:
        measure.validate_params()  # type: ignore[no-untyped-call]
        if measure.params.get("cutoff", 1) < 1:  # on which trec_eval ends the process
            raise AssertionError
    except AssertionError as error:
        allowed = ", ".join(f"{key} ({what.desc})" for key, what in measure.SUPPORTED_PARAMS.items())
        raise ValueError(
            f"measure={name!r}; {measure.NAME} takes {allowed}, written {measure.NAME}(rel=2)@10."
        ) from error
    if not ir_measures.DefaultPipeline.supports(measure):  # type: ignore[no-untyped-call]
        raise ValueError(f"measure={name!r}: nothing installed computes it.")
    return measure


def _of_trec_eval(name: str) -> ir_measures.Measure | None:
    """The one that trec_eval calls so, or None; some of its names stand for several."""
    try:
        found = ir_measures.parse_trec_measure(name)
    except ValueError:
        return None
    return found[0] if len(found) == 1 else None


def compare(
    measures: Sequence[ir_measures.Measure],
    qrels: Sequence[Judgement],
    run: Iterable[RunRow],
    baseline: Iterable[RunRow] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure a run, and test whether it differs from a second one.

    Every query with judgements counts, with nothing found where a run lacks it (``trec_eval -c``); a warning says how
    many it lacks. Documents stand
    by score; equal ones by rank, or as they came, where trec_eval goes by docno: in runs whose scores were rounded
    those may be many.

    Args:
        measures: what is measured.
        qrels: judgements.
        run: what is measured.
        baseline: what it is compared with.

    Returns:
        A frame of each query's values: ``qid``, ``measure``, ``value``, the queries as judgements name them; and one of
        the measures': ``measure``, ``value``. With a baseline both have ``baseline`` and ``difference``, too, and the
        second ``p``, of a paired two-sided t-test over the queries (NaN where no query differs).

    Raises:
        ValueError: a run is empty, or has none of the queries with judgements; or a measure cannot be computed of it.
    """
    judged = [ir_measures.Qrel(row.qid, row.docno, row.label) for row in qrels]
    queries, total = _measure(measures, judged, run, "run")
    if baseline is None:
        return queries, total
    other_queries, other_total = _measure(measures, judged, baseline, "baseline")
    queries = queries.merge(other_queries.rename(columns={"value": "baseline"}), on=["qid", "measure"])
    total["baseline"] = other_total["value"]
    for frame in (queries, total):
        frame["difference"] = frame["value"] - frame["baseline"]
    pairs = dict(list(queries.groupby("measure")))
    total["p"] = [_paired(pairs[name]["value"], pairs[name]["baseline"]) for name in total["measure"]]
    return queries, total


def _measure(
    measures: Sequence[ir_measures.Measure], judged: Sequence[ir_measures.Qrel], run: Iterable[RunRow], name: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The values of each query, and of each measure."""
    scored = [
        ir_measures.ScoredDoc(row.qid, row.docno, -place)
        for _, rows in by_query(run)
        for place, row in enumerate(best_first(rows))
    ]
    wanted, there = dict.fromkeys(judgement.query_id for judgement in judged), {row.query_id for row in scored}
    if not there:
        raise ValueError(f"the {name} is empty; wanted results to measure.")
    if not there & wanted.keys():
        some, others = next(iter(wanted)), scored[0].query_id
        raise ValueError(f"the {name} has none of the queries with judgements, like {some!r}: it has {others!r}.")
    if lacking := wanted.keys() - there:
        logger.warning("the %s lacks %d of the %d queries with judgements, which count as if nothing had been found.",
                       name, len(lacking), len(wanted))  # fmt: skip
    try:
        found: Any = ir_measures.calc(measures, judged, scored)
    except subprocess.CalledProcessError as error:  # gdeval's, of which qids are numbers
        names = ", ".join(map(str, measures))
        raise ValueError(
            f"measure={names}: a program that computes one of these failed ({error}); ERR and its like want qids that "
            "are numbers."
        ) from error
    values = {(str(metric.measure), metric.query_id): metric.value for metric in found.per_query}
    places = [(str(measure), query) for measure in measures for query in wanted]
    queries = [(query, of, values[of, query]) for of, query in places if (of, query) in values]  # Accuracy lacks some
    total = [(str(measure), found.aggregated[measure]) for measure in measures]
    return pd.DataFrame(queries, columns=["qid", "measure", "value"]), pd.DataFrame(total, columns=["measure", "value"])


def _paired(values: pd.Series[float], others: pd.Series[float]) -> float:
    """The p of a paired t-test; NaN for fewer than two queries, and, as scipy has it, where none differs."""
    if len(values) < 2:
        return float("nan")
    from scipy import stats  # takes a while to import, which importing the package should not

    return float(stats.ttest_rel(values, others).pvalue)
