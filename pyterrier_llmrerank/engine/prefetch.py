"""Prepare the next item in a thread while the caller works on the current one; keep token ids until their use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, cast

from .usage import Stopwatch

if TYPE_CHECKING:
    from .inputs import Ids

Item = TypeVar("Item")

#: Returns the token ids of ``(query, passage)`` pairs.
Encode = Callable[[Sequence[tuple[str, str]]], "list[Ids]"]


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


class PreparedIds:
    """Keeps token ids of pairs until they are asked for; one thread may add some while another takes some.

    Args:
        settings: the values that token ids depend on, besides their pair.
    """

    def __init__(self, settings: object) -> None:
        self.settings = settings
        self._ids: dict[tuple[str, str], Ids] = {}

    def add(self, pairs: Sequence[tuple[str, str]], ids: Sequence[Ids]) -> None:
        """Keep the ids of pairs."""
        self._ids.update(zip(pairs, ids, strict=True))

    def take(self, encode: Encode, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """Return the ids of distinct pairs and forget them; encode the pairs that have none."""
        found = {pair: ids for pair in pairs if (ids := self._ids.pop(pair, None)) is not None}
        if missing := [pair for pair in pairs if pair not in found]:
            found.update(zip(missing, encode(missing), strict=True))
        return [found[pair] for pair in pairs]
