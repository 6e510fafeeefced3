"""The number of threads that training and large calls run on, on a CPU."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.nn.functional import silu

logger = logging.getLogger(__name__)

#: Measurements of each number of threads; they take turns, so that other load affects all alike.
TURNS = 5

#: Tokens, and the widths of the states before and after the product, in a measurement.
SIZES = 512, 576, 1536


@contextmanager
def fastest_threads(device: torch.device, seconds: Callable[[int], float] | None = None) -> Iterator[None]:
    """Run a block on the number of threads that is fastest; threads that share a core wait for each other.

    Numbers from one to torch's own are tried, in powers of two, once in a process. ``OMP_NUM_THREADS`` in the
    environment, or ``torch.set_num_threads(1)``, settle the number without a measurement. torch's number is restored
    after the block.

    Args:
        device: where the block computes; other devices than the CPU are left alone.
        seconds: measures some work on a number of threads; None for a piece of a decoder layer.
    """
    most = torch.get_num_threads()
    if device.type != "cpu" or most == 1 or os.environ.get("OMP_NUM_THREADS"):
        yield
        return
    try:
        torch.set_num_threads(_fastest(most, seconds or seconds_of_layer))
        yield
    finally:
        torch.set_num_threads(most)


@cache
def _fastest(most: int, seconds: Callable[[int], float]) -> int:
    """Measure numbers of threads up to the most, and return the fastest."""
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
