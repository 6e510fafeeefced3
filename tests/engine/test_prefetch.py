"""The next item is prepared in a thread, errors come after the items before them, and token ids are kept until then."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from pyterrier_llmrerank.engine.inputs import Ids
from pyterrier_llmrerank.engine.prefetch import PreparedIds, prefetch


def test_the_next_item_is_prepared_meanwhile() -> None:
    prepared = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(prepared):
            event.set()
            yield number

    got = []
    for item in prefetch(items()):
        if item < 2:
            assert prepared[item + 1].wait(10)
        assert not any(event.is_set() for event in prepared[item + 2 :])  # one ahead, not more
        got.append(item)
    assert got == [0, 1, 2]
    assert list(prefetch([])) == []


def test_an_error_comes_after_the_items_before_it() -> None:
    numbers = prefetch(1 // number for number in (1, 0))
    assert next(numbers) == 1
    with pytest.raises(ZeroDivisionError):
        next(numbers)


def test_ids_are_taken_once_and_pairs_without_any_are_encoded() -> None:
    asked: list[tuple[str, str]] = []

    def encode(pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        asked.extend(pairs)
        return [Ids([], list(map(ord, passage)), []) for _, passage in pairs]

    one, two, three = pairs = [("q", "a"), ("q", "b"), ("q", "c")]
    wanted, prepared = [Ids([], [number], []) for number in (97, 98, 99)], PreparedIds(None)
    prepared.add([three, one], [wanted[2], wanted[0]])
    assert prepared.take(encode, pairs) == wanted
    assert asked == [two]
    assert prepared.take(encode, [three]) == wanted[2:]
    assert asked == [two, three]
