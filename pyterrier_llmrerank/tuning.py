"""Choosing a shape: what each of a grid costs and how well it ranks, measured in as few passes as possible."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import ir_measures
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .engine.cascade import Cascade
from .matroyshka import MatroyshkaReranker
from .runs.evaluation import Evaluation, Floats
from .values import integer, positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .engine.operations import Operations

#: Cutoffs that are tried where none are named.
CUTOFFS = 8

#: Times that the queries are drawn anew for an interval.
DRAWS = 1000

#: Times that the shapes on the front take turns when they are timed.
ROUNDS = 2

#: What a budget may be of, by its column.
COSTS = {"share": "of the full shape's operations", "milliseconds": "milliseconds a query"}


class Choice(NamedTuple):
    """A shape, by the arguments of :meth:`~pyterrier_llmrerank.MatroyshkaReranker.at`."""

    cutoff: int
    compress_layers: tuple[int, ...]
    compress_ratio: int
    prune: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Tuning:
    """What :func:`tune` measured.

    Args:
        base: the reranker of which the shapes are.
        shapes: a row a shape: ``cutoff``, ``compress_layers``, ``compress_ratio`` and ``prune``, as ``base.at`` takes
            them; the mean measure, in a column of its name, and ``low`` and ``high``, its 95 % interval;
            ``operations`` a query (multiplications and additions) and their ``share`` of the full shape's;
            ``milliseconds`` a query, and whether they were ``timed`` or follow from the operations; whether the shape
            is on the ``front``: none does at least as well for less, or better for as much.
        measure: the name of the measure.
        budget: as given to :func:`tune`.
        first_stage: the measure of the candidates as they came; None where they had neither score nor rank.
    """

    base: MatroyshkaReranker
    shapes: pd.DataFrame
    measure: str
    budget: float | str | None
    first_stage: float | None

    @property
    def front(self) -> pd.DataFrame:
        """The rows on the front, cheapest first."""
        return self.shapes[self.shapes["front"]].sort_values("operations")

    @property
    def best(self) -> MatroyshkaReranker:
        """The most effective of the front within the budget; of equals the cheaper.

        Raises:
            ValueError: the budget is too small for any.
        """
        front, (cost, limit) = self.front, limit_of(self.budget)
        within = front[front[cost] <= limit]
        if within.empty:
            cheapest = f"{front[cost].min():.3g} {COSTS[cost]}"
            raise ValueError(f"budget={self.budget!r}: no shape is within it; the cheapest takes {cheapest}.")
        return self.reranker(within.iloc[int(within[self.measure].argmax())])

    def reranker(self, shape: int | pd.Series[Any]) -> MatroyshkaReranker:
        """One of the shapes, over the same weights.

        Args:
            shape: a row of ``shapes`` or ``front``, or its index there.

        Raises:
            KeyError: there is no such row.
        """
        row = shape if isinstance(shape, pd.Series) else self.shapes.loc[shape]
        choice: dict[str, Any] = {name: row[name] for name in Choice._fields}
        return self.base.at(**choice)

    def plot(self, ax: Axes | None = None, cost: str = "share") -> Axes:
        """Draw what each shape costs and how well it ranks, and the front with its intervals.

        Args:
            ax: where to; None for a new figure.
            cost: ``"share"`` of the full shape's operations, or ``"milliseconds"`` a query.

        Returns:
            The axes.

        Raises:
            ValueError: no such cost.
            ImportError: matplotlib is not installed.
        """
        if cost not in COSTS:
            raise ValueError(f"cost={cost!r}; allowed: {', '.join(COSTS)}.")
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot needs matplotlib: pip install 'pyterrier-llmrerank[plot]'.") from error
            ax = pyplot.subplots()[1]
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
    """Measure a grid of shapes and cascades, one pass a width.

    A pass reads the scores at all cutoffs. What survives a cascade's stage is scored as without it, so that every
    cascade's ranking follows from these: it takes no pass of its own. (In bf16 a cutoff read on the way differs from
    the same one asked for alone in the last digits, as the README says.)

    Args:
        reranker: whose shapes; its own cutoff bounds the depth, its own cascade is set aside.
        res: candidates to validate on: ``qid``, ``query``, ``docno`` and the text column. Queries without
            judgements are left out. ``score``, or else ``rank``, tells what the first stage does.
        qrels: judgements: ``qid``, ``docno`` and ``label``.
        measure: of ir_measures, by name or itself; a mean over queries, of which more is better.
        budget: what :attr:`Tuning.best` may cost: a share of the full shape's operations (0.5), or milliseconds a
            query (``"150ms"``); None for all there is. The full shape is the deepest cutoff, uncompressed and
            without a cascade.
        cutoffs: layers to cut off at, and of cascades' stages; None for up to 8 evenly spaced ones that have heads.
        compress_ratios: widths, as for the reranker; just 1 for a model whose layers cannot be walked.
        compress_layers: where passages are pooled in the widths above 1; None for the reranker's own, or if it has
            none the layer after a quarter of the depth.
        keep: how many candidates may go on after a stage; those below the longest list are tried.
        stages: stages of a cascade at most, keeping fewer each; 0 for no cascades, nor has a model any whose layers
            cannot be walked.
        timed: the shapes on the front are timed on so many queries, the first ones, in two rounds in which they
            take turns; their median is scaled from these queries' operations to those of all. All other
            milliseconds are predicted, from the operations and what the pass of that width took. 0 for predicted
            ones alone.

    Returns:
        The measurements, the front, and the best within the budget. Intervals are percentiles of 1000 draws of the
        queries, the same for all shapes.

    Raises:
        ValueError: an argument is not what is allowed; nothing was run then.
        ScoringError: as :meth:`~pyterrier_llmrerank.LLMReranker.transform`.

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
        raise ValueError(f"reranker={reranker!r}; allowed: a MatroyshkaReranker, without released=True.")
    limit_of(budget)
    stages, timed = _natural("stages", stages), _natural("timed", timed)
    numbers = sorted({positive("keep", number) for number in np.atleast_1d(keep).tolist()}, reverse=True)
    rows = _judged(reranker, res, qrels)
    evaluation = Evaluation(measure, rows, qrels)

    checkpoint = reranker._weights().checkpoint
    if cutoffs is None:
        cutoffs = _spread(checkpoint.head_layers, reranker.deepest() or checkpoint.layers)
    if compress_layers is None:
        compress_layers = reranker.compress_layers or (-(-checkpoint.layers // 4),)
    if not checkpoint.supports_layerwise:
        compress_ratios, stages = 1, 0
    ratios = sorted(set(np.atleast_1d(compress_ratios).tolist()))
    widths = [
        reranker.at(
            cutoff=cutoffs, compress_layers=compress_layers if ratio != 1 else (), compress_ratio=ratio,
            prune=(), normalize=False,
        )
        for ratio in ratios
    ]  # fmt: skip
    for width in widths:  # what the model does not allow shows before the first pass
        width._shape(checkpoint)
    longest = rows["qid"].value_counts().max()
    grid = [list(choices(width, [number for number in numbers if number < longest], stages)) for width in widths]
    if not any(grid):
        asked = f"compress_ratios={ratios}, compress_layers={compress_layers}"
        raise ValueError(f"{asked}: no shape is left; allowed: ratio 1 too, or a pooling before the deepest cutoff.")

    candidates = Candidates(rows, reranker.text_field)
    whole = reranker.at(compress_layers=(), compress_ratio=1, prune=())
    full = candidates.operations(whole, 0)(_depths(widths[0])[-1:]).mean()
    measured: list[Measured] = []
    while widths:  # each may have weights of its own: held no longer than its pass
        measured += one_pass(widths.pop(0), grid.pop(0), candidates, evaluation)
    values = np.stack([each.values for each in measured], axis=1)
    operations = np.stack([each.operations for each in measured], axis=1)
    low, high = interval(values)
    shapes = pd.DataFrame([each.choice for each in measured], columns=list(Choice._fields)).assign(
        **{str(evaluation.measure): values.mean(axis=0)},
        low=low,
        high=high,
        operations=operations.mean(axis=0),
        share=operations.mean(axis=0) / full,
        milliseconds=[each.milliseconds for each in measured],
        timed=False,
        front=pareto(operations.mean(axis=0), values.mean(axis=0)),
    )
    tuning = Tuning(reranker, shapes, str(evaluation.measure), budget, evaluation.input_mean(rows))
    if timed:
        chosen = np.flatnonzero(shapes["front"])
        first = list(dict.fromkeys(rows["qid"]))[:timed]
        seconds = in_turns([tuning.reranker(int(index)) for index in chosen], rows[rows["qid"].isin(first)])
        whole = operations[:, chosen].mean(axis=0) / operations[: len(first), chosen].sum(axis=0)
        shapes.loc[chosen, "milliseconds"] = 1000 * seconds * whole
        shapes.loc[chosen, "timed"] = True
    return tuning


# -- the grid


def cascades(
    cutoffs: Sequence[int], keep: Sequence[int], stages: int
) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Every cutoff with every cascade before it: none first, then one stage, and so on.

    Args:
        cutoffs: layers, ascending.
        keep: how many go on, descending.
        stages: at most.
    """
    for number, cutoff in enumerate(cutoffs):
        for count in range(stages + 1):
            for layers in combinations(cutoffs[:number], count):
                for kept in combinations(keep, count):
                    yield cutoff, tuple(zip(layers, kept, strict=True))


def choices(width: MatroyshkaReranker, keep: Sequence[int], stages: int) -> Iterator[Choice]:
    """The shapes of a width, but for those that end before its first pooling: they cost what the full width does."""
    layers, ratio = width.compress_layers, width.compress_ratio
    full = 0 if ratio == 1 else min((layer for layer in layers if layer > 0), default=np.inf)
    for cutoff, prune in cascades(_depths(width), keep, stages):
        if cutoff > full:
            yield Choice(cutoff, layers, ratio, prune)


def _spread(with_head: Sequence[int], deepest: int) -> list[int]:
    """Some of the layers with a head, at even distances up from the deepest."""
    layers = [layer for layer in with_head if layer <= deepest]
    count = min(CUTOFFS, len(layers))
    return [layers[-(-len(layers) * number // count) - 1] for number in range(1, count + 1)]


def _depths(reranker: MatroyshkaReranker) -> tuple[int, ...]:
    """A reranker's cutoffs, of which none is None."""
    cutoff = reranker.cutoff
    return cutoff if isinstance(cutoff, tuple) else (reranker._last_layer() if cutoff is None else cutoff,)


# -- what is measured


class Candidates:
    """Rows to rank, and the distinct pairs that they hold.

    Args:
        rows: a result frame.
        text_field: the column of its texts.
    """

    def __init__(self, rows: pd.DataFrame, text_field: str) -> None:
        #: What a reranker needs of the rows.
        self.rows = rows[["qid", "query", "docno", text_field]]
        #: What tells apart who competes, ``[rows]``.
        self.competing = list(zip(rows["qid"], rows["query"], strict=True))
        numbers: dict[tuple[str, str], int] = {}
        texts = zip(rows["query"], rows[text_field], strict=True)
        #: The distinct pair that each row holds, ``[rows]``.
        self.pair_of_row = np.array([numbers.setdefault(pair, len(numbers)) for pair in texts])
        #: A row that holds each pair, ``[pairs]``.
        self.row_of_pair = np.unique(self.pair_of_row, return_index=True)[1]
        #: Query and passage of each pair.
        self.pairs = list(numbers)
        self._query_of_row = pd.factorize(rows["qid"])[0]

    def operations(self, reranker: MatroyshkaReranker, depth: int) -> Operations:
        """What scoring the pairs takes on this reranker's weights, of which so many layers are opened for it."""
        from .engine.operations import Operations

        (decoder, _, tokenizer), *_ = (weights.at_depth(depth) for weights in reranker._replicas())
        queries = self._query_of_row[self.row_of_pair]
        return Operations(decoder, reranker._encode(tokenizer, self.pairs), queries, int(self._query_of_row.max()) + 1)


class Measured(NamedTuple):
    """A shape and what was measured of it.

    Args:
        choice: the shape.
        values: the measure of each query, ``[queries]``.
        operations: those of each query, ``[queries]``.
        milliseconds: a query, predicted.
    """

    choice: Choice
    values: Floats
    operations: Floats
    milliseconds: float


def one_pass(
    width: MatroyshkaReranker,
    grid: Sequence[Choice],
    candidates: Candidates,
    evaluation: Evaluation,
) -> Iterator[Measured]:
    """All depths and cascades of one width.

    Args:
        width: reads logits at all cutoffs.
        grid: shapes of this width; none, and nothing is run.
        candidates: to rank.
        evaluation: of their rows.

    Yields:
        Each of the grid.
    """
    if not grid:
        return
    cutoffs, layers, ratio = _depths(width), width.compress_layers, width.compress_ratio
    operations = candidates.operations(width, cutoffs[-1])  # opened before time is taken
    begun = time.perf_counter()
    scored = width.transform(candidates.rows)
    seconds = time.perf_counter() - begun
    rate = seconds / operations(cutoffs, layers, ratio).sum()
    logits = {cutoff: scored.get(f"score_{cutoff}", scored["score"]).to_numpy() for cutoff in cutoffs}
    for choice in grid:
        cascade = Cascade(dict(choice.prune), candidates.competing, candidates.pair_of_row, choice.cutoff)
        alive: Sequence[int] = range(len(candidates.pairs))
        for layer, _ in choice.prune:
            alive = cascade.survivors(layer, alive, logits[layer][candidates.row_of_pair])
        left = np.zeros(len(candidates.pairs), dtype=int)
        np.maximum.at(left, candidates.pair_of_row, cascade.exit_layer)  # a pair goes as far as one of its rows
        counted = operations([*dict(choice.prune), choice.cutoff], layers, ratio, left)
        values = evaluation(cascade.ordered(logits))
        yield Measured(choice, values, counted, 1000 * rate * counted.mean())


def in_turns(rerankers: Sequence[MatroyshkaReranker], rows: pd.DataFrame) -> Floats:
    """Median seconds of each for these rows; they take turns, so that all meet what else the machine does."""
    for reranker in rerankers:
        for weights in reranker._replicas():
            weights.at_depth(_depths(reranker)[-1])
    taken = np.empty((ROUNDS, len(rerankers)))
    for turn in taken:
        for number, reranker in enumerate(rerankers):
            begun = time.perf_counter()
            reranker.transform(rows)
            turn[number] = time.perf_counter() - begun
    return np.median(taken, axis=0)


def pareto(cost: Floats, value: Floats) -> NDArray[np.bool_]:
    """Which points are on the front: none has at least their value for less cost, or more for the same."""
    costs, place = np.unique(cost, return_inverse=True)
    best = np.full(len(costs), -np.inf)
    np.maximum.at(best, place, value)
    cheaper = np.concatenate([[-np.inf], np.maximum.accumulate(best)[:-1]])
    on_it: NDArray[np.bool_] = (value == best[place]) & (value > cheaper[place])
    return on_it


def interval(values: Floats) -> tuple[Floats, Floats]:
    """The 95 % bootstrap interval of each column's mean, ``[queries, columns]``; the same draws for all."""
    queries = len(values)
    drawn = np.random.default_rng(0).multinomial(queries, np.full(queries, 1 / queries), size=DRAWS)
    low, high = np.percentile(drawn @ values / queries, [2.5, 97.5], axis=0)
    return low, high


# -- values


def limit_of(budget: object) -> tuple[str, float]:
    """What is limited, as a column of the shapes, and to how much.

    >>> limit_of("150ms")
    ('milliseconds', 150.0)
    """
    if budget is None:
        return "share", np.inf
    if isinstance(budget, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*ms\s*", budget)):
        return "milliseconds", float(match[1])
    number = isinstance(budget, int | float | np.number) and not isinstance(budget, bool)
    if number and 0 < budget <= 1:  # type: ignore[operator]
        return "share", float(budget)  # type: ignore[arg-type]
    allowed = "a share of the full shape's operations, above 0 and up to 1; milliseconds a query, '150ms'; None"
    raise ValueError(f"budget={budget!r}; allowed: {allowed}.")


def _natural(name: str, value: object) -> int:
    """The value as an int of at least 0, or ValueError with the argument's name."""
    allowed = "an integer of at least 0"
    if (number := integer(name, value, allowed)) < 0:
        raise ValueError(f"{name}={value!r}; allowed: {allowed}.")
    return number


def _judged(reranker: MatroyshkaReranker, res: pd.DataFrame, qrels: pd.DataFrame) -> pd.DataFrame:
    """The candidates of queries that have judgements."""
    wanted = {"res": (res, ["qid", "query", "docno", reranker.text_field]), "qrels": (qrels, ["qid", "docno", "label"])}
    for name, (frame, columns) in wanted.items():
        if missing := [column for column in columns if column not in frame.columns]:
            raise ValueError(f"{name} has columns {list(frame.columns)}; missing: {', '.join(missing)}.")
    reranker._check_rows(res)
    rows = res[res["qid"].astype(str).isin(set(qrels["qid"].astype(str)))].reset_index(drop=True)
    if rows.empty:
        raise ValueError("res and qrels have no query in common; wanted candidates of queries with judgements.")
    return rows
