"""Embedded ids through the decoder's layers to the states that the heads read.

One forward pass serves both rerankers, inference and training. It walks the layers of a transformers
model itself, because neither leaving at a chosen depth nor shortening the sequence between two layers can
be asked of the model's own ``forward``; each layer is still called as the module it is, so that adapters,
gradient checkpointing and parallel wrappers see what they expect (inference takes the last one apart). To the
layers, a batch is one long row of tokens (:mod:`~pyterrier_llmrerank.engine.packing`); only :func:`attention`, which
they call, knows of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from .kernels import Kernel, visible
from .packing import PackedPairs, Packing, Row, on_device
from .pooling import Pooling

#: Queries that :func:`attention` takes at a time where it has to keep the division of labour fixed.
BLOCK = 32

#: The name under which transformers finds :func:`attention`.
ATTENTION = "pyterrier_llmrerank"


class Decoder(Protocol):
    """A headless transformers model of one of the families, with :data:`ATTENTION` in its layers."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    layers: nn.ModuleList
    norm: nn.Module


class AttentionTap:
    """Taken by an attention that is to leave something besides its output.

    No dataclass: parallel wrappers hand on copies of those.
    """

    #: Log of the asked position's attention summed over the heads, fp32 ``[pairs, length]``.
    log_weights: Tensor | None = None


class KnownPrefix:
    """A query's prefix that a batch has run: what those that follow need of it.

    Small, beside a batch: two vectors of all key heads a token and layer. For SmolLM2-135M that is 23 kB a token in
    bf16, for Mistral-7B 131 kB.

    Args:
        ids: its token ids.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        #: By layer index, as attention is given them: ``[1, heads, tokens, width]``, keys rotated.
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        #: After the last layer of a walk, ``[tokens, width]``.
        self.states: Tensor | None = None


class Layout:
    """What a layer's attention is told of the packed row.

    Args:
        packing: how the pairs stand in the row.
        device: where the states are.
        multiple: pairs are laid out in a multiple of so many positions.
        kernel: what computes attention where no key is masked; None for SDPA, which does so wherever one is.
        before: the prefix that pairs begin with and that is not in the row.
        leaves: to be filled with the last pair's prefix, which is in the row.
    """

    def __init__(
        self,
        packing: Packing,
        device: torch.device,
        multiple: int = 1,
        kernel: Kernel | None = None,
        before: KnownPrefix | None = None,
        leaves: KnownPrefix | None = None,
    ) -> None:
        count, length = len(packing), -(-packing.longest // multiple) * multiple
        places = np.pad(packing.places, ((0, 0), (0, length - packing.longest)))
        self.shape = count, length
        self.positions = on_device(packing.positions, device)
        self.last = on_device(packing.last, device)
        self._places = on_device(places.flatten(), device)
        self._before, self._leaves, self._left = before, leaves, packing.last_prefix
        if before is not None:  # queries of its tokens are not asked again: any other stands in their place
            self._asking = on_device(np.where(places < len(packing.positions), places, 0).flatten(), device)
        self._back = on_device(packing.pair_of_token * length + packing.positions, device)
        #: The position in each pair whose attention a :class:`AttentionTap` takes, ``[pairs]``.
        self.asked = on_device(packing.lengths - 1, device)
        #: Which keys are real, ``[pairs, length]``; None where causality alone hides what is not: then no mask is
        #: needed, and the fused causal kernels run.
        self.keys = None
        if packing.padding.any():
            self.keys = on_device(np.arange(length) < packing.real[:, None], device)
        self.kernel = kernel if self.keys is None else None

    def queries(self, states: Tensor) -> Tensor:
        """``[1, heads, tokens, width]`` of the row to ``[pairs, heads, length, width]``."""
        return self._apart(states, self._places if self._before is None else self._asking)

    def keys_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise keys and values of a layer, with those of what is before the row; what the row leaves is kept."""
        if self._leaves is not None:
            self._leaves.keys_values[layer] = key[:, :, self._left].clone(), value[:, :, self._left].clone()
        if self._before is not None:
            known = self._before.keys_values[layer]
            key, value = torch.cat([key, known[0]], dim=2), torch.cat([value, known[1]], dim=2)
        return self._apart(key, self._places), self._apart(value, self._places)

    def _apart(self, states: Tensor, places: Tensor) -> Tensor:
        states = states[0].transpose(0, 1)
        return states.index_select(0, places).view(*self.shape, *states.shape[1:]).transpose(1, 2)

    def together(self, states: Tensor) -> Tensor:
        """``[pairs, heads, length, width]`` to ``[1, tokens, heads, width]`` of the row."""
        return states.transpose(1, 2).flatten(0, 1).index_select(0, self._back)[None]


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
    """Causal attention within each pair, in the form that transformers' layers call.

    ``query`` is ``[1, heads, tokens, width]``; ``key`` and ``value`` may have fewer heads.
    """
    query = layout.queries(query)
    key, value = layout.keys_values(cast(int, module.layer_idx), key, value)
    length = key.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    states = query, key, value
    if layout.kernel is not None:
        output = layout.kernel(*states, scaling, window)
    elif _in_blocks(query.device, query.dtype, module.training):
        output = _by_blocks(*states, layout.keys, window, options)
    else:
        if query.device.type == "cpu":
            states = query.float(), key.float(), value.float()  # the kernel's gradient in bf16 takes twice as long
        if layout.keys is not None or window is not None:
            position = torch.arange(length, device=key.device)
            options["attn_mask"] = visible(position[None], length, layout.keys, window)
        with torch.autocast("cpu", enabled=False):  # it would undo that
            output = scaled_dot_product_attention(*states, is_causal="attn_mask" not in options, **options)
        output = output.to(query.dtype)
    if tap is not None:
        row = query[torch.arange(len(query), device=query.device), :, layout.asked]
        per_head = _row_logits(row, key, layout.asked, scaling, layout.keys, window).log_softmax(-1)
        tap.log_weights = per_head.flatten(1, 2).logsumexp(1).float()
    return layout.together(output), None


