"""Count the operations (FLOPs) of scoring in a given shape, from the pairs' tokens and without running the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .attention import sliding_window_of
from .decoder import Decoder
from .fallback import FallbackDecoder
from .inputs import Ids
from .packing import Indices, owners

Counts = NDArray[np.float64]


class Layer(NamedTuple):
    """Holds the sizes of a decoder layer that determine its operations.

    Args:
        matrices: weights in its matrices.
        keys_values: weights in the key and value projections, part of ``matrices``.
        attended: width of all heads' queries together.
        window: the most keys that a token sees; None for all before it.
    """

    matrices: int
    keys_values: int
    attended: int
    window: int | None

    @classmethod
    def of(cls, layer: Any) -> Layer:
        """Measure a layer of a decoder that supports layer-wise execution."""
        tensors = [*layer.named_parameters(), *layer.named_buffers()]  # buffers: unmerged low-rank updates
        sizes = {name: tensor.numel() for name, tensor in tensors if tensor.ndim > 1}
        keys_values = sum(size for name, size in sizes.items() if "k_proj." in name or "v_proj." in name)
        heads = layer.self_attn
        attended = heads.config.num_attention_heads * heads.head_dim
        return cls(sum(sizes.values()), keys_values, attended, sliding_window_of(heads))

    def keys(self, tokens: Indices) -> Indices:
        """Count the keys that a pair's first ``tokens`` tokens see in total; a token sees itself."""
        full = tokens if self.window is None else np.minimum(tokens, self.window)
        return full * (full + 1) // 2 + (tokens - full) * full


class Operations:
    """Counts multiplications and additions for some pairs in any shape of a decoder.

    It counts the layers' matrices, attention to visible keys, and heads. A query's prefix counts once, padding not at
    all. Element-wise work and pooling are left out.

    Args:
        decoder: the decoder that would run.
        pairs: the distinct pairs.
        query_of_pair: the number of each pair's query, from 0, ``[pairs]``.
        queries: how many queries there are.
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
        self._fallback = isinstance(decoder, FallbackDecoder)
        model: Any = decoder.model if isinstance(decoder, FallbackDecoder) else decoder
        #: Width of the hidden states, which the heads read.
        self.width = int(model.config.hidden_size)
        #: Sizes of the layers; a model that runs by its own forward counts as one layer.
        self.layers: list[Layer]
        if self._fallback:
            embedding = model.get_input_embeddings().weight.numel()
            matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1) - embedding
            self.layers = [Layer(matrices, 0, self.width * model.config.num_hidden_layers, None)]
        else:
            self.layers = [Layer.of(layer) for layer in model.layers]

    def __call__(
        self,
        read: Sequence[int],
        compress_layers: Collection[int] = (),
        compress_ratio: int = 1,
        exit_layer: Indices | None = None,
    ) -> Counts:
        """Count the operations of a shape.

        Args:
            read: layers at which heads read, ascending; the last is the deepest that runs.
            compress_layers: as in :func:`~pyterrier_llmrerank.engine.decoder.decode`.
            compress_ratio: as in :func:`~pyterrier_llmrerank.engine.decoder.decode`.
            exit_layer: the layer after which a cascade drops each pair, ``[pairs]``; None if it drops none.

        Returns:
            Operations for each query, ``[queries]``.
        """
        if self._fallback:
            return self._by_query(self._work_of_whole_model(len(read)))
        deepest, body = read[-1], self._body
        last = np.full(len(body), deepest) if exit_layer is None else exit_layer
        prefix_last = np.zeros_like(last)  # an owner's prefix runs as long as any of its pairs
        np.maximum.at(prefix_last, self._owner, last)
        work = np.zeros(len(body))
        for depth, layer in enumerate(self.layers[:deepest], 1):
            if depth > 1 and depth - 1 in compress_layers:
                body = -(-body // compress_ratio)
            length = self._prefix + body + self._suffix
            here, prefix_here = last >= depth, prefix_last >= depth
            tokens = here * (length - self._prefix) + prefix_here * self._prefix
            if depth < deepest:
                before = layer.keys(self._prefix)
                keys = here * (layer.keys(length) - before) + prefix_here * before
                work += 2.0 * layer.matrices * tokens + 4.0 * layer.attended * keys
            else:  # keys and values for all tokens, all else for the tokens that are read
                seen = length if layer.window is None else np.minimum(length, layer.window)
                for_one = 2.0 * (layer.matrices - layer.keys_values) + 4.0 * layer.attended * seen
                work += 2.0 * layer.keys_values * tokens + here * for_one
            if depth in read:
                work += 2.0 * self.width * here
        return self._by_query(work)

    def _work_of_whole_model(self, heads: int) -> Counts:
        """Count each pair's operations for a model that runs all its layers for all tokens, ``[pairs]``."""
        (whole,) = self.layers
        length = self._prefix + self._body + self._suffix
        work: Counts = 2.0 * whole.matrices * length + 4.0 * whole.attended * whole.keys(length)
        return work + 2.0 * self.width * heads

    def _by_query(self, of_pairs: Counts) -> Counts:
        return np.bincount(self._query, of_pairs, self._queries).astype(float)
