"""Form batches: group pairs by query, sort them by length, and take as many as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import ScoringError
from .inputs import Ids

#: Tokens in a batch by device type, a shared prefix counted once, if the user sets no batch_size. These are starting
#: points: they are halved when memory runs out.
TOKENS = {"cpu": 4096, "cuda": 16384, "mps": 8192}

#: The width of a 7B model, whose batches of :data:`TOKENS` fit a GPU of 24 GB beside its weights.
WIDTH = 4096

#: How many times :data:`TOKENS` a narrower model may get on CUDA, where small batches leave a GPU idle.
MOST_TIMES = 4

#: The most positions of attention for each token of the budget. Attention lays out each pair with its prefix, at the
#: length of the longest. On a CPU it takes fewer positions, but there larger batches are no faster, and with long
#: queries they would take twice the memory.
SPREAD = 4


@dataclass
class Budget:
    """Limits the size of a batch. It shrinks when memory runs out, and stays small for all later batches.

    Args:
        tokens: the most tokens, a shared prefix counted once; None for any number. A longer pair is a batch of its own.
        pairs: the most pairs; None for any number.
    """

    tokens: int | None = None
    pairs: int | None = None

    def __post_init__(self) -> None:
        self._positions = None if self.tokens is None else SPREAD * self.tokens

    @classmethod
    def of_device(cls, device: torch.device, width: int = WIDTH) -> Budget:
        """Return the budget to start with on a device, for a model whose hidden states have this width."""
        tokens = TOKENS.get(device.type, TOKENS["cpu"])
        return cls(int(tokens * min(MOST_TIMES, WIDTH / width)) if device.type == "cuda" else tokens)

    def allows(self, count: int, size: int, longest: int) -> bool:
        """Return whether ``count`` pairs of ``size`` tokens together fit, the longest of ``longest`` tokens."""
        return (
            (self.pairs is None or count <= self.pairs)
            and (self.tokens is None or size <= self.tokens)
            and (self._positions is None or count * longest <= self._positions)
        )

    def shrink_to(self, pairs: Sequence[Ids]) -> None:
        """Allow no larger batches than these pairs."""
        if self.tokens is None:
            self.pairs = len(pairs)
        else:
            self.tokens = max(1, packed_size(pairs))
            self._positions = len(pairs) * max(pair.length for pair in pairs)


def run_in_batches(pairs: Sequence[Ids], run: Callable[[list[int]], None], budget: Budget) -> int | None:
    """Call ``run`` with batches of indices until each pair has been in one; halve batches when memory runs out.

    Pairs with the same prefix follow each other, so that it is computed once for all of them. Among prefixes and among
    their pairs, the longest come first: neighbours are of similar length, and a batch that is too large fails at once.

    Args:
        pairs: the pairs to run.
        run: works on the pairs of these indices. If memory runs out, it is called again with fewer of them.
        budget: limits a batch; it shrinks if memory runs out.

    Returns:
        None if all pairs ran; else the index of a pair that alone does not fit in memory.
    """
    order = _order(pairs)
    start = 0
    while start < len(order):
        batch = _next_batch(pairs, order, start, budget)
        try:
            run(batch)
            start += len(batch)
            continue
        except ScoringError:
            raise
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block: there the traceback would still hold the failed batch's tensors.
        if len(batch) == 1:
            return batch[0]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget.shrink_to([pairs[index] for index in batch[: (len(batch) + 1) // 2]])
    return None


def _order(pairs: Sequence[Ids]) -> list[int]:
    """Order indices by prefix, then by length; prefixes are in order of their longest pair."""
    prefixes: dict[tuple[int, ...], int] = {}
    prefix = [prefixes.setdefault(tuple(pair.prefix), len(prefixes)) for pair in pairs]
    longest = [0] * len(prefixes)
    for number, pair in zip(prefix, pairs, strict=True):
        longest[number] = max(longest[number], pair.length)
    return sorted(range(len(pairs)), key=lambda i: (-longest[prefix[i]], prefix[i], -pairs[i].length, i))


def _next_batch(pairs: Sequence[Ids], order: list[int], start: int, budget: Budget) -> list[int]:
    """Take as many pairs as the budget allows, at least one."""
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
    """Count the tokens of a batch, a shared prefix once."""
    prefixes = {tuple(pair.prefix) for pair in pairs}
    return sum(map(len, prefixes)) + sum(len(pair.body) + len(pair.suffix) for pair in pairs)


def query_chunks(queries: Sequence[Hashable], size: int) -> Iterator[list[int]]:
    """Yield indices in chunks of whole queries.

    Args:
        queries: the query of each index.
        size: the fewest indices in a chunk; the last may have fewer.
    """
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
    """Return whether an error means that host or device memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return any(
        sign in message for sign in ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    )
