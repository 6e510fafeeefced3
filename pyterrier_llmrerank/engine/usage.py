"""Count pairs, tokens, padding and seconds of scoring, and follow a call."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Counts scored pairs, and the tokens and seconds that they took. The usages of several calls can be added.

    Measuring never makes a device wait. Seconds are summed over the threads that work. ``model_seconds`` covers
    laying out and launching batches and waiting for their results, not opening weights. Tokenisation runs in a thread
    beside it, so the two overlap and may add up to more than the time that passed.

    Args:
        pairs: distinct pairs of query and text that were scored.
        tokens: tokens that entered the model's first layer. A query's prefix counts once for all its passages (once
            per pair for models that run by their own forward). Savings of pooling and cascades are not subtracted.
        positions: positions over which attention ran in the first layer. Each pair takes as many as the longest in its
            batch. On a CPU it takes its own length, rounded up to a multiple of 16, unless ``attn_implementation`` is
            a kernel other than SDPA, or the model runs by its own forward.
        filled: positions that hold a token; a prefix counts in each of its pairs.
        tokenising_seconds: time spent on tokenisation.
        model_seconds: time spent on running the model.
        writing_seconds: time spent on writing results; added by the code that writes them.
        truncated_queries: distinct queries that were truncated, for at least one of their passages.
        truncated_passages: pairs whose passage was truncated.

    >>> used = Usage(pairs=2, tokens=90, positions=128, filled=96, tokenising_seconds=0.5, model_seconds=2.0)
    >>> print(used + Usage(writing_seconds=0.25))
    2 pairs, 90 tokens, padding 25.0%, seconds: tokenising 0.50, model 2.00, writing 0.25
    """

    pairs: int = 0
    tokens: int = 0
    positions: int = 0
    filled: int = 0
    tokenising_seconds: float = 0.0
    model_seconds: float = 0.0
    writing_seconds: float = 0.0
    truncated_queries: int = 0
    truncated_passages: int = 0

    @property
    def padding(self) -> float:
        """The share of attention's positions that hold no token, from 0 to 1; no other part of a layer sees padding.

        Rounding inside of fused kernels is not counted.
        """
        return 1 - self.filled / self.positions if self.positions else 0.0

    def __add__(self, other: Usage) -> Usage:
        names = [field.name for field in dataclasses.fields(self)]
        return Usage(*(getattr(self, name) + getattr(other, name) for name in names))

    def __str__(self) -> str:
        counts = {"queries": self.truncated_queries, "passages": self.truncated_passages}
        truncated = " and ".join(f"{count:,} {texts}" for texts, count in counts.items() if count)
        return (
            f"{self.pairs:,} pairs, {self.tokens:,} tokens, padding {self.padding:.1%}, seconds: "
            f"tokenising {self.tokenising_seconds:.2f}, model {self.model_seconds:.2f}, "
            f"writing {self.writing_seconds:.2f}" + (f"; truncated: {truncated}" if truncated else "")
        )


class Observer:
    """Follows the scoring of some pairs. Subclasses override the methods they need."""

    def label(self, pair: int) -> str:
        """Name a pair, given by its index, in error messages."""
        return f"pairs[{pair}]"

    def progress(self, pairs: int) -> None:
        """Record a number of pairs as done; one thread calls at a time."""

    def used(self, usage: Usage) -> None:
        """Record a part of the usage; any thread may call, even after scoring has failed."""


class Stopwatch:
    """Adds up the seconds spent in ``with`` blocks, which must not overlap."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begun
