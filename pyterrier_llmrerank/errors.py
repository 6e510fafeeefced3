"""What can go wrong after work has begun, and how values that came from outside are shown in messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


class ScoringError(RuntimeError):
    """Scoring had to stop: at a pair, or because of something else that went wrong on the way.

    Where it is Ctrl-C that stops it, the KeyboardInterrupt has the same attribute.

    Args:
        message: at which pair, and why.
        scores: what was scored until then, kept as the attribute: from ``transform`` a frame with the rows that
            have a score; from ``compute_score`` an array ``[cutoffs, pairs]``, NaN where there is none.
    """

    def __init__(self, message: str, scores: np.ndarray | pd.DataFrame) -> None:
        super().__init__(message)
        self.scores: Any = scores

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle whole, so that it reaches the caller out of a worker process."""
        return type(self), (str(self), self.scores)


def short(value: object, length: int = 60) -> str:
    """A value as a message shows it: what comes from outside may be of any length."""
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def reason(error: BaseException, length: int = 300) -> str:
    """What another library says went wrong, as far as a message of ours repeats it."""
    said = f"{error}" or type(error).__name__
    return said if len(said) <= length else said[: length - 3] + "..."
