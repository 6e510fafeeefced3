"""Choose a shape: measure the cost and effectiveness of each shape in a grid, in as few passes as possible."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import ir_measures
import numpy as np
import pandas as pd

from .frames import check_columns, check_rows
from .matroyshka import MatroyshkaReranker
from .runs.evaluation import Evaluation
from .sweep import Candidates, Choice, Measurement, choices, evenly_spaced, in_turns, interval, one_pass, pareto
from .values import check_natural, check_positive, refuse

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: The costs that a budget may limit, by their column.
COSTS = {"share": "of the full shape's operations", "milliseconds": "milliseconds a query"}


class HeldOut(NamedTuple):
    """Holds the measure of shapes on queries that were not used to choose them, by :meth:`Tuning.held_out`.

    Args:
        mean: the mean over all queries, each measured with the shape that the other folds chose.
        low, high: its 95 % interval.
        folds: a row for each fold: the shape, as in :attr:`Tuning.shapes` and with the same index; ``queries``, their
            number in the fold; ``chosen``, the measure on the other queries, which chose the shape; and ``held_out``,
            the measure on the queries of the fold.
    """

    mean: float
    low: float
    high: float
    folds: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Tuning:
    """Holds the measurements of :func:`tune`.

    Args:
        base: the reranker whose shapes were measured.
        shapes: a row for each shape. ``cutoff``, ``compress_layers``, ``compress_ratio`` and ``prune`` are arguments
            of ``base.at``. A column named after the measure has its mean, and ``low`` and ``high`` its 95 % interval.
            ``operations`` (multiplications and additions per query), their ``share`` of the full shape's, and
            ``milliseconds`` per query are its cost. ``timed`` says whether the milliseconds were measured or are
            predicted from the operations. ``front`` says whether the shape is on the Pareto front: no other shape is
            at least as good at a lower cost, or better at the same cost.
        measure: the name of the measure.
        budget: as given to :func:`tune`.
        first_stage: the measure of the candidates by their own score or rank; None if they have neither.
        values: the measure of each query (a row, by qid) in each shape (a column, by its index in ``shapes``).
    """

    base: MatroyshkaReranker
    shapes: pd.DataFrame
    measure: str
    budget: float | str | None
    first_stage: float | None
    values: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def front(self) -> pd.DataFrame:
        """The shapes on the Pareto front, cheapest first."""
        return self.shapes[self.shapes["front"]].sort_values("operations")

    @property
    def best(self) -> MatroyshkaReranker:
        """The most effective shape on the front within the budget; among equals, the cheapest.

        Raises:
            ValueError: no shape is within the budget.
        """
        return self.reranker(self._best(self.front))

    def held_out(self, folds: int = 5) -> HeldOut:
        """Estimate how effective :attr:`best` is on other queries, by cross-validation.

        On the queries used to choose it, the best of many shapes looks better than it is. Here the queries are dealt
        into folds at random, with a fixed seed. For each fold, the best shape within the budget is chosen on the
        queries of all other folds, and measured on the queries of the fold.

        Args:
            folds: number of folds, at most the number of queries.

        Raises:
            ValueError: the number of folds is not allowed, or no shape is within the budget.
        """
        queries = len(self.values)
        if not 2 <= check_positive("folds", folds) <= queries:
            refuse("folds", folds, f"from 2 to {queries}, the number of queries")
        fold_of = np.random.default_rng(0).permutation(np.arange(queries) % folds)
        own, rows = np.empty(queries), []
        for fold in range(folds):
            held = fold_of == fold
            chosen = self.values[~held].mean()
            front = self.shapes[pareto(self.shapes["operations"].to_numpy(), chosen.to_numpy())]
            shape = self._best(front.assign(**{self.measure: chosen}).sort_values("operations"))
            own[held] = self.values[shape.name][held]
            found = {"queries": held.sum(), "chosen": shape[self.measure], "held_out": own[held].mean()}
            rows.append(pd.Series({**shape[[*Choice._fields, "share"]], **found}, name=shape.name))
        low, high = interval(own[:, None])
        return HeldOut(float(own.mean()), float(low[0]), float(high[0]), pd.DataFrame(rows).infer_objects())

    def _best(self, front: pd.DataFrame) -> pd.Series[Any]:
        """Return the row of the most effective shape within the budget; ValueError if there is none."""
        cost, limit = limit_of(self.budget)
        within = front[front[cost] <= limit]
        if within.empty:
            cheapest = f"{front[cost].min():.3g} {COSTS[cost]}"
            raise ValueError(f"budget={self.budget!r}: no shape is within it; the cheapest takes {cheapest}.")
        return within.iloc[int(within[self.measure].argmax())]

    def reranker(self, shape: int | pd.Series[Any]) -> MatroyshkaReranker:
        """Return the reranker in one of the shapes, over the same weights.

        Args:
            shape: a row of ``shapes`` or ``front``, or its index there.

        Raises:
            KeyError: there is no such row.
        """
        row = shape if isinstance(shape, pd.Series) else self.shapes.loc[shape]
        choice: dict[str, Any] = {name: row[name] for name in Choice._fields}
        return self.base.at(**choice)

    def plot(self, ax: Axes | None = None, cost: str = "share") -> Axes:
        """Plot effectiveness against cost for all shapes, and the front with its intervals.

        Args:
            ax: the axes; None for a new figure.
            cost: ``"share"`` of the full shape's operations, or ``"milliseconds"`` per query.

        Returns:
            The axes.

        Raises:
            ValueError: there is no such cost.
            ImportError: matplotlib is not installed.
        """
        if cost not in COSTS:
            refuse("cost", cost, ", ".join(COSTS))
        ax = _new_axes() if ax is None else ax
        for marker, color, label, kind in (
            ("D", "tab:orange", "without a cascade", self.shapes["prune"].str.len() == 0),
            (".", "tab:blue", "cascade", self.shapes["prune"].str.len() > 0),
        ):
            faint, strong = self.shapes[kind], self.shapes[kind & self.shapes["front"]]
            ax.scatter(faint[cost], faint[self.measure], s=16, marker=marker, color=color, alpha=0.2, linewidths=0)
            ax.scatter(strong[cost], strong[self.measure], s=25, marker=marker, color=color, zorder=3, label=label)
        front = self.front.sort_values(cost)
        value = front[self.measure]
        ax.errorbar(
            front[cost], value, yerr=[value - front["low"], front["high"] - value],
            color="black", linewidth=1, elinewidth=0.5, capsize=2, label="front, 95 % intervals",
        )  # fmt: skip
        if self.first_stage is not None:
            ax.axhline(self.first_stage, color="gray", linestyle="--", linewidth=1, label="first stage")
        column, limit = limit_of(self.budget)
        if column == cost and np.isfinite(limit):
            ax.axvline(limit, color="gray", linestyle=":", linewidth=1, label="budget")
        ax.set(xlabel=("share " if cost == "share" else "") + COSTS[cost], ylabel=self.measure)
        ax.legend(fontsize="small")
        return ax

    def __repr__(self) -> str:
        return f"Tuning of {self.base!r}: {len(self.shapes)} shapes, {len(self.front)} on the front by {self.measure}"


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'pyterrier-llmrerank[plot]'.") from error
    return pyplot.subplots()[1]


def tune(
    reranker: MatroyshkaReranker,
    res: pd.DataFrame,
    qrels: pd.DataFrame,
    measure: str | ir_measures.Measure = "nDCG@10",
    *,
    budget: float | str | None = None,
    cutoffs: int | Sequence[int] | None = None,
    compress_ratios: int | Sequence[int] = (1, 2, 4),
    compress_layers: int | Sequence[int] | None = None,
    keep: int | Sequence[int] = (10, 20, 50),
    stages: int = 2,
    timed: int = 4,
) -> Tuning:
    """Measure a grid of shapes and cascades, with one pass for each width.

    A pass reads the scores at all cutoffs, after the first query has warmed up the device. Survivors of a cascade get
    the same scores as without it, so the ranking of every cascade follows from the pass. (In bf16, a cutoff that is
    read in a deeper pass differs in the last digits from the same cutoff alone.)

    Args:
        reranker: its cutoff bounds the depth of the shapes; its own cascade is ignored.
        res: candidates to validate on, with ``qid``, ``query``, ``docno`` and the text column. Queries without
            judgements are left out. ``score``, or else ``rank``, gives the effectiveness of the first stage.
        qrels: judgements, with ``qid``, ``docno`` and ``label``.
        measure: a measure of ir_measures, or its name. Shapes with a higher mean over queries are better.
        budget: limits the cost of :attr:`Tuning.best`: a share of the full shape's operations (0.5) or milliseconds
            per query (``"150ms"``); None for no limit. The full shape is the deepest cutoff, without compression and
            without a cascade.
        cutoffs: layers for cutoffs and the stages of cascades; None for up to 8 evenly spaced layers with heads.
        compress_ratios: ratios in which passages are pooled, one for each width. Models whose layers cannot be run one
            by one get 1 alone.
        compress_layers: layers after which ratios above 1 pool passages; None for the reranker's own or, if it has
            none, the layer at a quarter of the depth.
        keep: numbers of candidates that survive a stage; only numbers below the longest list of candidates are tried.
        stages: the most stages in a cascade, each of which keeps fewer candidates; 0 for no cascades. Models whose
            layers cannot be run one by one get none.
        timed: number of queries, counted from the first, on which the shapes on the front are timed. The shapes take
            turns for two rounds; their median is scaled to all queries by operations. All other milliseconds are
            predicted from the operations and the time of their width's pass. 0 predicts all.

    Returns:
        The measurements. Intervals are percentiles of 1000 bootstrap samples of the queries, the same for all shapes.
        The best of many shapes looks better than it is; :meth:`Tuning.held_out` measures it on queries that were
        not used to choose it.

    Raises:
        ValueError: an argument is not allowed; raised before anything is run.
        ScoringError: as for :meth:`~pyterrier_llmrerank.LLMReranker.transform`.

    >>> import pandas as pd
    >>> from pyterrier_llmrerank import MatroyshkaReranker, tune
    >>> texts = ["Tea is made from leaves.", "Pandas eat bamboo."]
    >>> res = pd.DataFrame({"qid": "1", "query": "what do pandas eat", "docno": ["a", "b"], "text": texts})
    >>> qrels = pd.DataFrame({"qid": ["1"], "docno": ["b"], "label": [1]})
    >>> found = tune(MatroyshkaReranker("smollm2-135m"), res, qrels, "RR", budget=0.5)
    >>> table = found.front[["cutoff", "compress_ratio", "prune", "RR", "share", "milliseconds"]]
    >>> found.best.model
    'smollm2-135m'
    """
    if not isinstance(reranker, MatroyshkaReranker) or reranker.released:
        refuse("reranker", reranker, "a MatroyshkaReranker, without released=True")
    limit_of(budget)
    timed, stages = check_natural("timed", timed), check_natural("stages", stages)
    kept = sorted({check_positive("keep", number) for number in np.atleast_1d(keep).tolist()}, reverse=True)
    rows = _judged_rows(reranker, res, qrels)
    evaluation = Evaluation(measure, rows, qrels)
    widths = _widths(reranker, cutoffs, compress_ratios, compress_layers)
    grid = _grid(widths, rows, kept, stages)
    candidates = Candidates(rows, reranker.text_field)
    full = candidates.operations(reranker.at(compress_layers=(), compress_ratio=1, prune=()), depth=0)
    full_operations = full(widths[0].cutoffs()[-1:]).mean()
    measurements: list[Measurement] = []
    while widths:  # each width may have weights of its own, which are released after its pass
        measurements += one_pass(widths.pop(0), grid.pop(0), candidates, evaluation)
    shapes = _table(measurements, str(evaluation.measure), full_operations)
    values = pd.DataFrame({index: each.values for index, each in enumerate(measurements)}, index=evaluation.queries)
    tuning = Tuning(reranker, shapes, str(evaluation.measure), budget, evaluation.input_mean(rows), values)
    if timed:
        _time_front(tuning, rows, measurements, timed)
    return tuning


def _widths(
    reranker: MatroyshkaReranker,
    cutoffs: int | Sequence[int] | None,
    compress_ratios: int | Sequence[int],
    compress_layers: int | Sequence[int] | None,
) -> list[MatroyshkaReranker]:
    """Return a reranker for each ratio that reads logits at all cutoffs; ValueError if the model does not allow one."""
    checkpoint = reranker.scorer().checkpoint
    if not checkpoint.supports_layerwise:
        compress_ratios = 1
    if cutoffs is None:
        cutoffs = evenly_spaced(checkpoint.head_layers, reranker.deepest() or checkpoint.layers)
    if compress_layers is None:
        compress_layers = reranker.compress_layers or (-(-checkpoint.layers // 4),)
    widths = [
        reranker.at(
            cutoff=cutoffs, compress_layers=compress_layers if ratio != 1 else (), compress_ratio=ratio,
            prune=(), normalize=False,
        )
        for ratio in sorted(set(np.atleast_1d(compress_ratios).tolist()))
    ]  # fmt: skip
    for width in widths:
        _ = width.scorer().shape  # raises now, not after other widths have been measured
    return widths


def _grid(
    widths: Sequence[MatroyshkaReranker], rows: pd.DataFrame, kept: Sequence[int], stages: int
) -> list[list[Choice]]:
    """Return the shapes to measure, for each width; ValueError if there is none."""
    if not widths or not widths[0].scorer().checkpoint.supports_layerwise:
        stages = 0
    longest = rows["qid"].value_counts().max()
    survivors = [number for number in kept if number < longest]
    grid = [list(choices(width, survivors, stages)) for width in widths]
    if not any(grid):
        ratios = [width.compress_ratio for width in widths]
        allowed = "ratio 1 too, or compress_layers shallower than the deepest cutoff"
        raise ValueError(f"compress_ratios={ratios}: no shape is left; allowed: {allowed}.")
    return grid


def _table(measurements: Sequence[Measurement], measure: str, full_operations: float) -> pd.DataFrame:
    """Return :attr:`Tuning.shapes`, with predicted times."""
    values = np.stack([each.values for each in measurements], axis=1)
    operations = np.stack([each.operations for each in measurements], axis=1).mean(axis=0)
    low, high = interval(values)
    return pd.DataFrame([each.choice for each in measurements], columns=list(Choice._fields)).assign(
        **{measure: values.mean(axis=0)},
        low=low,
        high=high,
        operations=operations,
        share=operations / full_operations,
        milliseconds=[each.milliseconds for each in measurements],
        timed=False,
        front=pareto(operations, values.mean(axis=0)),
    )


def _time_front(tuning: Tuning, rows: pd.DataFrame, measurements: Sequence[Measurement], queries: int) -> None:
    """Replace the predicted times of the shapes on the front by times measured on the first queries."""
    shapes = tuning.shapes
    front = np.flatnonzero(shapes["front"]).tolist()
    first = list(dict.fromkeys(rows["qid"]))[:queries]
    seconds = in_turns([tuning.reranker(index) for index in front], rows[rows["qid"].isin(first)])
    operations = np.stack([measurements[index].operations for index in front], axis=1)
    scale = operations.mean(axis=0) / operations[: len(first)].sum(axis=0)
    shapes.loc[front, "milliseconds"] = 1000 * seconds * scale
    shapes.loc[front, "timed"] = True


# -- arguments


def limit_of(budget: object) -> tuple[str, float]:
    """Return the cost that a budget limits, as a column of the shapes, and the limit.

    >>> limit_of("150ms")
    ('milliseconds', 150.0)
    """
    if budget is None:
        return "share", np.inf
    if isinstance(budget, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*ms\s*", budget)):
        return "milliseconds", float(match[1])
    is_number = isinstance(budget, int | float | np.number) and not isinstance(budget, bool)
    if is_number and 0 < budget <= 1:  # type: ignore[operator]
        return "share", float(budget)  # type: ignore[arg-type]
    allowed = "a share of the full shape's operations, above 0 and up to 1; milliseconds a query, '150ms'; None"
    refuse("budget", budget, allowed)


def _judged_rows(reranker: MatroyshkaReranker, res: pd.DataFrame, qrels: pd.DataFrame) -> pd.DataFrame:
    """Return the candidates of queries with judgements; ValueError if there are none, or a column is missing."""
    check_columns("res", res, ["qid", "query", "docno", reranker.text_field])
    check_columns("qrels", qrels, ["qid", "docno", "label"])
    check_rows(res, reranker.text_field)
    rows = res[res["qid"].astype(str).isin(set(qrels["qid"].astype(str)))].reset_index(drop=True)
    if rows.empty:
        raise ValueError("res and qrels have no query in common; expected candidates of queries with judgements.")
    return rows
