"""What can go wrong after work has begun."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


class ScoringError(RuntimeError):
    """Scoring had to stop at a pair.

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
