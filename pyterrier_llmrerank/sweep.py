"""A sweep over shapes: the grid, the measurement of each shape, and the Pareto front."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .engine.cascade import Cascade
from .frames import distinct
from .matroyshka import MatroyshkaReranker
from .runs.evaluation import Evaluation, Floats

if TYPE_CHECKING:
    from .engine.flops import Operations

#: The most cutoffs to try if the user names none.
CUTOFFS = 8

#: Bootstrap samples of the queries for an interval.
DRAWS = 1000

#: Rounds in which the shapes on the front take turns to be timed.
ROUNDS = 2


# -- the grid


class Choice(NamedTuple):
    """Holds a shape, by the arguments of :meth:`~pyterrier_llmrerank.MatroyshkaReranker.at`."""

    cutoff: int
    compress_layers: tuple[int, ...]
    compress_ratio: int
    prune: tuple[tuple[int, int], ...]


def cascades(
    cutoffs: Sequence[int], keep: Sequence[int], stages: int
) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Yield every cutoff with every cascade that ends before it: no stage first, then one stage, and so on.

    Args:
        cutoffs: layers, ascending.
        keep: numbers of survivors, descending.
        stages: the most stages in a cascade.
    """
    for number, cutoff in enumerate(cutoffs):
        for count in range(stages + 1):
            for layers in combinations(cutoffs[:number], count):
                for kept in combinations(keep, count):
                    yield cutoff, tuple(zip(layers, kept, strict=True))


def choices(width: MatroyshkaReranker, keep: Sequence[int], stages: int) -> Iterator[Choice]:
    """Yield the shapes of a width. Shapes that end before the first pooling belong to the full width."""
    layers, ratio = width.compress_layers, width.compress_ratio
    first_pooling = 0 if ratio == 1 else min((layer for layer in layers if layer > 0), default=np.inf)
    for cutoff, prune in cascades(width.cutoffs(), keep, stages):
        if cutoff > first_pooling:
            yield Choice(cutoff, layers, ratio, prune)


def evenly_spaced(with_head: Sequence[int], deepest: int) -> list[int]:
    """Return up to :data:`CUTOFFS` evenly spaced layers with a head, down to ``deepest``."""
    layers = [layer for layer in with_head if layer <= deepest]
    count = min(CUTOFFS, len(layers))
    return [layers[-(-len(layers) * number // count) - 1] for number in range(1, count + 1)]


# -- measurements


class Candidates:
    """Holds rows to rank, and their distinct pairs.

    Args:
        rows: a result frame.
        text_field: the column with the text.
    """

    def __init__(self, rows: pd.DataFrame, text_field: str) -> None:
        #: The rows, with the columns that a reranker needs.
        self.rows = rows[["qid", "query", "docno", text_field]]
        #: The query of each row, by qid and text, ``[rows]``.
        self.queries = list(zip(rows["qid"], rows["query"], strict=True))
        #: The distinct pairs of query and passage, and the index of each row's pair, ``[rows]``.
        self.pairs, self.pair_of_row = distinct(list(zip(rows["query"], rows[text_field], strict=True)))
        #: The first row with each pair, ``[pairs]``.
        self.row_of_pair = np.unique(self.pair_of_row, return_index=True)[1]
        self._query_of_row = pd.factorize(rows["qid"])[0]

    def operations(self, reranker: MatroyshkaReranker, depth: int) -> Operations:
        """Open ``depth`` layers, and return a counter of the operations that the pairs take."""
        from .engine.flops import Operations

        scorer = reranker.scorer()
        queries = self._query_of_row[self.row_of_pair]
        return Operations(scorer.open(depth), scorer.ids(self.pairs), queries, int(self._query_of_row.max()) + 1)


class Measurement(NamedTuple):
    """Holds the measurements of one shape.

    Args:
        choice: the shape.
        values: the measure of each query, ``[queries]``.
        operations: multiplications and additions of each query, ``[queries]``.
        milliseconds: the predicted milliseconds per query.
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
) -> Iterator[Measurement]:
    """Measure all shapes of one width.

    Args:
        width: a reranker that reads logits at all cutoffs.
        grid: shapes of this width; nothing is run if there are none.
        candidates: the rows to rank.
        evaluation: measures rankings of these rows.

    Yields:
        A measurement for each shape in the grid.
    """
    if not grid:
        return
    cutoffs, layers, ratio = width.cutoffs(), width.compress_layers, width.compress_ratio
    operations = candidates.operations(width, cutoffs[-1])  # opens the weights before the pass is timed
    rows = candidates.rows
    width.transform(rows[rows["qid"] == rows["qid"].iloc[0]])  # the first batch compiles, plans and takes memory
    begun = time.perf_counter()
    scored = width.transform(rows)
    seconds = time.perf_counter() - begun
    rate = seconds / operations(cutoffs, layers, ratio).sum()
    logits = {cutoff: scored.get(f"score_{cutoff}", scored["score"]).to_numpy() for cutoff in cutoffs}
    for choice in grid:
        cascade = Cascade(dict(choice.prune), candidates.queries, candidates.pair_of_row, choice.cutoff)
        survivors: Sequence[int] = range(len(candidates.pairs))
        for layer, _ in choice.prune:
            survivors = cascade.survivors(layer, survivors, logits[layer][candidates.row_of_pair])
        exit_layer = np.zeros(len(candidates.pairs), dtype=int)
        np.maximum.at(exit_layer, candidates.pair_of_row, cascade.exit_layer)  # the deepest of its rows
        counted = operations([*dict(choice.prune), choice.cutoff], layers, ratio, exit_layer)
        values = evaluation(cascade.final_scores(logits))
        yield Measurement(choice, values, counted, 1000 * rate * counted.mean())


def in_turns(rerankers: Sequence[MatroyshkaReranker], rows: pd.DataFrame) -> Floats:
    """Return each reranker's median seconds for some rows; rerankers take turns, so other load affects all alike."""
    for reranker in rerankers:
        reranker.scorer().open()
    taken = np.empty((ROUNDS, len(rerankers)))
    for turn in taken:
        for number, reranker in enumerate(rerankers):
            begun = time.perf_counter()
            reranker.transform(rows)
            turn[number] = time.perf_counter() - begun
    return np.median(taken, axis=0)


def pareto(cost: Floats, value: Floats) -> NDArray[np.bool_]:
    """Return a mask of the points on the Pareto front.

    On the front, no other point has at least the value at a lower cost, or a higher value at the same cost.
    """
    costs, place = np.unique(cost, return_inverse=True)
    best = np.full(len(costs), -np.inf)
    np.maximum.at(best, place, value)
    cheaper = np.concatenate([[-np.inf], np.maximum.accumulate(best)[:-1]])
    on_front: NDArray[np.bool_] = (value == best[place]) & (value > cheaper[place])
    return on_front


def interval(values: Floats) -> tuple[Floats, Floats]:
    """Return the 95 % bootstrap interval of each column's mean, ``[queries, columns]``, from the same samples."""
    queries = len(values)
    drawn = np.random.default_rng(0).multinomial(queries, np.full(queries, 1 / queries), size=DRAWS)
    low, high = np.percentile(drawn @ values / queries, [2.5, 97.5], axis=0)
    return low, high
