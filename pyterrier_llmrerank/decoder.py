"""Embedded ids through the decoder's layers to the states that the heads read.

One forward pass serves both rerankers, inference and training. It walks the layers of a transformers
model itself, because neither leaving at a chosen depth nor shortening the sequence between two layers can
be asked of the model's own ``forward``; each layer is still called as the module it is, so that adapters,
gradient checkpointing and parallel wrappers see what they expect.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from .compression import Spans, compress

#: Model types whose layers may be walked as below: token embedding, layers with rotary positions, final
#: norm, and nothing else on the way (others scale embeddings or mix kinds of positions).
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

#: Queries that :func:`attention` takes at a time where it has to keep the division of labour fixed.
BLOCK = 32

#: The name under which transformers finds :func:`attention`.
ATTENTION = "pyterrier_llmrerank"


class Decoder(Protocol):
    """A headless transformers model of one of the :data:`FAMILIES`, with :data:`ATTENTION` in its layers."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    layers: nn.ModuleList
    norm: nn.Module


@dataclass
class Tap:
    """What one layer's attention is told, and asked for, besides its output.

    Args:
        keys: which keys are real, ``[batch, length]``. None where causality alone hides the padding,
            which stands on the right: then no mask is needed and the fused causal kernels run.
        query: position in each row whose attention is wanted, ``[batch]``, or None.
        log_weights: the answer: log of that position's attention summed over the heads, fp32
            ``[batch, length]``.
    """

    keys: Tensor | None = None
    query: Tensor | None = None
    log_weights: Tensor | None = None


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
    tap: Tap,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention in the form that transformers' layers call, with one row of weights on demand.

    ``query`` is ``[batch, heads, length, width]``; ``key`` and ``value`` may have fewer heads.
    """
    length = key.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if query.device.type == "cpu" and query.dtype != torch.float32 and not module.training:
        output = _in_blocks(query, key, value, tap.keys, window, options)
    elif tap.keys is not None or window is not None:
        position = torch.arange(length, device=key.device)
        mask = _visible(position[None], length, tap.keys, window)
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    else:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    if tap.query is not None:
        tap.log_weights = _log_weights(query, key, tap.query, scaling, tap.keys, window)
    return output.transpose(1, 2).contiguous(), None


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, window: int | None, options: dict[str, Any]
) -> Tensor:
    """Attention of which each position's result does not depend on how long the batch's longest row is.

    The CPU kernel divides a sequence by its length, which changes the last bits of a result; in bf16 the
    layers above let that grow until it reorders results. Here a block of queries always meets the same number
    of keys.
    """
    length = key.shape[2]
    padding = (0, 0, 0, -length % BLOCK)
    query, key, value = (pad(states, padding) for states in (query, key, value))
    real = None if keys is None else pad(keys, padding[2:])
    blocks = []
    for start in range(0, length, BLOCK):
        end = start + BLOCK
        position = torch.arange(start, end)
        mask = _visible(position[None], end, None if real is None else real[:, :end], window)
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, :end], value[:, :, :end], attn_mask=mask, **options
            )
        )
    return torch.cat(blocks, dim=2)[:, :, :length]


def _visible(queries: Tensor, length: int, keys: Tensor | None, window: int | None) -> Tensor:
    """Which keys each query position sees: ``queries`` is ``[1 or batch, n]``, the result ``[.., 1, n, length]``."""
    distance = queries[..., None] - torch.arange(length, device=queries.device)
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    if keys is not None:
        seen = seen & keys[:, None]
    return seen[:, None]


def _log_weights(
    query: Tensor, key: Tensor, position: Tensor, scaling: float, keys: Tensor | None, window: int | None
) -> Tensor:
    """Log of the attention of one query position a row, summed over heads: fp32 ``[batch, length]``."""
    batch, heads, _, width = query.shape
    kv_heads, length = key.shape[1:3]
    # Twice the precision, where there is one, hides in which order the kernels add: see _in_blocks.
    precise = torch.float64 if query.device.type == "cpu" else torch.float32
    asked = query[torch.arange(batch, device=query.device), :, position]
    asked = asked.view(batch, kv_heads, heads // kv_heads, width).to(precise)
    logits = asked @ key.to(precise).transpose(2, 3) * scaling
    unseen = ~_visible(position[:, None], length, keys, window)
    # Finite for what is not seen: its gradient stays finite too, and a group of the body that lies wholly
    # outside a sliding window becomes its plain mean.
    per_head = logits.masked_fill(unseen, -1e30).log_softmax(-1)
    return per_head.flatten(1, 2).logsumexp(1).float()


AttentionInterface.register(ATTENTION, attention)


def decode(
    model: Decoder,
    input_ids: Tensor,
    spans: Spans,
    cutoffs: Sequence[int],
    *,
    compress_layers: Collection[int] = (),
    compress_ratio: int = 1,
    padded: Sequence[int] | None = None,
) -> Tensor:
    """Run the decoder and return the last real token's state at each cutoff.

    Args:
        model: the decoder; layers from the deepest cutoff on are not touched.
        input_ids: ``[batch, longest row]``, padded on the right with any id.
        spans: the parts of each row.
        cutoffs: how many layers to run before reading, ascending, each at least 1.
        compress_layers: layer indices (from 0) before which the bodies are pooled; index 0 and indices
            from the deepest cutoff on have no effect.
        compress_ratio: tokens pooled into one; 1 is off.
        padded: reproduce the released code for rows padded to these lengths: up to the first pooling the
            padding stands in the sequence, its keys masked, and the weights are those of its last token.

    Returns:
        States after the final norm, ``[cutoffs, batch, width]``, in the model's dtype.
    """
    device = input_ids.device
    deepest = cutoffs[-1]
    pooled_before = {i for i in compress_layers if 0 < i < deepest} if compress_ratio > 1 else set()
    rows = torch.arange(input_ids.shape[0], device=device)
    last = torch.tensor(spans.lengths, device=device) - 1
    asked, keys = last, None
    if padded is not None and pooled_before:
        asked = torch.tensor(padded, device=device) - 1
        keys = torch.arange(input_ids.shape[1], device=device) <= last[:, None]

    hidden = model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1], device=device)[None]
    rotary = model.rotary_emb(hidden, position_ids=positions)
    states = []
    for depth, layer in enumerate(islice(model.layers, deepest), start=1):
        tap = Tap(keys, asked if depth in pooled_before else None)
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, tap=tap)
        if depth in cutoffs:
            states.append(model.norm(hidden[rows, last]))
        if depth in pooled_before:
            assert tap.log_weights is not None
            hidden, spans = compress(hidden, tap.log_weights, spans, compress_ratio)
            last = asked = torch.tensor(spans.lengths, device=device) - 1
            keys = None
            positions = positions[:, : hidden.shape[1]]
            cos, sin = rotary
            rotary = cos[:, : hidden.shape[1]], sin[:, : hidden.shape[1]]
    return torch.stack(states)
