"""Drop all but the best candidates of each query after some layers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

#: The difference in score between the worst survivor of a layer and the best candidate dropped there.
GAP = 1.0


class Cascade:
    """Decides after which layer a row of a result frame is dropped, and ranks all rows.

    Ties are broken by the order of the rows, as in PyTerrier's ranks.

    Args:
        prune: the number of candidates per query that survive each layer, by layer.
        queries: identifies the query of each row, ``[rows]``.
        pair_of_row: index of the distinct pair in each row, ``[rows]``.
        deepest: the layer that scores the survivors of all stages.
    """

    def __init__(
        self, prune: Mapping[int, int], queries: Sequence[Hashable], pair_of_row: NDArray[np.intp], deepest: int
    ) -> None:
        self.prune = dict(prune)
        numbers: dict[Hashable, int] = {}
        self._query = np.array([numbers.setdefault(query, len(numbers)) for query in queries], dtype=int)
        self._pair_of_row = pair_of_row
        #: The layer after which each row was dropped, ``[rows]``; the deepest layer for rows that were not.
        self.exit_layer = np.full(len(pair_of_row), deepest)
        self._by_pair = np.argsort(pair_of_row, kind="stable")
        self._starts = np.searchsorted(pair_of_row[self._by_pair], np.arange(pair_of_row.max(initial=-1) + 2))

    def survivors(self, layer: int, pairs: Sequence[int], scores: NDArray[np.float64]) -> list[int]:
        """Drop rows after a layer, and return the surviving pairs.

        Args:
            layer: the layer.
            pairs: all remaining pairs of some queries.
            scores: this layer's score of every pair, ``[pairs]``.

        Returns:
            The pairs of which at least one row survives, in the order of ``pairs``.
        """
        rows = np.sort(np.concatenate([self._by_pair[self._starts[pair] : self._starts[pair + 1]] for pair in pairs]))
        rows = rows[self.exit_layer[rows] > layer]
        by_score = rows[np.lexsort((rows, -scores[self._pair_of_row[rows]], self._query[rows]))]
        queries = self._query[by_score]
        place = np.arange(len(by_score)) - np.searchsorted(queries, queries)
        is_dropped = place >= self.prune[layer]
        self.exit_layer[by_score[is_dropped]] = layer
        survivors = set(self._pair_of_row[by_score[~is_dropped]].tolist())
        return [pair for pair in pairs if pair in survivors]

    @np.errstate(invalid="ignore")  # rows without a score
    def final_scores(self, scores: Mapping[int, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Combine the layers' scores into a final score that ranks dropped rows below all survivors of their query.

        Args:
            scores: score of each row by layer, ``[rows]``; NaN where the row did not reach the layer.

        Returns:
            The deepest layer's score for survivors. Rows that were dropped get their last score, lowered by the same
            amount for all rows of a query that were dropped at the same layer. If one row of a query has no score, all
            rows of the query get NaN.
        """
        exits = {int(layer): self.exit_layer == layer for layer in np.unique(self.exit_layer)}
        own = np.full(len(self.exit_layer), np.nan)
        for layer, here in exits.items():
            own[here] = scores[layer][here]
        floor = np.full(self._query.max(initial=-1) + 1, np.inf)  # the lowest score of each query so far
        for layer in sorted(exits, reverse=True):
            rows = np.flatnonzero(exits[layer])
            query = self._query[rows]
            best = np.full(len(floor), -np.inf)
            np.maximum.at(best, query, own[rows])
            down = np.where(np.isinf(floor), 0.0, best - floor + GAP)  # 0 where no row went deeper
            own[rows] -= down[query]
            np.minimum.at(floor, query, own[rows])
        return np.where(np.isnan(floor)[self._query], np.nan, own)
