"""Pack many pairs into one row of tokens, without padding and with each query's prefix only once.

Three pairs, the first two of one query::

    row        A A A b b b b S c c S B B d d S      A, B: prefixes; b, c, d: bodies; S: the suffix
    pair       0 0 0 0 0 0 0 0 1 1 1 2 2 2 2 2      pair_of_token
    position   0 1 2 3 4 5 6 7 3 4 5 0 1 2 3 4      positions: pair 1 continues the prefix of its owner, pair 0

    pair 0     row[0:8]                             places: where to read each pair
    pair 1     row[0:3] + row[8:11]
    pair 2     row[11:16]

Sharing a prefix is exact, because a causal decoder's prefix does not see the body after it. (With dropout, all pairs of
a query get one draw for it.) Norms, projections and heads work on each token alone, so they run on the row as it is.
Attention alone needs to know which tokens form a pair (:mod:`~pyterrier_llmrerank.engine.attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .inputs import Ids

Indices = NDArray[np.int64]


class Packing:
    """Tells the places of the tokens of a batch's pairs in the packed row.

    The row holds one pair after another. A prefix is stored with its owner, the first pair that has it, and not at all
    if an earlier batch computed it.

    Args:
        prefix, body, suffix: tokens in the parts of each pair, ``[pairs]``.
        owner: for each pair, the first pair with the same prefix, ``[pairs]``; -1 if its prefix is not in the row.
        padding: tokens after the suffix that others do not see as keys, ``[pairs]``; 0 unless the released code is
            reproduced.
    """

    def __init__(self, prefix: Indices, body: Indices, suffix: Indices, owner: Indices, padding: Indices) -> None:
        self.prefix = prefix
        self.body = body
        self.suffix = suffix
        self.owner = owner
        self.padding = padding
        #: Tokens of each pair without padding, ``[pairs]``.
        self.real: Indices = prefix + body + suffix
        #: Tokens of each pair with its padding, ``[pairs]``.
        self.lengths: Indices = self.real + padding

    def __len__(self) -> int:
        return len(self.prefix)

    @property
    def longest(self) -> int:
        """Tokens of the longest pair, with padding."""
        return int(self.lengths.max())

    @cached_property
    def owns(self) -> NDArray[np.bool_]:
        """Whether a pair's prefix is stored with it, ``[pairs]``."""
        return np.equal(self.owner, np.arange(len(self)))

    @cached_property
    def _sizes(self) -> Indices:
        """Tokens that each pair adds to the row, ``[pairs]``."""
        return np.where(self.owns, self.lengths, self.lengths - self.prefix)

    @property
    def added(self) -> Indices:
        """Tokens that each pair adds to the row, the last ones of the pair, ``[pairs]``."""
        return self._sizes

    @cached_property
    def _starts(self) -> Indices:
        """Index in the row of the first token that each pair adds, ``[pairs]``."""
        return np.cumsum(self._sizes) - self._sizes

    @cached_property
    def pair_of_token(self) -> Indices:
        """The pair of each token of the row, ``[tokens]``; for a prefix its owner."""
        return np.repeat(np.arange(len(self)), self._sizes)

    @cached_property
    def positions(self) -> Indices:
        """The position of each token of the row in its pair, ``[tokens]``."""
        added = np.arange(len(self.pair_of_token)) - self._starts[self.pair_of_token]
        return added + np.where(self.owns, 0, self.prefix)[self.pair_of_token]

    @cached_property
    def places(self) -> Indices:
        """Index in the row of each token of each pair, ``[pairs, longest]``; 0 after a pair's end.

        A prefix that is not in the row has the indices after its last token.
        """
        position = np.arange(self.longest)[None]
        shared = np.where(self.owner < 0, len(self.pair_of_token), self._starts[self.owner])[:, None] + position
        added = self._starts[:, None] + position - np.where(self.owns, 0, self.prefix)[:, None]
        place = np.where(position < self.prefix[:, None], shared, added)
        return np.where(position < self.lengths[:, None], place, 0)

    @property
    def last_prefix(self) -> slice:
        """The place of the last pair's prefix in the row; only valid if the prefix is there."""
        start = int(self._starts[self.owner[-1]])
        return slice(start, start + int(self.prefix[-1]))

    @cached_property
    def last(self) -> Indices:
        """Index in the row of each pair's last real token, ``[pairs]``."""
        return self.places[np.arange(len(self)), self.real - 1]

    def pooled(self, ratio: int) -> Packing:
        """Return the packing after bodies are pooled in groups of ``ratio`` and padding is dropped."""
        return Packing(self.prefix, -(-self.body // ratio), self.suffix, self.owner, np.zeros_like(self.padding))


class PackedPairs(Packing):
    """Packs pairs and their ids.

    Args:
        pairs: at least one.
        pad_id: pad each pair to a multiple of 8 tokens with this id, as the released code does; None for no padding.
        cached_prefix: ids of a prefix to leave out of the row, because an earlier batch computed it.

    Raises:
        ValueError: a pair has no tokens.

    >>> packed = PackedPairs([Ids([1, 2], [30, 31], [9]), Ids([1, 2], [40], [9])])
    >>> packed.ids.tolist()
    [1, 2, 30, 31, 9, 40, 9]
    >>> packed.positions.tolist()
    [0, 1, 2, 3, 4, 2, 3]
    >>> packed.places.tolist()
    [[0, 1, 2, 3, 4], [0, 1, 5, 6, 0]]
    """

    def __init__(
        self, pairs: Sequence[Ids], pad_id: int | None = None, cached_prefix: Sequence[int] | None = None
    ) -> None:
        prefix, body, suffix = (np.array([len(pair[:3][part]) for pair in pairs]) for part in range(3))
        padding = np.zeros_like(prefix) if pad_id is None else -(prefix + body + suffix) % 8
        super().__init__(prefix, body, suffix, owners(pairs, cached_prefix), padding)
        if not self.real.all():
            raise ValueError("a pair has no tokens, so there is nothing to score.")
        ids: list[int] = []
        for pair, owns, pads in zip(pairs, self.owns, padding, strict=True):
            ids += (pair.prefix if owns else []) + pair.body + pair.suffix + [pad_id or 0] * int(pads)
        #: Token ids of the row, ``[tokens]``.
        self.ids: Indices = np.array(ids, dtype=np.int64)

    def check_ids(self, vocabulary: int) -> None:
        """Check that all ids are rows of an embedding; an id beyond its end would break the GPU for the whole process.

        Raises:
            ValueError: an id is not below ``vocabulary``.
        """
        if (largest := int(self.ids.max())) >= vocabulary:
            raise ValueError(f"a pair has token {largest}, but the model knows {vocabulary} tokens.")


@dataclass(frozen=True)
class Row:
    """Holds a packed row on its way through the decoder.

    Args:
        packing: the places of each pair's tokens.
        states: hidden states, ``[tokens, width]``. Once layers have run, a cached prefix's states follow, so that
            all of :attr:`Packing.places` are filled.
        depth: how many layers the row has been through.
    """

    packing: Packing
    states: Tensor
    depth: int


def regrouped(
    members: Sequence[tuple[Row, int]], pairs: Sequence[Ids], cached_prefix: Sequence[int] | None = None
) -> Row:
    """Gather pairs out of several rows into one row.

    Args:
        members: for each pair, the row that holds it and its number there; all rows have the same depth.
        pairs: their ids; equal prefixes are stored once.
        cached_prefix: as in :class:`PackedPairs`.
    """
    rows = {id(row): row for row, _ in members}
    offsets = dict(zip(rows, np.cumsum([0, *(len(row.states) for row in rows.values())]).tolist(), strict=False))
    prefix, body, suffix, padding = (
        np.array([getattr(row.packing, part)[number] for row, number in members])
        for part in ("prefix", "body", "suffix", "padding")
    )
    packing = Packing(prefix, body, suffix, owners(pairs, cached_prefix), padding)
    sources = []
    for (row, number), owns in zip(members, packing.owns, strict=True):
        places = row.packing.places[number, : row.packing.lengths[number]]
        sources.append(offsets[id(row)] + (places if owns else places[row.packing.prefix[number] :]))
    states = torch.cat([row.states for row in rows.values()])
    source = on_device(np.concatenate(sources), states.device)
    return Row(packing, states.index_select(0, source), next(iter(rows.values())).depth)


def owners(pairs: Sequence[Ids], cached_prefix: Sequence[int] | None = None) -> Indices:
    """Return for each pair the first pair with the same prefix, ``[pairs]``; -1 if its prefix is the cached one.

    A pair without body and suffix is read at the end of its prefix, so its prefix is in the row even if cached.
    """
    first: dict[tuple[int, ...], int] = {}
    cached = None if cached_prefix is None else tuple(cached_prefix)
    owner = []
    for index, pair in enumerate(pairs):
        prefix = tuple(pair.prefix)
        is_cached = prefix == cached and (pair.body or pair.suffix)
        owner.append(-1 if is_cached else first.setdefault(prefix, index))
    return np.array(owner)


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy an array to a device, without waiting for work that a GPU still has queued."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # an asynchronous copy could read the memory after it is freed
