"""The scores of a frame's rows, and the observer of the call that computes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .engine.cascade import Cascade
from .engine.usage import Observer, Usage


class Scores(NamedTuple):
    """Holds scores of some rows.

    Args:
        final: score of each row, ``[rows]``; NaN for rows that were not scored.
        by_layer: scores at each cutoff layer, ``[rows]``; NaN for rows that did not reach it.
        exit_layer: the layer after which a cascade dropped each row; None without a cascade.
        logits: the final scores before normalisation, ``[rows]``, by which rows are ranked.
    """

    final: np.ndarray
    by_layer: Mapping[int, np.ndarray]
    exit_layer: np.ndarray | None
    logits: np.ndarray

    @classmethod
    def none(cls, rows: int = 0) -> Scores:
        """Return scores that are all missing."""
        missing = np.full(rows, np.nan)
        return cls(missing, defaultdict(lambda: missing), np.zeros(rows, dtype=int), missing)

    @classmethod
    def of_logits(
        cls,
        logits: np.ndarray,
        cutoffs: Sequence[int],
        cascade: Cascade | None,
        finish: Callable[[np.ndarray], np.ndarray],
    ) -> Scores:
        """Turn logits into scores.

        Args:
            logits: a row for each cutoff, ``[cutoffs, rows]``.
            cutoffs: their layers, ascending.
            cascade: the cascade that dropped some of the rows; None without one.
            finish: turns logits into scores.
        """
        by_layer = dict(zip(cutoffs, logits, strict=True))
        if cascade is None:
            final, exit_layer = by_layer[cutoffs[-1]], None
        else:
            final, exit_layer = cascade.final_scores(by_layer), cascade.exit_layer
            for layer, here in by_layer.items():  # another row with the same text may have survived
                here[exit_layer < layer] = np.nan
        return cls(finish(final), {layer: finish(here) for layer, here in by_layer.items()}, exit_layer, final)

    @classmethod
    def of_error(cls, error: BaseException, rows: int) -> Scores:
        """Return the scores that an error carries; all missing if it carries none."""
        scores = getattr(error, "scores", None)
        return scores if isinstance(scores, cls) else cls.none(rows)


class RowObserver(Observer):
    """Names the rows of a call in errors, moves its progress bar, and collects its usage.

    Args:
        name: names a row.
        pair_of_row: index of the distinct pair in each row, ``[rows]``.
        bar: the progress bar.
    """

    def __init__(self, name: Callable[[int], str], pair_of_row: NDArray[np.intp], bar: Any) -> None:
        self.parts: list[Usage] = []
        self._name, self._pair_of_row, self._bar = name, pair_of_row, bar

    def label(self, pair: int) -> str:
        """Name the first row that holds a pair."""
        return self._name(int(np.argmax(self._pair_of_row == pair)))

    def progress(self, pairs: int) -> None:
        """Move the progress bar."""
        self._bar.update(pairs)

    def used(self, usage: Usage) -> None:
        """Collect a part of the usage."""
        self.parts.append(usage)
