"""Run a decoder layer on a packed row: on all its tokens, or on the last token of each pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .attention import AttentionTap, Layout, attention, single_query_logits, sliding_window_of
from .elementwise import rotate
from .linears import linear_plus, mlp_plus


def call_layer(
    layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout, tap: AttentionTap | None = None
) -> Tensor:
    """Run a layer on all tokens of a row by its own ``forward``; arguments and result as for :func:`run_layer`."""
    positions = layout.positions[None]
    output: Tensor = layer(
        hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, layout=layout, tap=tap
    )
    return output


def is_compiled(layer: nn.Module) -> bool:
    """Return whether a layer's ``compile`` was called; only calls of the layer itself run compiled."""
    return layer._compiled_call_impl is not None


def run_layer(
    layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout, tap: AttentionTap | None = None
) -> Tensor:
    """Run a layer's parts on all tokens of a row, with few passes over memory.

    Args:
        layer: the layer of a model of :data:`~pyterrier_llmrerank.checkpoints.families.FAMILIES`.
        hidden: states before the layer, ``[1, tokens, width]``.
        rotary: cosine and sine of each token's position, ``[1, tokens, head width]``.
        layout: the tokens that form each pair.
        tap: filled with the attention of each pair's last position.

    Returns:
        States after the layer, ``[1, tokens, width]``.
    """
    parts: Any = layer
    heads = parts.self_attn
    normed = parts.input_layernorm(hidden)
    query, key = (rotate(_project(heads, name, normed), *rotary).transpose(1, 2) for name in "qk")
    value = _project(heads, "v", normed).transpose(1, 2)
    window = sliding_window_of(heads)
    mixed, _ = attention(
        heads, query, key, value, None, scaling=heads.scaling, sliding_window=window, layout=layout, tap=tap
    )
    return _output(parts, mixed.flatten(2), hidden)


def run_last(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """Run a layer on the last token of each pair; other tokens only give keys and values.

    Takes the arguments of :func:`run_layer`, and returns states, ``[pairs, width]``.
    """
    parts: Any = layer
    heads = parts.self_attn
    # For a matrix of one row, torch uses another kernel, which rounds differently.
    last = layout.last.repeat(2) if len(layout.last) == 1 else layout.last
    normed = parts.input_layernorm(hidden)
    key = rotate(_project(heads, "k", normed), *rotary).transpose(1, 2)
    value = _project(heads, "v", normed).transpose(1, 2)
    key, value = layout.gather_keys_values(heads.layer_idx, key, value)
    cos, sin = rotary
    query = rotate(_project(heads, "q", normed[:, last]), cos[:, last], sin[:, last])[0]
    window = sliding_window_of(heads)
    logits = single_query_logits(query, key, layout.positions[last], layout.real_keys, heads.scaling, window)
    weights = logits.softmax(-1)
    mixed = (weights @ value.to(weights.dtype)).flatten(1).to(hidden.dtype)
    return _output(parts, mixed, hidden[0, last])[: len(layout.last)]


def _output(parts: Any, mixed: Tensor, hidden: Tensor) -> Tensor:
    """Complete a layer after attention: output projection and MLP, each with its residual."""
    hidden = linear_plus(parts.self_attn.o_proj, mixed, hidden)
    return mlp_plus(parts.mlp, parts.post_attention_layernorm(hidden), hidden)


def _project(heads: Any, name: str, states: Tensor) -> Tensor:
    """Project states to queries, keys or values, ``[1, tokens, heads, head width]``."""
    projected: Tensor = getattr(heads, f"{name}_proj")(states).unflatten(-1, (-1, heads.head_dim))
    norm: Callable[[Tensor], Tensor] | None = getattr(heads, f"{name}_norm", None)  # Qwen3 has one
    return projected if norm is None else norm(projected)
