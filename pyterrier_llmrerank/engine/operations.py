"""Operations: what a shape computes for some pairs, counted from their tokens and not by running it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .decoder import Decoder
from .fallback import FallbackDecoder
from .inputs import Ids
from .packing import Indices, owners

Counts = NDArray[np.float64]


class Layer(NamedTuple):
    """What counts of a decoder layer.

    Args:
        matrices: weights of its matrices.
        keys_values: those of them that make keys and values.
        attended: width of all heads' queries together.
        window: keys that a token sees at most; None for all before it.
    """

    matrices: int
    keys_values: int
    attended: int
    window: int | None

    @classmethod
    def of(cls, layer: Any) -> Layer:
        """From a layer of a decoder that is walked."""
        tensors = [*layer.named_parameters(), *layer.named_buffers()]  # low-rank updates beside weights are buffers
        sizes = {name: tensor.numel() for name, tensor in tensors if tensor.ndim > 1}
        keys_values = sum(size for name, size in sizes.items() if "k_proj." in name or "v_proj." in name)
        heads = layer.self_attn
        window = getattr(heads.config if heads.config.model_type == "mistral" else heads, "sliding_window", None)
        return cls(sum(sizes.values()), keys_values, heads.config.num_attention_heads * heads.head_dim, window)

    def keys(self, tokens: Indices) -> Indices:
        """Keys that so many first tokens of a pair see together, themselves included."""
        full = tokens if self.window is None else np.minimum(tokens, self.window)
        return full * (full + 1) // 2 + (tokens - full) * full


class Operations:
    """Multiplications and additions that scoring pairs takes, in any shape of a decoder.

    Counted is what is useful: matrices of the layers, attention to the keys that a token sees, heads; a query's prefix
    once, no padding. Not counted is what works element by element, and the pooling itself.

    Args:
        decoder: whose layers are run.
        pairs: the distinct pairs.
        query_of_pair: the number of each pair's query, from 0, ``[pairs]``.
        queries: how many there are.
    """

    def __init__(
        self, decoder: Decoder | FallbackDecoder, pairs: Sequence[Ids], query_of_pair: Indices, queries: int
    ) -> None:
        self._prefix, self._body, self._suffix = (
            np.array([len(pair[:3][part]) for pair in pairs]) for part in range(3)
        )
        self._owner = owners(pairs)
        self._query = query_of_pair
        self._queries = queries
        model: Any = decoder.model if isinstance(decoder, FallbackDecoder) else decoder
        self._width = int(model.config.hidden_size)
        self._plain = isinstance(decoder, FallbackDecoder)
        self._layers: list[Layer] = []
        if self._plain:
            embedding = model.get_input_embeddings().weight.numel()
            matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1) - embedding
            self._layers = [Layer(matrices, 0, self._width * model.config.num_hidden_layers, None)]
        else:
            self._layers = [Layer.of(layer) for layer in model.layers]

    def __call__(
        self,
        read: Sequence[int],
        compress_layers: Collection[int] = (),
        compress_ratio: int = 1,
        exit_layer: Indices | None = None,
    ) -> Counts:
        """Those of a shape.

        Args:
            read: layers at which heads read, ascending; the last is the deepest that is run.
            compress_layers: as :func:`~pyterrier_llmrerank.engine.decoder.decode`.
            compress_ratio: as :func:`~pyterrier_llmrerank.engine.decoder.decode`.
            exit_layer: the layer after which each pair leaves, ``[pairs]``; None where all go through.

        Returns:
            Operations for each query, ``[queries]``.
        """
        deepest, body = read[-1], self._body
        last = np.full(len(body), deepest) if exit_layer is None else exit_layer
        if self._plain:  # all of it is run for whole pairs, whatever is read
            (whole,) = self._layers
            length = self._prefix + body + self._suffix
            work = 2.0 * whole.matrices * length + 4.0 * whole.attended * whole.keys(length)
            return self._by_query(work + 2.0 * self._width * len(read))
        prefix_last = np.zeros_like(last)  # stands with its owner, as long as one of its pairs is in
        np.maximum.at(prefix_last, self._owner, last)
        work = np.zeros(len(body))
        for depth, layer in enumerate(self._layers[:deepest], 1):
            if depth > 1 and depth - 1 in compress_layers:
                body = -(-body // compress_ratio)
            length = self._prefix + body + self._suffix
            here, prefix_here = last >= depth, prefix_last >= depth
            tokens = here * (length - self._prefix) + prefix_here * self._prefix
            if depth < deepest:
                before = layer.keys(self._prefix)
                keys = here * (layer.keys(length) - before) + prefix_here * before
                work += 2.0 * layer.matrices * tokens + 4.0 * layer.attended * keys
            else:  # keys and values for all tokens, the rest for those that are read
                seen = length if layer.window is None else np.minimum(length, layer.window)
                for_one = 2.0 * (layer.matrices - layer.keys_values) + 4.0 * layer.attended * seen
                work += 2.0 * layer.keys_values * tokens + here * for_one
            if depth in read:
                work += 2.0 * self._width * here
        return self._by_query(work)

    def _by_query(self, of_pairs: Counts) -> Counts:
        return np.bincount(self._query, of_pairs, self._queries).astype(float)
