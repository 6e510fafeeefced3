"""Evaluate rankings of the same candidates, or compare two runs."""

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

from .collection import Judgement
from .formats import RunRow, best_first, by_query

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]


class Evaluation:
    """Compute a measure for many rankings of the same candidates, as ``pt.Experiment`` does.

    Args:
        measure: a measure of ir_measures, or its name.
        rows: the candidates: ``qid`` and ``docno``.
        qrels: judgements: ``qid``, ``docno`` and ``label``. Only queries with candidates count.

    Raises:
        ValueError: the measure is unknown, or no installed package computes it.
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
            raise ValueError(
                f"measure={measure!r}; allowed: a measure of ir_measures, such as 'nDCG@10'. ({error})"
            ) from error

    def __call__(self, scores: Floats) -> Floats:
        """Return the measure of each query, ``[queries]``, if the candidates are ranked by ``scores``, ``[rows]``."""
        run: dict[str, dict[str, float]] = {query: {} for query in self.queries}
        for query, docno, score in zip(self._qids, self._docnos, scores.tolist(), strict=True):
            run[query][docno] = score
        values = {metric.query_id: metric.value for metric in self._evaluator.iter_calc(run)}
        return np.array([values[query] for query in self.queries], dtype=float)

    def input_mean(self, rows: pd.DataFrame) -> float | None:
        """Return the mean measure of the candidates' own ``score`` or, without one, ``rank``; None without both."""
        if "score" in rows:
            return float(self(rows["score"].to_numpy(dtype=float)).mean())
        return float(self(-rows["rank"].to_numpy(dtype=float)).mean()) if "rank" in rows else None


def parse_measure(name: str) -> ir_measures.Measure:
    """Return a measure by its name in ir_measures (``nDCG@10``, ``RR(rel=2)@10``) or trec_eval (``ndcg_cut_10``).

    Raises:
        ValueError: the name is unknown, a parameter is invalid, or no installed package computes the measure.
    """
    try:
        measure = _trec_eval_measure(name) or ir_measures.parse_measure(name)
    except (ValueError, NameError) as error:
        known = ", ".join(sorted({kind.NAME for kind in ir_measures.measures.registry.values()}))
        raise ValueError(
            f"measure={name!r}; allowed: {known}, with parameters as in nDCG@10 or RR(rel=2)@10."
        ) from error
    try:
        measure.validate_params()  # type: ignore[no-untyped-call]
        if measure.params.get("cutoff", 1) < 1:  # trec_eval would end the process
            raise AssertionError
    except AssertionError as error:
        allowed = ", ".join(f"{key} ({param.desc})" for key, param in measure.SUPPORTED_PARAMS.items())
        raise ValueError(
            f"measure={name!r}; parameters allowed for {measure.NAME}: {allowed}, as in nDCG@10 or RR(rel=2)@10."
        ) from error
    if not ir_measures.DefaultPipeline.supports(measure):  # type: ignore[no-untyped-call]
        raise ValueError(f"measure={name!r}: no installed package computes it.")
    return measure


def _trec_eval_measure(name: str) -> ir_measures.Measure | None:
    """Return the measure with this name in trec_eval; None if there is none, or if the name means several."""
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
    """Evaluate a run, and compare it with a baseline.

    Every query with judgements counts. A query missing from a run counts as one without results (``trec_eval -c``); a
    warning gives their number. Documents are sorted by score; ties keep their rank or, without ranks, their order,
    while trec_eval sorts ties by docno. The difference can be large for runs with rounded scores.

    Args:
        measures: the measures.
        qrels: judgements.
        run: the run to evaluate.
        baseline: the run to compare it with.

    Returns:
        A frame with the values of each query, ``qid``, ``measure`` and ``value``, in the order of the judgements; and
        one with the values of each measure, ``measure`` and ``value``. With a baseline, both frames also have
        ``baseline`` and ``difference``, and the second has ``p``, from a paired two-sided t-test over the queries (NaN
        if no query differs).

    Raises:
        ValueError: a run is empty or has none of the queries with judgements, or a measure cannot be computed.
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
    total["p"] = [_paired_p(pairs[name]["value"], pairs[name]["baseline"]) for name in total["measure"]]
    return queries, total


def _measure(
    measures: Sequence[ir_measures.Measure], judged: Sequence[ir_measures.Qrel], run: Iterable[RunRow], name: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the values of each query, and of each measure."""
    scored = [
        ir_measures.ScoredDoc(row.qid, row.docno, -rank)
        for _, rows in by_query(run)
        for rank, row in enumerate(best_first(rows))
    ]
    judged_qids, run_qids = dict.fromkeys(judgement.query_id for judgement in judged), {row.query_id for row in scored}
    if not run_qids:
        raise ValueError(f"the {name} is empty; expected results to evaluate.")
    if not run_qids & judged_qids.keys():
        judged_qid, run_qid = next(iter(judged_qids)), scored[0].query_id
        raise ValueError(
            f"the {name} has none of the queries with judgements: it has {run_qid!r}, for example, and the qrels have "
            f"{judged_qid!r}."
        )
    if missing := judged_qids.keys() - run_qids:
        logger.warning("The %s lacks %d of the %d queries with judgements; they count as queries without results.",
                       name, len(missing), len(judged_qids))  # fmt: skip
    try:
        found: Any = ir_measures.calc(measures, judged, scored)
    except subprocess.CalledProcessError as error:  # from gdeval, which needs numeric qids
        names = ", ".join(map(str, measures))
        raise ValueError(
            f"measure={names}: an external program failed ({error}); measures such as ERR need numeric qids."
        ) from error
    values = {(str(metric.measure), metric.query_id): metric.value for metric in found.per_query}
    keys = [(str(measure), query) for measure in measures for query in judged_qids]
    queries = [(qid, key, values[key, qid]) for key, qid in keys if (key, qid) in values]  # not all have an Accuracy
    total = [(str(measure), found.aggregated[measure]) for measure in measures]
    return pd.DataFrame(queries, columns=["qid", "measure", "value"]), pd.DataFrame(total, columns=["measure", "value"])


def _paired_p(values: pd.Series[float], others: pd.Series[float]) -> float:
    """Return the p-value of a paired t-test; NaN for fewer than two queries, or if none differs."""
    if len(values) < 2:
        return float("nan")
    from scipy import stats  # slow to import

    return float(stats.ttest_rel(values, others).pvalue)
