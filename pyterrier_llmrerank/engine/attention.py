"""Compute causal attention within each pair of a packed row.

A decoder layer gets a batch as one row of tokens, and works on each token alone everywhere except in attention.
transformers' layers call :func:`attention` by its registered name. A :class:`Layout` tells it which tokens form a
pair::

    row        A A b b b S c c S         A: a query's prefix, which both pairs share; b, c: passages; S: the suffix
                     |  gather
    sequences  A A b b b S
               A A c c S .               attention runs on [pairs, heads, length, width]
                     |  scatter
    row        A A b b b S c c S
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from .attention_kernels import Kernel, causal_mask, has_flash, packed_flash
from .length_groups import LengthGroups
from .packing import Packing, on_device

#: The name under which transformers finds :func:`attention`.
ATTENTION = "pyterrier_llmrerank"


class AttentionTap:
    """Collects the attention weights that a layer's pooling needs, beside the layer's output.

    Not a dataclass: parallel wrappers would pass copies of a dataclass to the layers.
    """

    #: Log of the attention that the tapped position pays each key, summed over the heads, fp32 ``[pairs, length]``.
    log_weights: Tensor | None = None


class PrefixCache:
    """Holds a query's prefix after a batch has computed it, so that the next batch need not compute it again.

    It is small compared with a batch: keys and values of all layers take 23 kB a token for SmolLM2-135M in bf16, and
    131 kB for Mistral-7B.

    Args:
        ids: the prefix's token ids.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        #: Keys, already rotated, and values by layer index, ``[tokens, heads, width]`` each.
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        #: Hidden states after the last layer that was run, ``[tokens, width]``.
        self.states: Tensor | None = None


