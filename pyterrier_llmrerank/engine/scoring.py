"""Score pairs on one or several devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..checkpoints.checkpoint import Checkpoint
from .attention_kernels import without_cudnn
from .batching import query_chunks
from .call import ScoringCall
from .cascade import Cascade
from .decoder import Decoder
from .device_scorer import DeviceScorer
from .fallback import FallbackDecoder
from .inputs import Ids
from .shape import Shape
from .threads import fastest_threads
from .usage import Observer, Usage
from .weights import Weights

#: Pairs that are tokenised and sorted into batches together. A chunk holds whole queries, so it may be larger.
CHUNK = 1024

#: Pairs in a chunk of a cascade, which keeps the hidden states of a whole chunk until its survivors are known.
CASCADE_CHUNK = 256

#: The fewest pairs for which a call on a CPU first measures which number of threads is fastest.
LARGE = 256

#: The fewest chunks for each of several devices, if there are enough queries: no device waits long for the last chunk.
CHUNKS_PER_DEVICE = 4


@dataclass(frozen=True)
class Scorer:
    """Scores pairs with one model in one shape. Opens files when their contents are first needed.

    Args:
        weights: the model's weights, once for each device.
        shape_of: returns the shape for a checkpoint, or raises ValueError if the checkpoint does not allow it.
        encode: turns pairs of query and passage into token ids.
        batch_size: pairs per batch; None for a token budget that fits the device.
    """

    weights: tuple[Weights, ...]
    shape_of: Callable[[Checkpoint], Shape]
    encode: Callable[[PreTrainedTokenizerBase, Sequence[tuple[str, str]]], list[Ids]]
    batch_size: int | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's checkpoint, opened on first use."""
        return self.weights[0].checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        """The first device."""
        return self.weights[0].device

    @cached_property
    def shape(self) -> Shape:
        """The part of the model that is run.

        Raises:
            ValueError: the checkpoint does not allow the shape.
        """
        return self.shape_of(self.checkpoint)

    def open(self, depth: int | None = None) -> Decoder | FallbackDecoder:
        """Read weights on all devices now instead of on the first call.

        Args:
            depth: decoder layers to read; None for all that the shape runs.

        Returns:
            The decoder on the first device.
        """
        depth = self.shape.cutoffs[-1] if depth is None else depth
        first, *_ = [weights.at_depth(depth)[0] for weights in self.weights]
        return first

    def ids(self, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """Return the token ids that the model reads for each pair."""
        return self.encode(self.weights[0].at_depth(0)[2], pairs)

    def score(
        self, pairs: Sequence[tuple[str, str]], observer: Observer | None = None, cascade: Cascade | None = None
    ) -> np.ndarray:
        """Compute the logits of every pair at every cutoff.

        Pairs are tokenised and scored in chunks of whole queries. Each device takes the next chunk when it has
        finished one, so faster devices take more. The first device works in the calling thread, the others in
        threads of their own.

        Args:
            pairs: pairs of query and passage.
            observer: names pairs in errors and receives progress and usage.
            cascade: decides which pairs survive each stage of a shape that prunes. Survivors keep their hidden states.

        Returns:
            fp32 logits as float64, ``[cutoffs, pairs]``; NaN where a cascade dropped the pair before the cutoff.

        Raises:
            ValueError, ImportError: the attention kernel, a cutoff or the padding cannot be used with this model.
            ScoringError: a pair has no tokens, a token that the model does not know, or more tokens than the model has
                positions (all checked before its chunk is scored); a score is not finite; memory runs out; or anything
                else fails. The other devices finish their batch. ``scores`` holds all logits so far.
            KeyboardInterrupt: Ctrl-C, with ``scores`` as above.
        """
        observer = observer or Observer()
        call = ScoringCall(pairs, self._chunks(pairs), len(self.shape.cutoffs), observer, cascade)
        # One by one: transformers builds models under settings of the whole process.
        devices = [DeviceScorer(weights, self.shape, self.encode, self.batch_size, call) for weights in self.weights]
        try:
            on_cuda = any(weights.device.type == "cuda" for weights in self.weights)
            with (
                without_cudnn() if on_cuda else nullcontext(),
                fastest_threads(self.device) if len(pairs) >= LARGE and len(devices) == 1 else nullcontext(),
                ThreadPoolExecutor(len(devices)) as threads,  # starts a thread for each submitted task only
            ):
                try:
                    others = [threads.submit(device.run) for device in devices[1:]]
                    devices[0].run()
                    for other in others:
                        other.result()
                finally:
                    call.stopped.set()
        except KeyboardInterrupt as error:
            error.scores = call.scores  # type: ignore[attr-defined]
            raise
        finally:
            observer.used(Usage(pairs=int(np.isfinite(call.scores[0]).sum())))
        return call.scores

    def _chunks(self, pairs: Sequence[tuple[str, str]]) -> Iterator[list[int]]:
        """Split pairs, by index, into chunks of whole queries."""
        size = CHUNK if len(self.shape.stages) == 1 else CASCADE_CHUNK
        if len(self.weights) > 1:
            size = min(size, -(-len(pairs) // (CHUNKS_PER_DEVICE * len(self.weights))))
        return query_chunks([query for query, _ in pairs], max(size, self.batch_size or 0))
