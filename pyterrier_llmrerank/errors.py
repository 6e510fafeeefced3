"""The package's own error, and short forms of values and of other libraries' errors for messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


class ScoringError(RuntimeError):
    """Signals that scoring has to stop, and carries the scores computed so far.

    A KeyboardInterrupt that stops scoring has the same attribute ``scores``.

    Args:
        message: the pair at which scoring stopped, and why.
        scores: the scores so far, kept as an attribute: from ``transform``, a frame of the rows that have a score;
            from ``compute_score``, an array ``[cutoffs, pairs]`` with NaN for missing scores.
    """

    def __init__(self, message: str, scores: np.ndarray | pd.DataFrame) -> None:
        super().__init__(message)
        self.scores: Any = scores

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the scores too, so that a worker process can hand them over."""
        return type(self), (str(self), self.scores)


def short(value: object, length: int = 60) -> str:
    """Return the repr of a value, shortened to fit a message."""
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def reason(error: BaseException, length: int = 300) -> str:
    """Return the text of another library's error, shortened to fit a message."""
    message = f"{error}" or type(error).__name__
    return message if len(message) <= length else message[: length - 3] + "..."