class Layout:
    """Maps a packed row to one sequence per pair and back, on the device.

    Not a dataclass: parallel wrappers would pass copies of a dataclass to the layers.

    Args:
        packing: the tokens of the row that form each pair.
        device: the device of the hidden states.
        in_groups: compute attention in :class:`LengthGroups`, unless ``kernel`` does; for inference on a CPU.
        kernel: computes attention if every key is real; None for SDPA, which also serves where some are masked.
        reuse_prefix: the prefix that pairs with owner -1 begin with, which is not in the row.
        save_prefix: filled with the last pair's prefix, which is in the row.
    """

    def __init__(
        self,
        packing: Packing,
        device: torch.device,
        in_groups: bool = False,
        kernel: Kernel | None = None,
        reuse_prefix: PrefixCache | None = None,
        save_prefix: PrefixCache | None = None,
    ) -> None:
        length = packing.longest
        self._packing, self._device = packing, device
        self.shape = len(packing), length
        #: Each token's position in its pair, ``[tokens]``.
        self.positions = on_device(packing.positions, device)
        #: Index of each pair's last real token in the row, ``[pairs]``.
        self.last = on_device(packing.last, device)
        #: A mask of the keys that are real, ``[pairs, length]``. None if causality hides all others anyway; then fused
        #: causal kernels can run.
        self.real_keys = None
        if packing.padding.any():
            self.real_keys = on_device(np.arange(length) < packing.real[:, None], device)
        self.kernel = kernel if self.real_keys is None else None
        self.groups = LengthGroups(packing) if in_groups and self.kernel is None else None
        #: The start of each pair among the queries and the keys of :func:`packed_flash`; None for other kernels.
        self.starts: tuple[Tensor, Tensor] | None = None
        if cast(Any, self.kernel) is packed_flash:
            ends = (np.cumsum([0, *sizes], dtype=np.int32) for sizes in (packing.added, packing.lengths))
            queries, keys = (on_device(end, device) for end in ends)
            self.starts, self.longest = (queries, keys), (int(packing.added.max()), packing.longest)
        self._reuse_prefix, self._save_prefix, self._last_prefix = reuse_prefix, save_prefix, packing.last_prefix

    # Each kernel needs some of these indices.

    @cached_property
    def _places(self) -> Tensor:
        """Index in the row of each position of each pair."""
        return on_device(self._packing.places.flatten(), self._device)

    @cached_property
    def _query_places(self) -> Tensor:
        """The same for queries: a reused prefix has none in the row, so that any other token stands in for them."""
        if self._reuse_prefix is None:
            return self._places
        in_row = np.where(self._packing.places < len(self._packing.positions), self._packing.places, 0)
        return on_device(in_row.flatten(), self._device)

    @cached_property
    def _key_places(self) -> Tensor:
        """Index in the row of the tokens of all pairs, one pair after another."""
        real = np.arange(self._packing.longest) < self._packing.lengths[:, None]
        return on_device(self._packing.places[real], self._device)

    @cached_property
    def _sources(self) -> Tensor:
        """Index of each token of the row among the positions of all pairs."""
        return on_device(self._packing.pair_of_token * self._packing.longest + self._packing.positions, self._device)

    @cached_property
    def tapped(self) -> Tensor:
        """The position in each pair that an :class:`AttentionTap` reads: its last, padding included, ``[pairs]``."""
        return on_device(self._packing.lengths - 1, self._device)

    @cached_property
    def _tapped_places(self) -> Tensor:
        """Index in the row of each pair's tapped token."""
        places = self._packing.places[np.arange(len(self._packing)), self._packing.lengths - 1]
        return on_device(places, self._device)

    def gather_queries(self, states: Tensor) -> Tensor:
        """Gather queries of the row, ``[1, heads, tokens, width]``, to ``[pairs, heads, length, width]``."""
        return self._gather(states, self._query_places)

    def gather_keys_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Gather a layer's keys and values like its queries, including a reused prefix's; fill ``save_prefix``."""
        key, value = self.with_prefix(layer, key, value)
        return self._gather(key, self._places), self._gather(value, self._places)

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """Compute attention by :func:`packed_flash`, ``[1, tokens, heads, width]``; a prefix's keys are appended."""
        assert self.starts is not None
        keys, values = (states[0].transpose(0, 1).index_select(0, self._key_places) for states in (key, value))
        query = query[0].transpose(0, 1)
        return packed_flash(query, keys, values, self.starts, self.longest, scaling, window)[None]

    def with_prefix(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a reused prefix to a layer's keys and values; fill ``save_prefix``."""
        # Token by token, as the row is: joined head by head, each gather would jump through memory.
        tokens = [states[0].transpose(0, 1) for states in (key, value)]
        if self._save_prefix is not None:
            saved_key, saved_value = (states[self._last_prefix].clone() for states in tokens)
            self._save_prefix.keys_values[layer] = saved_key, saved_value
        if self._reuse_prefix is not None:
            reused = self._reuse_prefix.keys_values[layer]
            key, value = (torch.cat(both).transpose(0, 1)[None] for both in zip(tokens, reused, strict=True))
        return key, value

    def gather_last(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Gather each pair's tapped query, ``[pairs, heads, width]``, and keys, ``[pairs, heads, length, width]``."""
        return query[0].transpose(0, 1).index_select(0, self._tapped_places), self._gather(key, self._places)

    def _gather(self, states: Tensor, places: Tensor) -> Tensor:
        states = states[0].transpose(0, 1)
        return states.index_select(0, places).view(*self.shape, *states.shape[1:]).transpose(1, 2)

    def scatter(self, states: Tensor) -> Tensor:
        """Put ``[pairs, heads, length, width]`` back into the row, ``[1, tokens, heads, width]``."""
        return states.transpose(1, 2).flatten(0, 1).index_select(0, self._sources)[None]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: Layout,
    tap: AttentionTap | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each pair, with the signature that transformers' layers expect.

    Args:
        module: the attention module of the layer.
        query: queries of the row, ``[1, heads, tokens, width]``.
        key: keys of the row; there may be fewer heads.
        value: values of the row, with the heads of ``key``.
        attention_mask: unused; ``layout`` has the masks.
        scaling: factor of the logits.
        dropout: probability of dropping a weight; 0 outside training.
        sliding_window: the most keys that a query sees, itself included; None for all before it.
        layout: the tokens that form each pair.
        tap: filled with the attention of each pair's last position.

    Returns:
        The output, ``[1, tokens, heads, width]``, and None for the weights.
    """
    layer = cast(int, module.layer_idx)
    window = sliding_window if sliding_window is not None and sliding_window < layout.shape[1] else None
    if layout.starts is not None or layout.groups is not None:  # kernels that take the row as it is
        key, value = layout.with_prefix(layer, key, value)
        if tap is not None:
            last, keys = layout.gather_last(query, key)
            tap.log_weights = _summed(single_query_logits(last, keys, layout.tapped, layout.real_keys, scaling, window))
        if layout.groups is None:
            return layout.attend_packed(query, key, value, scaling, window), None
        biased = any(getattr(getattr(module, name, None), "bias", None) is not None for name in ("q_proj", "k_proj"))
        return layout.groups.attend(query, key, value, scaling, window, large_logits=biased), None
    query = layout.gather_queries(query)
    key, value = layout.gather_keys_values(layer, key, value)
    if layout.kernel is not None:
        output = layout.kernel(query, key, value, scaling, window)
    else:
        output = _sdpa(query, key, value, layout.real_keys, scaling, window, dropout)
    if tap is not None:
        tapped = query[torch.arange(len(query), device=query.device), :, layout.tapped]
        tap.log_weights = _summed(single_query_logits(tapped, key, layout.tapped, layout.real_keys, scaling, window))
    return layout.scatter(output), None


def _summed(logits: Tensor) -> Tensor:
    """Return the log of the attention weights, summed over all heads, fp32 ``[pairs, length]``."""
    return logits.log_softmax(-1).flatten(1, 2).logsumexp(1).float()


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real_keys: Tensor | None,
    scaling: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Call torch's attention, without a mask if causality suffices."""
    length, dtype, mask = key.shape[2], query.dtype, None
    if real_keys is not None or window is not None:
        mask = causal_mask(torch.arange(length, device=key.device)[None], length, real_keys, window)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and query.device.type == "cuda" and (mask is not None or not has_flash(query.device, dtype)):
        # Without a flash kernel, grouped heads would run unfused.
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if query.device.type == "cpu":  # the bf16 kernel's gradient takes twice as long
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False):  # it would convert them back
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output.to(dtype)


def single_query_logits(
    query: Tensor, key: Tensor, position: Tensor, real_keys: Tensor | None, scaling: float, window: int | None
) -> Tensor:
    """Compute the attention logits of one query per pair.

    Args:
        query: ``[pairs, heads, width]``.
        key: ``[pairs, key heads, length, width]``.
        position: the position of each query in its pair, ``[pairs]``.
        real_keys: a mask of the keys that are real, ``[pairs, length]``; None for all.
        scaling: factor of the logits.
        window: the most keys that a query sees; None for all before it.

    Returns:
        ``[pairs, key heads, heads per key head, length]``, in fp64 on the CPU, else in fp32.
    """
    _, kv_heads, length, width = key.shape
    # The order in which kernels add depends on the batch. On the CPU, double precision hides the difference.
    precise = torch.float64 if key.device.type == "cpu" else torch.float32
    query = query.view(len(query), kv_heads, -1, width).to(precise)
    with torch.autocast(key.device.type, enabled=False):
        logits = query @ key.to(precise).transpose(2, 3) * scaling
    # Hidden keys get a finite logit, so that its gradient is finite too, and so that a group of body tokens wholly
    # outside a sliding window is pooled to its plain mean.
    return logits.masked_fill(~causal_mask(position[:, None], length, real_keys, window), -1e30)


def sliding_window_of(attention_module: Any) -> int | None:
    """Return an attention module's sliding window; Mistral's layers look for it in their configuration."""
    mistral = attention_module.config.model_type == "mistral"
    window: int | None = getattr(attention_module.config if mistral else attention_module, "sliding_window", None)
    return window


# Compiled layers call it uncompiled: lengths differ from batch to batch, and its kernels are fused already.
AttentionInterface.register(ATTENTION, torch.compiler.disable(attention))  # type: ignore[no-untyped-call]
