"""Collect the scores of batches while their device goes on with later ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ScoringError
from .call import ScoringCall


class PendingBatch(NamedTuple):
    """Holds a batch whose scores the device may still be computing.

    Args:
        pairs: their indices among all pairs.
        cutoffs: rows of the score matrix that the batch fills.
        result: waits for the scores and returns them, ``[cutoffs, pairs]``.
    """

    pairs: list[int]
    cutoffs: slice
    result: Callable[[], np.ndarray]


class PendingResults:
    """Holds the batches of one device that are not collected yet, and writes their scores into the call.

    Args:
        call: the call.
        dtype: the dtype of the weights, for advice in errors.
    """

    def __init__(self, call: ScoringCall, dtype: torch.dtype) -> None:
        self._call = call
        self._dtype = dtype
        self._batches: deque[PendingBatch] = deque()

    def add(self, pairs: list[int], cutoffs: slice, logits: Tensor) -> None:
        """Add a batch.

        Args:
            pairs: indices of its pairs.
            cutoffs: rows of the score matrix that it fills.
            logits: its scores, ``[cutoffs, pairs]``; they may not be computed yet.
        """
        self._batches.append(PendingBatch(pairs, cutoffs, to_host(logits)))

    def collect(self, leave: int = 0) -> None:
        """Wait for scores, oldest first, until only ``leave`` batches are pending. With 1, the device always has work.

        Raises:
            ScoringError: a score is not finite; the scores of all other batches are collected first.
        """
        call = self._call
        while len(self._batches) > leave:
            batch = self._batches[0]
            logits = batch.result()
            self._batches.popleft()  # after the result, which is asked for again if it fails
            finite = np.isfinite(logits).all(axis=0)
            call.scores[batch.cutoffs, np.array(batch.pairs)[finite]] = logits[:, finite]
            if not finite.all():
                with suppress(ScoringError):
                    self.collect()
                pair, dtype = batch.pairs[int(finite.argmin())], self._dtype
                advice = "the checkpoint may be damaged." if dtype == torch.float32 else "try dtype='float32'."
                raise call.error(f"the score of {call.label(pair)} is not finite in {dtype}; {advice}")
            if batch.cutoffs.stop == len(call.scores):
                call.progress(len(batch.pairs))


def to_host(computed: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy a tensor to the host.

    Returns:
        A function that waits for this copy, not for later work of a GPU, and returns the array.
    """
    if computed.device.type != "cuda":
        return lambda: computed.cpu().numpy()
    copy = computed.to("cpu", non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # leaves the core to the tokeniser
    copied.record()

    def result() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return result
