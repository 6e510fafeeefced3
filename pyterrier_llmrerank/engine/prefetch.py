"""Prepare the next item in a thread while the caller works on the current one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from .usage import Stopwatch

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], waiting: Stopwatch | None = None) -> Iterator[Item]:
    """Iterate over items; a thread prepares the next one while the caller works on the current one.

    An error in preparing an item is raised after the items before it.

    Args:
        items: prepared one at a time, the first in the calling thread.
        waiting: measures the time for which the caller waits.
    """
    iterator, waiting, end = iter(items), waiting or Stopwatch(), object()
    thread = ThreadPoolExecutor(1)
    try:
        with waiting:
            item = next(iterator, end)
        while item is not end:
            upcoming = thread.submit(next, iterator, end)
            yield cast(Item, item)
            with waiting:
                item = upcoming.result()
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
