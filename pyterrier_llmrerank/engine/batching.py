"""Pairs into batches: those of a query together, alike lengths side by side, as many as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import ScoringError
from .inputs import Ids

#: Tokens in a batch, a shared prefix counted once, by device type, where the user sets no batch_size: starting points,
#: which are halved where memory is short.
TOKENS = {"cpu": 4096, "cuda": 16384, "mps": 8192}

#: Attention lays pairs out at equal length, prefixes repeated: at most so many positions for each token of the budget.
SPREAD = 4


@dataclass
class Budget:
    """How much goes into a batch; made smaller, once and for all that follows, where memory is short.

    Args:
        tokens: most tokens, a shared prefix counted once; None for any number. A pair longer than that goes alone.
        pairs: most pairs; None for any number.
    """

    tokens: int | None = None
    pairs: int | None = None

    def __post_init__(self) -> None:
        self._positions = None if self.tokens is None else SPREAD * self.tokens

    @classmethod
    def of_device(cls, device: torch.device) -> Budget:
        """The budget to start with on a device."""
        return cls(TOKENS.get(device.type, TOKENS["cpu"]))

    def allows(self, count: int, size: int, longest: int) -> bool:
        """Whether so many pairs of ``size`` tokens together, the longest of so many, fit."""
        return (
            (self.pairs is None or count <= self.pairs)
            and (self.tokens is None or size <= self.tokens)
            and (self._positions is None or count * longest <= self._positions)
        )

    def shrink_to(self, pairs: Sequence[Ids]) -> None:
        """Allow no more than these."""
        if self.tokens is None:
            self.pairs = len(pairs)
        else:
            self.tokens = max(1, packed_size(pairs))
            self._positions = len(pairs) * max(pair.length for pair in pairs)


def run_in_batches(pairs: Sequence[Ids], run: Callable[[list[int]], None], budget: Budget) -> int | None:
    """Call ``run`` with lists of indices until every index has been in one, halving when memory runs out.

    Pairs with one prefix stand together, so that it is computed once for all; among them, and among prefixes, the
    longest go first, so that a batch too large shows at once and neighbours are of alike length.

    Args:
        pairs: what is to be run.
        run: works on the pairs of the indices given; it may be called again with some of the same.
        budget: of a batch; smaller afterwards, where memory was short.

    Returns:
        None when all went through, else the index of a pair for which there was no memory even alone.
    """
    order = _order(pairs)
    start = 0
    while start < len(order):
        batch = _batch(pairs, order, start, budget)
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
        budget.shrink_to([pairs[index] for index in batch[: (len(batch) + 1) // 2]])
    return None


def _order(pairs: Sequence[Ids]) -> list[int]:
    """Indices by prefix, and by length from the longest, of prefixes by their longest pair."""
    prefixes: dict[tuple[int, ...], int] = {}
    prefix = [prefixes.setdefault(tuple(pair.prefix), len(prefixes)) for pair in pairs]
    longest = [0] * len(prefixes)
    for number, pair in zip(prefix, pairs, strict=True):
        longest[number] = max(longest[number], pair.length)
    return sorted(range(len(pairs)), key=lambda i: (-longest[prefix[i]], prefix[i], -pairs[i].length, i))


def _batch(pairs: Sequence[Ids], order: list[int], start: int, budget: Budget) -> list[int]:
    """The next pairs that go together: at least one."""
    batch = [order[start]]
    size = longest = pairs[order[start]].length
    for index in order[start + 1 :]:
        pair = pairs[index]
        size += pair.length - (len(pair.prefix) if pair.prefix == pairs[batch[-1]].prefix else 0)
        longest = max(longest, pair.length)
        if not budget.allows(len(batch) + 1, size, longest):
            break
        batch.append(index)
    return batch


def packed_size(pairs: Sequence[Ids]) -> int:
    """Tokens of a batch, a prefix that pairs share counted once."""
    prefixes = {tuple(pair.prefix) for pair in pairs}
    return sum(map(len, prefixes)) + sum(len(pair.body) + len(pair.suffix) for pair in pairs)


def query_chunks(queries: Sequence[Hashable], size: int) -> Iterator[list[int]]:
    """Indices in lists of at least ``size``, but for the last, without parting those of one query."""
    by_query: dict[Hashable, list[int]] = {}
    for index, query in enumerate(queries):
        by_query.setdefault(query, []).append(index)
    chunk: list[int] = []
    for indices in by_query.values():
        chunk += indices
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return any(
        sign in message for sign in ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    )
