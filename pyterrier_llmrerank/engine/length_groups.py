"""Compute attention on a CPU, in groups of pairs of similar length.

A batch that is laid out at the length of its longest pair computes attention over much padding. Here each pair is laid
out at its own length, rounded up to 16. Pairs of one rounded length form a group, which is computed together::

    row       A A b b b b b S c c S B d d S
    groups    A A b b b b b S        A A c c S . . .        one group of two pairs: the lengths 8 and 5 round up to 8
              A A c c S . . .        B d d S . . . .        (a picture with 8 in place of 16)

So the shape of each pair's computation depends on its own length, never on its batch. That matters in bf16, where
layers amplify a different rounding until it reorders candidates.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attention_kernels import causal_mask
from .devices import has_bf16
from .packing import Packing

#: Lengths are rounded up to a multiple of this.
STEP = 16

#: Queries in a block. Later keys are left out of a block, and the block's weights stay in the cache.
BLOCK = 32

#: Queries in a block for products in bf16.
PRODUCT_BLOCK = 128

#: The narrowest heads for products in bf16. For few narrow heads, torch uses another kernel, which rounds differently.
NARROWEST = 32


class LengthGroup(NamedTuple):
    """Holds the pairs of one rounded length.

    Args:
        length: the rounded length.
        places: index in the row of each token of each pair, ``[pairs, length]``; any index after a pair's end.
        queries: the same for queries. A prefix that is not in the row has none, so any other token takes its place.
        real_keys: a mask of the keys that are real, ``[pairs, length]``; None if causality hides all others.
    """

    length: int
    places: Tensor
    queries: Tensor
    real_keys: Tensor | None


class LengthGroups:
    """Divides a packed row into groups, and computes attention in them.

    Args:
        packing: the tokens of the row that form each pair.
    """

    def __init__(self, packing: Packing) -> None:
        tokens = len(packing.pair_of_token)
        rounded = -(-packing.lengths // STEP) * STEP
        places = np.pad(packing.places, ((0, 0), (0, int(rounded.max()) - packing.longest)))
        queries = np.where(places < tokens, places, 0)  # others are keys of a prefix computed earlier
        self._groups: list[LengthGroup] = []
        start, first = 0, np.empty(len(packing), int)
        for length in np.unique(rounded).tolist():
            members = np.flatnonzero(rounded == length)
            real = None
            if packing.padding[members].any():
                real = torch.from_numpy(np.arange(length) < packing.real[members, None])
            keys, asked = (torch.from_numpy(np.ascontiguousarray(of[members, :length])) for of in (places, queries))
            self._groups.append(LengthGroup(length, keys, asked, real))
            first[members] = start + length * np.arange(len(members))
            start += length * len(members)
        pair = packing.pair_of_token
        #: For each token of the row: the start of its pair when all groups follow each other, the rounded length of its
        #: pair, and its position in the pair.
        self._first, self._length, self._position = (
            torch.from_numpy(of) for of in (first[pair], rounded[pair], packing.positions)
        )
        self._sources: Tensor | None = None
        self._rows: list[tuple[Tensor, Tensor]] = []

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        large_logits: bool = False,
    ) -> Tensor:
        """Compute causal attention within each pair.

        Args:
            query: queries of the row, ``[1, heads, tokens, width]``.
            key: keys of the row and of a prefix computed earlier, ``[1, key heads, tokens, width]``.
            value: of the shape of ``key``.
            scaling: factor of the logits.
            window: the most keys that a query sees; None for all before it.
            large_logits: whether logits may be large, as with biases of queries and keys. Then no products are used,
                since they round logits to bf16 before the softmax.

        Returns:
            The output, ``[1, tokens, heads, width]``.
        """
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        wide = query.shape[2] >= NARROWEST
        by_products = query.dtype == torch.bfloat16 and wide and not large_logits and _has_products()
        kernel = _products if by_products else _sdpa
        if self._sources is None:  # the same in all layers
            self._sources = self._find_sources(query.shape[1])
            heads = query.shape[1], key.shape[1]
            self._rows = [
                (rows_by_head(group.queries, heads[0]), rows_by_head(group.places, heads[1])) for group in self._groups
            ]
        outputs = []
        for group, (asked, kept) in zip(self._groups, self._rows, strict=True):
            queries = gather(query, asked, group.length)
            keys, values = (gather(states, kept, group.length) for states in (key, value))
            seen = window if window is None or window < group.length else None
            outputs.append(kernel(group, queries, keys, values, scaling, seen))
        flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return flat.index_select(0, self._sources).view(1, *query.shape)

    def _find_sources(self, heads: int) -> Tensor:
        """Return the index of each head of each token in the groups' outputs, ``[tokens * heads]``."""
        first, length = self._first[:, None] * heads, self._length[:, None]
        return (first + torch.arange(heads) * length + self._position[:, None]).flatten()


