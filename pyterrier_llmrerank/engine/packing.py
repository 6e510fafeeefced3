"""Many pairs as one row of tokens: nothing is padded, and a query's prefix stands once for all its passages.

Causality makes that exact: no prefix sees the body after it. (With dropout, a prefix has one draw for all.)
Everything that works token by token (norms, projections, heads) runs on the packed row as it is; attention alone
needs to know which tokens are a pair, and where they stand in it.
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
    """How the tokens of a batch's pairs stand in one row.

    The row holds pair after pair; the prefix stands with the first pair that has it, or, where a batch before has run
    it, in no row any more.

    Args:
        prefix, body, suffix: tokens of each pair's parts, ``[pairs]``.
        owner: for each pair the first one with the same prefix, ``[pairs]``; -1 where its prefix is not in the row.
        padding: tokens after the suffix that no other sees as a key, ``[pairs]``; the released code has some.
    """

    def __init__(self, prefix: Indices, body: Indices, suffix: Indices, owner: Indices, padding: Indices) -> None:
        self.prefix = prefix
        self.body = body
        self.suffix = suffix
        self.owner = owner
        self.padding = padding
        #: Tokens that count, of each pair, ``[pairs]``.
        self.real: Indices = prefix + body + suffix
        #: Tokens of each pair with its padding, ``[pairs]``.
        self.lengths: Indices = self.real + padding

    def __len__(self) -> int:
        return len(self.prefix)

    @property
    def longest(self) -> int:
        """Tokens of the longest pair."""
        return int(self.lengths.max())

    @cached_property
    def owns(self) -> NDArray[np.bool_]:
        """Whether a pair's prefix stands with it, ``[pairs]``."""
        return np.equal(self.owner, np.arange(len(self)))

    @cached_property
    def _sizes(self) -> Indices:
        """Tokens of each pair that stand in the row as its own."""
        return np.where(self.owns, self.lengths, self.lengths - self.prefix)

    @cached_property
    def _starts(self) -> Indices:
        """Where each pair's own tokens begin in the row."""
        return np.cumsum(self._sizes) - self._sizes

    @cached_property
    def pair_of_token(self) -> Indices:
        """The pair to which each token of the row belongs, ``[tokens]``; a prefix belongs to its owner."""
        return np.repeat(np.arange(len(self)), self._sizes)

    @cached_property
    def positions(self) -> Indices:
        """Where each token of the row stands in its pair, ``[tokens]``."""
        own = np.arange(len(self.pair_of_token)) - self._starts[self.pair_of_token]
        return own + np.where(self.owns, 0, self.prefix)[self.pair_of_token]

    @cached_property
    def places(self) -> Indices:
        """Where each token of each pair stands in the row, ``[pairs, longest]``; 0 after a pair's end.

        The tokens of a prefix that is not in the row are counted on after the row's last.
        """
        position = np.arange(self.longest)[None]
        shared = np.where(self.owner < 0, len(self.pair_of_token), self._starts[self.owner])[:, None] + position
        own = self._starts[:, None] + position - np.where(self.owns, 0, self.prefix)[:, None]
        place = np.where(position < self.prefix[:, None], shared, own)
        return np.where(position < self.lengths[:, None], place, 0)

    @property
    def last_prefix(self) -> slice:
        """Where the last pair's prefix stands in the row, if it does."""
        start = int(self._starts[self.owner[-1]])
        return slice(start, start + int(self.prefix[-1]))

    @cached_property
    def last(self) -> Indices:
        """Where each pair's last real token stands in the row, ``[pairs]``."""
        return self.places[np.arange(len(self)), self.real - 1]

    def pooled(self, ratio: int) -> Packing:
        """The packing after bodies were pooled in groups of ``ratio`` and padding was dropped."""
        return Packing(self.prefix, -(-self.body // ratio), self.suffix, self.owner, np.zeros_like(self.padding))


class PackedPairs(Packing):
    """Pairs packed, with their ids.

    Args:
        pairs: at least one.
        pad_id: fill each pair up to a multiple of 8 with this id, as the released code does; None for no padding.
        known: a prefix that a batch before has run; None for none.

    Raises:
        ValueError: a pair has no token.
    """

    def __init__(self, pairs: Sequence[Ids], pad_id: int | None = None, known: Sequence[int] | None = None) -> None:
        prefix, body, suffix = (np.array([len(pair[:3][part]) for pair in pairs]) for part in range(3))
        padding = np.zeros_like(prefix) if pad_id is None else -(prefix + body + suffix) % 8
        super().__init__(prefix, body, suffix, owners(pairs, known), padding)
        if not self.real.all():
            raise ValueError("the tokenizer makes no token of a pair, so that there is nothing to score.")
        ids: list[int] = []
        for pair, owns, pads in zip(pairs, self.owns, padding, strict=True):
            ids += (pair.prefix if owns else []) + pair.body + pair.suffix + [pad_id or 0] * int(pads)
        #: Token ids of the row, ``[tokens]``.
        self.ids: Indices = np.array(ids, dtype=np.int64)

    def ids_below(self, rows: int) -> Indices:
        """The ids, checked against an embedding of so many rows: past its end a device fails beyond repair.

        Raises:
            ValueError: one is not among them.
        """
        if (largest := int(self.ids.max())) >= rows:
            raise ValueError(f"the tokenizer makes token {largest}, but the model knows {rows} tokens.")
        return self.ids


@dataclass(frozen=True)
class Row:
    """Pairs on their way through the layers of a decoder.

    Args:
        packing: how they stand in the row.
        states: of their tokens, ``[tokens, width]``. Where a row has been through a walk, those of a prefix that is
            not in it follow, so that all its places are filled.
        depth: layers they have been through.
    """

    packing: Packing
    states: Tensor
    depth: int


def regrouped(members: Sequence[tuple[Row, int]], pairs: Sequence[Ids], known: Sequence[int] | None = None) -> Row:
    """Pairs out of several rows of one depth as a row of their own.

    Args:
        members: the row of each pair, and its number there.
        pairs: their ids, which say whose prefix is the same.
        known: as :class:`PackedPairs`.
    """
    rows = {id(row): row for row, _ in members}
    offsets = dict(zip(rows, np.cumsum([0, *(len(row.states) for row in rows.values())]).tolist(), strict=False))
    prefix, body, suffix, padding = (
        np.array([getattr(row.packing, part)[number] for row, number in members])
        for part in ("prefix", "body", "suffix", "padding")
    )
    packing = Packing(prefix, body, suffix, owners(pairs, known), padding)
    sources = []
    for (row, number), owns in zip(members, packing.owns, strict=True):
        places = row.packing.places[number, : row.packing.lengths[number]]
        sources.append(offsets[id(row)] + (places if owns else places[row.packing.prefix[number] :]))
    states = torch.cat([row.states for row in rows.values()])
    source = on_device(np.concatenate(sources), states.device)
    return Row(packing, states.index_select(0, source), next(iter(rows.values())).depth)


def owners(pairs: Sequence[Ids], known: Sequence[int] | None = None) -> Indices:
    """For each pair the first one with the same prefix, ``[pairs]``; -1 for those with the known one.

    A pair that is its prefix alone is read there, and has it in the row even so.
    """
    first: dict[tuple[int, ...], int] = {}
    apart = None if known is None else tuple(known)
    owner = []
    for index, pair in enumerate(pairs):
        prefix = tuple(pair.prefix)
        is_apart = prefix == apart and (pair.body or pair.suffix)
        owner.append(-1 if is_apart else first.setdefault(prefix, index))
    return np.array(owner)


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor there; without waiting for what a GPU is still working on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # others may read memory that is not pinned only after it was freed