def _in_blocks(device: torch.device, dtype: torch.dtype, training: bool) -> bool:
    """Whether :func:`attention` has to keep the division of labour fixed.

    The CPU kernel divides a sequence by its length, which changes the last bits of a result; in bf16 the
    layers above let that grow until it reorders results.
    """
    return device.type == "cpu" and dtype != torch.float32 and not training


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, window: int | None, options: dict[str, Any]
) -> Tensor:
    """Attention in which a block of queries meets the same number of keys however long the batch's longest pair is."""
    blocks = []
    for start in range(0, key.shape[2], BLOCK):
        end = start + BLOCK
        position = torch.arange(start, end)
        mask = visible(position[None], end, None if keys is None else keys[:, :end], window)
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, :end], value[:, :, :end], attn_mask=mask, **options
            )
        )
    return torch.cat(blocks, dim=2)


def _row_logits(
    row: Tensor, key: Tensor, position: Tensor, scaling: float, keys: Tensor | None, window: int | None
) -> Tensor:
    """Logits of one query a pair, ``[pairs, heads, width]``: ``[pairs, key heads, heads that share them, length]``."""
    _, kv_heads, length, width = key.shape
    # Twice the precision, where there is one, hides in which order the kernels add: see _in_blocks.
    precise = torch.float64 if key.device.type == "cpu" else torch.float32
    row = row.view(len(row), kv_heads, -1, width).to(precise)
    with torch.autocast(key.device.type, enabled=False):
        logits = row @ key.to(precise).transpose(2, 3) * scaling
    # Finite for what is not seen: its gradient stays finite too, and a group of the body that lies wholly
    # outside a sliding window becomes its plain mean.
    return logits.masked_fill(~visible(position[:, None], length, keys, window), -1e30)


# A compiled layer is compiled around it: lengths differ from batch to batch, and its kernels are fused already.
AttentionInterface.register(ATTENTION, torch.compiler.disable(attention))  # type: ignore[no-untyped-call]


def _read_only_last(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """A layer's output for the last tokens alone, ``[pairs, width]``: all others are but keys and values to them."""
    parts: Any = layer
    heads_of = parts.self_attn
    cos, sin = rotary

    def heads(states: Tensor, name: str) -> Tensor:
        projected: Tensor = getattr(heads_of, f"{name}_proj")(states).unflatten(-1, (-1, heads_of.head_dim))
        norm: Callable[[Tensor], Tensor] | None = getattr(heads_of, f"{name}_norm", None)
        return projected if norm is None else norm(projected)

    def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]

    # A matrix of one row takes another kernel than one of several, which rounds differently: see _in_blocks.
    last = layout.last.repeat(2) if len(layout.last) == 1 else layout.last
    normed = parts.input_layernorm(hidden)
    key, value = rotated(heads(normed, "k"), cos, sin).transpose(1, 2), heads(normed, "v").transpose(1, 2)
    key, value = layout.keys_values(heads_of.layer_idx, key, value)
    row = rotated(heads(normed[:, last], "q"), cos[:, last], sin[:, last])[0]
    # Where Mistral's layers look for their window; those of others have it themselves, or none.
    where = heads_of.config if heads_of.config.model_type == "mistral" else heads_of
    window = getattr(where, "sliding_window", None)
    logits = _row_logits(row, key, layout.positions[last], heads_of.scaling, layout.keys, window)
    weights = logits.softmax(-1)
    mixed = (weights @ value.to(weights.dtype)).flatten(1).to(hidden.dtype)
    between: Tensor = hidden[0, last] + heads_of.o_proj(mixed)
    output: Tensor = between + parts.mlp(parts.post_attention_layernorm(between))
    return output[: len(layout.last)]