def rows_by_head(places: Tensor, heads: int) -> Tensor:
    """Return the index of each head of each token, ``[pairs * heads * length]``, for places ``[pairs, length]``."""
    return (places[:, None] * heads + torch.arange(heads)[None, :, None]).flatten()


def gather(states: Tensor, rows: Tensor, length: int) -> Tensor:
    """Gather ``[tokens, heads, width]`` to ``[pairs * heads, length, width]`` in one pass."""
    width = states.shape[-1]
    return states.reshape(-1, width).index_select(0, rows).view(-1, length, width)


def _products(
    group: LengthGroup, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Compute a group by two products for each block, with all query heads of a key head in one matrix.

    Args:
        group: the pairs.
        queries: ``[pairs * heads, length, width]``.
        keys: ``[pairs * key heads, length, width]``.
        values: of the shape of ``keys``.
        scaling: factor of the logits.
        window: the most keys that a query sees; None for all before it.

    Returns:
        The output by pairs, heads and positions, ``[pairs * heads * length, width]``.
    """
    heads, width = len(keys) // len(group.places), keys.shape[-1]
    repeats = len(queries) // len(keys)
    queries = queries.view(len(keys), -1, group.length, width)
    outputs = []
    for start in range(0, group.length, PRODUCT_BLOCK):
        end = min(start + PRODUCT_BLOCK, group.length)
        asked = queries[:, :, start:end].flatten(1, 2)
        bias = _bias(group, start, end, window, repeats, heads)
        logits = torch.baddbmm(bias, asked, keys[:, :end].mT, alpha=scaling)
        mixed = torch.bmm(logits.softmax(-1), values[:, :end])  # in fp32 inside, of logits rounded to bf16
        outputs.append(mixed.view(len(keys), -1, end - start, width))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.view(-1, width)


def _bias(group: LengthGroup, start: int, end: int, window: int | None, repeats: int, heads: int) -> Tensor:
    """Return zeros for the keys that the queries of a block see, and a low number for all others."""
    if group.real_keys is None:
        return _causal_bias(start, end, window, repeats)
    hidden = ~causal_mask(torch.arange(start, end)[None], end, group.real_keys[:, :end], window)
    bias = torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill_(hidden, _HIDDEN)
    return bias.repeat(1, heads, repeats, 1).flatten(0, 1)


@lru_cache(maxsize=64)  # all layers of a batch need the same
def _causal_bias(start: int, end: int, window: int | None, repeats: int) -> Tensor:
    hidden = ~causal_mask(torch.arange(start, end)[None], end, None, window)
    return torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill_(hidden, _HIDDEN)[0].repeat(1, repeats, 1)


#: Finite, so that padding outside of all windows gives no NaN.
_HIDDEN = torch.finfo(torch.bfloat16).min / 2


def _sdpa(
    group: LengthGroup, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Compute a group by torch's attention, block by block; arguments and output as for :func:`_products`."""
    shape = len(group.places), -1, group.length, queries.shape[-1]
    queries, keys, values = (states.view(shape) for states in (queries, keys, values))
    output = torch.empty_like(queries)
    for start in range(0, group.length, BLOCK):
        end = min(start + BLOCK, group.length)
        real = None if group.real_keys is None else group.real_keys[:, :end]
        output[:, :, start:end] = scaled_dot_product_attention(
            queries[:, :, start:end],
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=causal_mask(torch.arange(start, end)[None], end, real, window),
            scale=scaling,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    return output.view(-1, queries.shape[-1])


@cache
def _has_products() -> bool:
    """Return whether this CPU computes products in bf16 natively."""
    return has_bf16(torch.device("cpu"))
