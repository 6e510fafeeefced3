"""Evaluate rankings of the same candidates, or compare runs."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
    """Computes a measure for many rankings of the same candidates, as ``pt.Experiment`` does.

    Args:
        measure: a measure of ir_measures, or its name.
        rows: the candidates: ``qid`` and ``docno``.
        qrels: judgements: ``qid``, ``docno`` and ``label``. Only queries with candidates count.

    Raises:
        ValueError: the measure is unknown, no installed package computes it, or it is not defined for a query.
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
        self(-np.arange(len(rows), dtype=float))  # raises now, not after a ranking has been computed

    def __call__(self, scores: Floats) -> Floats:
        """Return the measure of each query, ``[queries]``, if the candidates are ranked by ``scores``, ``[rows]``."""
        run: dict[str, dict[str, float]] = {query: {} for query in self.queries}
        for query, docno, score in zip(self._qids, self._docnos, scores.tolist(), strict=True):
            run[query][docno] = score
        try:
            values = self._values(run)
        except subprocess.CalledProcessError as error:  # from gdeval, which needs numeric qids
            raise _external_failure([self.measure], error) from error
        except ZeroDivisionError:
            values = {}
            for query, own in run.items():
                with suppress(ZeroDivisionError):
                    values |= self._values({query: own})
        if undefined := [query for query in self.queries if query not in values]:
            raise ValueError(
                f"measure={self.measure}: not defined for {len(undefined)} of {len(self.queries)} queries, such as "
                f"{undefined[0]!r}; leave them out, or choose another measure."
            )
        return np.array([values[query] for query in self.queries], dtype=float)

    def _values(self, run: dict[str, dict[str, float]]) -> dict[str, float]:
        """Return the measure of the queries that have one."""
        return {metric.query_id: metric.value for metric in self._evaluator.iter_calc(run)}

    def input_mean(self, rows: pd.DataFrame) -> float | None:
        """Return the mean measure of the candidates by their ``score`` or, without one, ``rank``; None without both."""
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
    """Return the measure with this name in trec_eval; None if the name means no measure or several."""
    try:
        found = ir_measures.parse_trec_measure(name)
    except ValueError:
        return None
    return found[0] if len(found) == 1 else None


