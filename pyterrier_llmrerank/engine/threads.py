"""Choose the number of threads for training and large calls on a CPU."""

from __future__ import annotations

import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch.nn.functional import silu

logger = logging.getLogger(__name__)

#: Measurements of each number of threads. The numbers take turns, so that other load affects all alike.
TURNS = 5

#: Seconds for which a measurement holds.
HOLDS = 600

#: torch's own number of threads and the number in use, once for each block that runs now.
_blocks: list[tuple[int, int]] = []
_lock = threading.Lock()

#: Tokens, and the widths of the states before and after the product, in a measurement.
SIZES = 512, 576, 1536


@contextmanager
def fastest_threads(device: torch.device, seconds: Callable[[int], float] | None = None) -> Iterator[None]:
    """Run a block on the fastest number of threads. More may be slower: threads on one core wait for each other.

    Numbers from one to torch's own are tried, in powers of two, at the beginning of a block. Other programs come and
    go, so the result holds for ten minutes at most; later blocks measure again. A block that begins while another runs
    uses the same number. ``OMP_NUM_THREADS`` in the environment, or ``torch.set_num_threads(1)``, settle the number
    without a measurement. torch's number is restored after the block.

    Args:
        device: where the block computes; nothing is done for devices other than the CPU.
        seconds: measures some work on a number of threads; None for a piece of a decoder layer.
    """
    if device.type != "cpu" or os.environ.get("OMP_NUM_THREADS"):
        yield
        return
    with _lock:
        if _blocks:  # a measurement and running blocks would disturb each other
            before, chosen = _blocks[0]
        else:
            before = chosen = torch.get_num_threads()
            if before > 1:
                chosen = _fastest(before, seconds or seconds_of_layer, int(time.monotonic() // HOLDS))
        _blocks.append((before, chosen))
        torch.set_num_threads(chosen)
    try:
        yield
    finally:
        with _lock:
            _blocks.pop()
            torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _fastest(most: int, seconds: Callable[[int], float], period: int) -> int:
    """Measure numbers of threads up to the most, once in a period, and return the fastest."""
    tried = sorted({*(2**power for power in range(most.bit_length())), most})
    medians = median_seconds(tried, seconds)
    chosen = min(medians, key=lambda threads: medians[threads])
    shown = ", ".join(f"{threads}: {1000 * median:.1f} ms" for threads, median in medians.items())
    logger.info("running on %d of %d threads (%s); OMP_NUM_THREADS sets another number", chosen, most, shown)
    return chosen


def median_seconds(tried: list[int], seconds: Callable[[int], float]) -> dict[int, float]:
    """Return the median seconds of each number of threads, ascending; the first turn warms up and does not count."""
    turns = [{threads: seconds(threads) for threads in tried} for _ in range(TURNS + 1)]
    return {threads: statistics.median(turn[threads] for turn in turns[1:]) for threads in tried}


def seconds_of_layer(threads: int) -> float:
    """Measure the products and element-wise work of a small MLP on a number of threads."""
    torch.set_num_threads(threads)
    tokens, width, inner = SIZES
    states, gate, down = torch.ones(tokens, width), torch.ones(width, inner), torch.ones(inner, width)
    begun = time.perf_counter()
    scaled = states * states.square().mean(-1, keepdim=True).rsqrt()
    states.add_(silu(scaled @ gate) @ down)
    return time.perf_counter() - begun
