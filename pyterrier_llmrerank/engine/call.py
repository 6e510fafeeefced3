"""Share the state of one call among its devices."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import ScoringError
from .cascade import Cascade
from .usage import Observer


class Stopped(Exception):  # noqa: N818
    """Ends a device's work between two batches, after another device has failed or the call was interrupted."""


class ScoringCall:
    """Hands out the chunks of a call of :meth:`~pyterrier_llmrerank.engine.scoring.Scorer.score`, and holds its scores.

    Args:
        pairs: pairs of query and passage.
        chunks: indices of pairs, chunk by chunk.
        cutoffs: the number of cutoffs.
        observer: names pairs in errors, and receives progress and usage.
        cascade: decides which pairs survive; None if all do.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        chunks: Iterator[list[int]],
        cutoffs: int,
        observer: Observer,
        cascade: Cascade | None,
    ) -> None:
        self.pairs = pairs
        self.observer = observer
        self.cascade = cascade
        #: Logits so far, ``[cutoffs, pairs]``; NaN where there is none yet.
        self.scores = np.full((cutoffs, len(pairs)), np.nan)
        #: Set when no further batch is to be started.
        self.stopped = threading.Event()
        self._chunks = chunks
        self._lock = threading.Lock()

    def next_chunk(self) -> list[int] | None:
        """Take the next chunk; None if there is none left or the call has stopped."""
        with self._lock:
            return None if self.stopped.is_set() else next(self._chunks, None)

    def label(self, pair: int) -> str:
        """Name a pair, given by its index, in error messages."""
        return self.observer.label(pair)

    def progress(self, pairs: int) -> None:
        """Report a number of pairs as done, one thread at a time."""
        with self._lock:
            self.observer.progress(pairs)

    def error(self, message: str) -> ScoringError:
        """Return an error that carries the scores so far."""
        return ScoringError(message, self.scores)