def decode(
    model: Decoder,
    packed: PackedPairs,
    cutoffs: Sequence[int],
    *,
    compress_layers: Collection[int] = (),
    compress_ratio: int = 1,
    whole_layers: bool = False,
) -> Tensor:
    """Run the decoder and return the last real token's state at each cutoff.

    Args:
        model: the decoder; layers from the deepest cutoff on are not touched.
        packed: the pairs. Where they are padded, the released code is reproduced: up to the first pooling the
            padding stands in the sequence, its keys masked, and the weights are those of its last token.
        cutoffs: how many layers to run before reading, ascending, each at least 1.
        compress_layers: layer indices (from 0) before which the bodies are pooled; index 0 and indices
            from the deepest cutoff on have no effect.
        compress_ratio: tokens pooled into one; 1 is off.
        whole_layers: call the last layer as a module too, rather than parts of it for the tokens that are read;
            parallel wrappers of layers need that.

    Returns:
        States after the final norm, ``[cutoffs, pairs, width]``, in the model's dtype.
    """
    row = embedded(model, packed)
    return run_layers(
        model, row, cutoffs, compress_layers=compress_layers, compress_ratio=compress_ratio, whole_layers=whole_layers
    )[0]


def embedded(model: Decoder, packed: PackedPairs) -> Row:
    """The pairs before the first layer."""
    table = cast(Tensor, model.embed_tokens.weight)
    return Row(packed, model.embed_tokens(on_device(packed.ids_below(len(table)), table.device)), 0)


def run_layers(
    model: Decoder,
    row: Row,
    cutoffs: Sequence[int],
    *,
    compress_layers: Collection[int] = (),
    compress_ratio: int = 1,
    kernel: Kernel | None = None,
    whole_layers: bool = False,
    goes_on: bool = False,
    before: KnownPrefix | None = None,
    leaves: KnownPrefix | None = None,
) -> tuple[Tensor, Row]:
    """Take pairs from the depth where they are to the deepest cutoff.

    Args:
        model: as :func:`decode`.
        row: the pairs.
        cutoffs: as :func:`decode`, each deeper than the pairs are.
        compress_layers: as :func:`decode`.
        compress_ratio: as :func:`decode`.
        kernel: what computes attention; None for SDPA.
        whole_layers: as :func:`decode`.
        goes_on: deeper layers are to follow in another walk.
        before: the prefix that is not in the row, where pairs begin with it, from a walk through the same layers.
        leaves: to be filled with the last pair's prefix, for walks that follow; unless that is ``before``.

    Returns:
        States after the final norm, ``[cutoffs, pairs, width]``, and the pairs where they are then: after the last
        cutoff, pooled where that is due. Where nothing is to follow, their states are of no use.
    """
    deepest = cutoffs[-1]
    hidden, device = row.states[None], row.states.device
    blocked = _in_blocks(device, hidden.dtype, cast(nn.Module, model).training)
    before = before if (row.packing.owner < 0).any() else None
    leaves = leaves if leaves is not before else None

    # Everything the device has to know of the pairs goes there before the first layer, so that none waits for it.
    def laid_out(packing: Packing) -> Layout:
        return Layout(packing, device, BLOCK if blocked else 1, kernel, before, leaves)

    packing = row.packing
    layout, poolings = laid_out(packing), {}
    pooled_last = deepest if goes_on else deepest - 1
    for depth in sorted({i for i in compress_layers if row.depth < i <= pooled_last} if compress_ratio > 1 else ()):
        pooling = Pooling(packing, compress_ratio, device)
        packing = pooling.after
        poolings[depth] = pooling, laid_out(packing)
    every_position = torch.arange(row.packing.longest, device=device)[None]
    cos, sin = model.rotary_emb(hidden, position_ids=every_position)
    rotary = cos[:, layout.positions], sin[:, layout.positions]

    states = []
    for depth, layer in enumerate(islice(model.layers, row.depth, deepest), row.depth + 1):
        if depth == deepest and not (whole_layers or goes_on):
            states.append(model.norm(_read_only_last(layer, hidden, rotary, layout)))
            break
        tap = AttentionTap() if depth in poolings else None
        hidden = layer(
            hidden,
            attention_mask=None,
            position_ids=layout.positions[None],
            position_embeddings=rotary,
            layout=layout,
            tap=tap,
        )
        if depth in cutoffs:
            states.append(model.norm(hidden[0, layout.last]))
        if tap is not None:
            pooling, layout = poolings[depth]
            hidden = pooling(hidden[0], cast(Tensor, tap.log_weights))[None]
            rotary = cos[:, layout.positions], sin[:, layout.positions]
    after = hidden[0]
    if leaves is not None:
        leaves.states = after[packing.last_prefix].clone()
    if before is not None and before.states is not None:
        after = torch.cat([after, before.states])
    return torch.stack(states), Row(packing, after, deepest)
