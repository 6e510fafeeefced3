"""Run a decoder's layers over a packed batch and return the hidden states that the heads read.

Inference and training of both rerankers share this forward pass. It calls the layers of a transformers model one by
one, because the model's own ``forward`` can neither stop at a chosen layer nor shorten the sequence between two
layers::

    ids -> embed_tokens -> layer 1 -> layer 2 -> ... -> layer n       n: the deepest cutoff
                              |          |                 |
                       pool bodies?   cutoff?            cutoff       compress_layers, cutoffs
                                         |                 |
                                       norm              norm  -> states of each pair's last token

Training calls layers as modules, so that gradient checkpointing and parallel wrappers work. Inference calls a layer's
parts (:mod:`~pyterrier_llmrerank.engine.layers`), with fewer passes over memory. Both call the parts of the deepest
layer: keys and values for all tokens, everything else for the last tokens alone. (With ``whole_layers``, it is a module
too.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from .attention import AttentionTap, Layout, PrefixCache
from .attention_kernels import Kernel
from .layers import call_layer, is_compiled, run_last, run_layer
from .packing import PackedPairs, Packing, Row, on_device
from .pooling import Pooling


class Decoder(Protocol):
    """Describes a headless transformers model with our attention, whose layers can be run one by one."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    layers: nn.ModuleList
    norm: nn.Module


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
        model: the decoder; layers above the deepest cutoff are not used.
        packed: the pairs. If they are padded, the released code is reproduced: up to the first pooling the padding is
            part of the sequence, with its keys masked, and pooling takes the attention of the last padding token.
        cutoffs: how many layers to run before reading, ascending, each at least 1.
        compress_layers: layers, counted from 1, after which the bodies are pooled; 0 and layers from the
            deepest cutoff on have no effect.
        compress_ratio: tokens pooled into one; 1 turns pooling off.
        whole_layers: run every layer in full, as a module; parallel wrappers of layers need that.

    Returns:
        States after the final norm, ``[cutoffs, pairs, width]``, in the model's dtype.

    Raises:
        ValueError: the model does not know a token.
    """
    packed.check_ids(len(cast(Tensor, model.embed_tokens.weight)))
    row = embedded(model, packed)
    return run_layers(
        model, row, cutoffs, compress_layers=compress_layers, compress_ratio=compress_ratio, whole_layers=whole_layers
    )[0]


def embedded(model: Decoder, packed: PackedPairs) -> Row:
    """Embed the pairs' tokens, which the caller has checked, and return the row before the first layer."""
    table = cast(Tensor, model.embed_tokens.weight)
    return Row(packed, model.embed_tokens(on_device(packed.ids, table.device)), 0)


def run_layers(
    model: Decoder,
    row: Row,
    cutoffs: Sequence[int],
    *,
    compress_layers: Collection[int] = (),
    compress_ratio: int = 1,
    kernel: Kernel | None = None,
    whole_layers: bool = False,
    resumable: bool = False,
    reuse_prefix: PrefixCache | None = None,
    save_prefix: PrefixCache | None = None,
) -> tuple[Tensor, Row]:
    """Run a row's pairs from their current depth to the deepest cutoff.

    Args:
        model: as in :func:`decode`.
        row: the pairs.
        cutoffs: as in :func:`decode`, each deeper than the row.
        compress_layers: as in :func:`decode`.
        compress_ratio: as in :func:`decode`.
        kernel: computes attention; None for SDPA.
        whole_layers: as in :func:`decode`.
        resumable: return a row that a later call can take deeper.
        reuse_prefix: the prefix of pairs with owner -1, saved by an earlier call with the same layers.
        save_prefix: filled with the last pair's prefix for later calls, unless it is ``reuse_prefix``.

    Returns:
        States after the final norm, ``[cutoffs, pairs, width]``, and the row after the deepest cutoff, pooled if
        pooling follows there. The row's states are valid only if ``resumable``.
    """
    hidden, device, deepest = row.states[None], row.states.device, cutoffs[-1]
    reuse_prefix = reuse_prefix if (row.packing.owner < 0).any() else None
    save_prefix = save_prefix if save_prefix is not reuse_prefix else None
    is_training = cast(nn.Module, model).training
    in_groups = device.type == "cpu" and not is_training
    lay_out = partial(
        Layout, device=device, in_groups=in_groups, kernel=kernel, reuse_prefix=reuse_prefix, save_prefix=save_prefix
    )
    last_pooling = deepest if resumable else deepest - 1
    pooled_after = sorted({depth for depth in compress_layers if row.depth < depth <= last_pooling})
    plan = _plan(row, pooled_after if compress_ratio > 1 else [], compress_ratio, lay_out)
    cos, sin = model.rotary_emb(hidden, position_ids=torch.arange(row.packing.longest, device=device)[None])

    states = []
    for depth, layer in enumerate(islice(model.layers, row.depth, deepest), row.depth + 1):
        if depth - 1 in plan.layouts:  # the first layer, or the first after a pooling
            layout = plan.layouts[depth - 1]
            rotary = cos[:, layout.positions], sin[:, layout.positions]
        if depth == deepest and not (whole_layers or resumable):
            states.append(model.norm(run_last(layer, hidden, rotary, layout)))
            break
        pooling = plan.poolings.get(depth)
        tap = None if pooling is None else AttentionTap()
        run = call_layer if whole_layers or is_training or is_compiled(layer) else run_layer
        hidden = run(layer, hidden, rotary, layout, tap)
        if depth in cutoffs:
            states.append(model.norm(hidden[0, layout.last]))
        if pooling is not None and tap is not None:
            hidden = pooling(hidden[0], cast(Tensor, tap.log_weights))[None]
    return torch.stack(states), Row(plan.packing, _with_prefix(hidden[0], plan, reuse_prefix, save_prefix), deepest)


class _Plan(NamedTuple):
    """Holds the layouts and poolings of a run, by the number of layers after which they apply."""

    layouts: dict[int, Layout]
    poolings: dict[int, Pooling]
    #: The packing at the end.
    packing: Packing


def _plan(row: Row, pooled_after: Sequence[int], ratio: int, lay_out: Callable[[Packing], Layout]) -> _Plan:
    """Prepare all poolings and layouts before the first layer runs."""
    packing = row.packing
    layouts, poolings = {row.depth: lay_out(packing)}, {}
    for depth in pooled_after:
        poolings[depth] = Pooling(packing, ratio, row.states.device)
        packing = poolings[depth].after
        layouts[depth] = lay_out(packing)
    return _Plan(layouts, poolings, packing)


def _with_prefix(states: Tensor, plan: _Plan, reuse: PrefixCache | None, save: PrefixCache | None) -> Tensor:
    """Save the last pair's prefix, and append a reused one where :attr:`Packing.places` expects it."""
    if save is not None:
        save.states = states[plan.packing.last_prefix].clone()
    if reuse is not None and reuse.states is not None:
        states = torch.cat([states, reuse.states])
    return states
