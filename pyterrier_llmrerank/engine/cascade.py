"""A cascade: after some layers only the best candidates of each query go on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

#: Logits between the worst candidate that went further and the best that left.
GAP = 1.0


class Cascade:
    """Which rows of a result frame are still in, and where the others left.

    Ties are broken by the rows' order, as PyTerrier's ranks are.

    Args:
        prune: how many candidates of each query go on after a layer, by layer.
        queries: what tells the queries of the rows apart, ``[rows]``.
        pair_of_row: the distinct pair that each row holds, ``[rows]``.
        deepest: the layer at which what never leaves is scored.
    """

    def __init__(
        self, prune: Mapping[int, int], queries: Sequence[Hashable], pair_of_row: NDArray[np.intp], deepest: int
    ) -> None:
        self.prune = dict(prune)
        numbers: dict[Hashable, int] = {}
        self._query = np.array([numbers.setdefault(query, len(numbers)) for query in queries], dtype=int)
        self._pair_of_row = pair_of_row
        #: The layer after which each row left, ``[rows]``; the deepest for what did not.
        self.exit_layer = np.full(len(pair_of_row), deepest)
        self._by_pair = np.argsort(pair_of_row, kind="stable")
        self._starts = np.searchsorted(pair_of_row[self._by_pair], np.arange(pair_of_row.max(initial=-1) + 2))

    def survivors(self, layer: int, pairs: Sequence[int], scores: NDArray[np.float64]) -> list[int]:
        """The pairs that go on after a layer.

        Args:
            layer: where.
            pairs: all that were still in of some queries.
            scores: of every pair there is, at this layer.

        Returns:
            Those of ``pairs`` of which at least one row goes on, in their order.
        """
        rows = np.sort(np.concatenate([self._by_pair[self._starts[pair] : self._starts[pair + 1]] for pair in pairs]))
        rows = rows[self.exit_layer[rows] > layer]
        by_score = rows[np.lexsort((rows, -scores[self._pair_of_row[rows]], self._query[rows]))]
        of_query = self._query[by_score]
        place = np.arange(len(by_score)) - np.searchsorted(of_query, of_query)
        leaving = place >= self.prune[layer]
        self.exit_layer[by_score[leaving]] = layer
        going = set(self._pair_of_row[by_score[~leaving]].tolist())
        return [pair for pair in pairs if pair in going]

    @np.errstate(invalid="ignore")  # of what has no score
    def ordered(self, scores: Mapping[int, NDArray[np.float64]]) -> NDArray[np.float64]:
        """One score a row, by which what left stands below all of its query that went further.

        Args:
            scores: of each row by layer, NaN where it did not come so far.

        Returns:
            The deepest layer's score for what did not leave; scores at which others left, moved down by what it
            takes, by the same for all rows that left a query there. NaN for a query of which a row has no score.
        """
        wanted = {int(layer): self.exit_layer == layer for layer in np.unique(self.exit_layer)}
        own = np.full(len(self.exit_layer), np.nan)
        for layer, here in wanted.items():
            own[here] = scores[layer][here]
        floor = np.full(self._query.max(initial=-1) + 1, np.inf)
        for layer in sorted(wanted, reverse=True):
            rows = np.flatnonzero(wanted[layer])
            query = self._query[rows]
            best = np.full(len(floor), -np.inf)
            np.maximum.at(best, query, own[rows])
            down = np.where(np.isinf(floor), 0.0, best - floor + GAP)  # nothing to stand below: the deepest
            own[rows] -= down[query]
            np.minimum.at(floor, query, own[rows])
        return np.where(np.isnan(floor)[self._query], np.nan, own)
