"""What scoring took: pairs, tokens, padding and seconds."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Pairs, and what it took to score them; that of several runs is their sum.

    No device is made to wait for being measured: seconds are those of the threads that work. The model's are those in
    which batches were laid out and launched, and their results waited for; opening weights is not in them. Ids are
    made in a thread beside that, so that the two overlap, and may add up to more than went by.

    Args:
        pairs: distinct pairs of query and text that got a score.
        tokens: tokens that went into the model's first layer: a query's prefix once, for all its passages.
            (Models run by their own forward: once a pair.) What pooling and cascades save deeper is not taken off.
        positions: at which attention lays pairs out side by side: in each batch pairs times the longest pair.
        filled: those of them that hold a token; a prefix stands in each of its pairs here.
        tokenising_seconds: in which ids were made.
        model_seconds: in which the model was run.
        writing_seconds: in which results were written; whoever writes adds them.
        truncated_queries: distinct queries whose end was not read, with one of their passages at least.
        truncated_passages: pairs whose passage was not read to its end.

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
        """The share of attention's positions that hold no token, from 0 to 1; the other layers see no padding.

        As a batch goes into the first layer. Where a kernel rounds lengths up, that is not counted.
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


class Stopwatch:
    """Seconds that went by within ``with`` blocks, which do not overlap."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begun