def compare(
    measures: Sequence[ir_measures.Measure],
    qrels: Sequence[Judgement],
    runs: Mapping[str, Iterable[RunRow]],
    baseline: Iterable[RunRow] | None = None,
    correction: str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Evaluate runs, and compare each with a baseline.

    Every query with judgements counts. A query missing from a run counts as one without results (``trec_eval -c``); a
    warning gives the number of such queries. Documents are sorted by score; ties keep their rank or, without ranks,
    their order, while trec_eval sorts ties by docno. The difference can be large for runs with rounded scores.

    Args:
        measures: the measures.
        qrels: judgements.
        runs: the runs to evaluate, by name.
        baseline: the run to compare them with.
        correction: ``"holm"`` or ``"bonferroni"``, to correct for the number of runs, measure by measure.

    Returns:
        A frame with the values of each query, ``qid``, ``measure`` and ``value``, in the order of the judgements; and
        one with the values of each measure, ``measure`` and ``value``. With several runs, both begin with ``run``. With
        a baseline, both also have ``baseline`` and ``difference``, and the second has ``p``, from a paired two-sided
        t-test over the queries (NaN if no query differs). With a correction, the second also has the corrected
        values, as ``p_holm`` or ``p_bonferroni``.

    Raises:
        ValueError: a measure is named twice or cannot be computed, a run is empty or has none of the queries with
            judgements, or there is a correction without a baseline.
    """
    if repeated := [measure for number, measure in enumerate(measures) if measure in measures[:number]]:
        raise ValueError(f"measure={repeated[0]} is named twice, perhaps by two of its names; expected it once.")
    if correction is not None and baseline is None:
        raise ValueError(f"correction={correction!r} needs a baseline; allowed without one: None.")
    judged = pd.DataFrame([(row.qid, row.docno, row.label) for row in qrels], columns=["qid", "docno", "label"])
    ranked = {name: _ranked(rows) for name, rows in runs.items()}
    labels = {name: "run" if len(runs) == 1 else f"run {name}" for name in runs}
    tables = [_measure(measures, judged, ranked[name], labels[name]) for name in runs]
    parts = zip(*tables, strict=True)
    queries, total = (pd.concat(frames, keys=runs, names=["run"]).reset_index("run") for frames in parts)
    if baseline is not None:
        other = _ranked(baseline)
        other_queries, other_total = _measure(measures, judged, other, "baseline")
        queries = _with_differences(queries, other_queries, on=["qid", "measure"])
        total = _with_differences(total, other_total, on=["measure"])
        tests = _tests(measures, judged, [other, *ranked.values()], queries, correction)
        total = total.merge(tests, on=["run", "measure"])
    if len(runs) == 1:
        return queries.drop(columns="run"), total.drop(columns="run")
    return _by_measure(queries, measures), _by_measure(total, measures)


def _ranked(rows: Iterable[RunRow]) -> pd.DataFrame:
    """Return a run as a result frame whose scores are negated ranks, so that no measure meets a tie."""
    ranked = [
        (row.qid, row.docno, -rank, rank) for _, query in by_query(rows) for rank, row in enumerate(best_first(query))
    ]
    return pd.DataFrame(ranked, columns=["qid", "docno", "score", "rank"])


def _measure(
    measures: Sequence[ir_measures.Measure], judged: pd.DataFrame, ranked: pd.DataFrame, name: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the values of each query, and of each measure."""
    judged_qids, run_qids = dict.fromkeys(judged["qid"]), set(ranked["qid"])
    if not run_qids:
        raise ValueError(f"the {name} is empty; expected results to evaluate.")
    if not run_qids & judged_qids.keys():
        judged_qid, run_qid = judged["qid"].iloc[0], ranked["qid"].iloc[0]
        raise ValueError(
            f"the {name} has none of the queries with judgements: it has {run_qid!r}, for example, and the qrels have "
            f"{judged_qid!r}."
        )
    if missing := judged_qids.keys() - run_qids:
        logger.warning("The %s lacks %d of the %d queries with judgements; they count as queries without results.",
                       name, len(missing), len(judged_qids))  # fmt: skip
    try:
        found: Any = ir_measures.calc(measures, pt.model.to_ir_measures(judged), pt.model.to_ir_measures(ranked))
    except subprocess.CalledProcessError as error:  # from gdeval, which needs numeric qids
        raise _external_failure(measures, error) from error
    except ZeroDivisionError as error:  # Accuracy of a query with relevant results alone
        names = ", ".join(map(str, measures))
        raise ValueError(f"measure={names}: not defined for a query of the {name} ({error}).") from error
    values = {(str(metric.measure), metric.query_id): metric.value for metric in found.per_query}
    keys = [(str(measure), query) for measure in measures for query in judged_qids]
    queries = [(qid, key, values[key, qid]) for key, qid in keys if (key, qid) in values]  # not all have an Accuracy
    total = [(str(measure), found.aggregated[measure]) for measure in measures]
    return pd.DataFrame(queries, columns=["qid", "measure", "value"]), pd.DataFrame(total, columns=["measure", "value"])


def _with_differences(values: pd.DataFrame, baseline: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """Add the values of the baseline, and the differences from it."""
    both = values.merge(baseline.rename(columns={"value": "baseline"}), on=on)
    return both.assign(difference=both["value"] - both["baseline"])


def _by_measure(frame: pd.DataFrame, measures: Sequence[ir_measures.Measure]) -> pd.DataFrame:
    """Sort the rows of several runs by measure, in the order of the measures."""
    place = {str(measure): number for number, measure in enumerate(measures)}
    return frame.sort_values("measure", key=lambda names: names.map(place), kind="stable", ignore_index=True)


def _external_failure(measures: Sequence[ir_measures.Measure], error: subprocess.CalledProcessError) -> ValueError:
    """Return the error for measures that another program failed to compute."""
    names = ", ".join(map(str, measures))
    return ValueError(f"measure={names}: an external program failed ({error}); measures such as ERR need numeric qids.")


def _tests(
    measures: Sequence[ir_measures.Measure],
    judged: pd.DataFrame,
    systems: Sequence[pd.DataFrame],
    queries: pd.DataFrame,
    correction: str | None,
) -> pd.DataFrame:
    """Test the differences of the other systems from the first, over the queries with all measures for all runs."""
    runs, counts = list(dict.fromkeys(queries["run"])), queries["qid"].value_counts()
    topics = pd.DataFrame({"qid": counts.index[counts == len(runs) * len(measures)], "query": ""})
    found = {"p": "p-value"} | ({} if correction is None else {f"p_{correction}": "p-value corrected"})
    if len(topics) < 2:
        keys = [(run, str(measure)) for run in runs for measure in measures]
        return pd.DataFrame(keys, columns=["run", "measure"]).assign(**dict.fromkeys(found, np.nan))
    table = pt.Experiment(
        systems, topics, judged, measures, names=["", *runs], baseline=0, test=_paired_t, correction=correction,
        validate="ignore",
    )[1:]  # fmt: skip
    tests = []
    for name in map(str, measures):
        differs = table[f"{name} +"] + table[f"{name} -"] > 0
        columns = {key: table[f"{name} {column}"].where(differs) for key, column in found.items()}
        tests.append(pd.DataFrame({"run": runs, "measure": name}, index=table.index).assign(**columns))
    return pd.concat(tests)


def _paired_t(values: Any, others: Any) -> tuple[float, float]:
    """Return statistic and p-value of a paired t-test. For equal values, p is 1: a correction could not count NaN."""
    from scipy import stats  # slow to import

    if (values == others).all():
        return 0.0, 1.0
    statistic, p = stats.ttest_rel(values, others)
    return float(statistic), float(p)
