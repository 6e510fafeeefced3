"""Pairs into batches: alike lengths together, as many as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .errors import ScoringError

#: Tokens in a batch, padding counted, by device type, where the user sets no batch_size. On a CPU more
#: gains nothing; elsewhere these are starting points, which are halved where memory is short.
TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 8192}


def run_in_batches(
    lengths: Sequence[int],
    run: Callable[[list[int]], None],
    *,
    tokens: int | None = None,
    rows: int | None = None,
) -> int | None:
    """Call ``run`` with lists of indices until every index has been in one, halving when memory runs out.

    The longest go first, so that a batch too large shows at once, and rows of alike length stand together,
    so that little is padded. After a failure the smaller size is kept.

    Args:
        lengths: length of each row.
        run: works on the rows of the indices given; it may be called again with some of the same.
        tokens: most tokens a batch, padding counted. A row longer than that goes alone.
        rows: most rows a batch.

    Returns:
        None when all went through, else the index of a row for which there was no memory even alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    size = rows or len(order)
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        fits = size if tokens is None else max(1, min(size, tokens // longest))
        batch = order[start : start + fits]
        try:
            run(batch)
            start += len(batch)
            continue
        except ScoringError:
            raise
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block, so that the failed batch's tensors are no longer held by its traceback.
        if len(batch) == 1:
            return batch[0]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        if tokens is None:
            size = half
        else:
            tokens = half * longest
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return any(
        sign in message for sign in ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    )
