"""Score pairs: tokenise them, run batches through the decoder, and apply the heads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoints.checkpoint import Checkpoint
from ..errors import ScoringError, reason
from .attention import PrefixCache
from .batching import Budget, query_chunks, run_in_batches
from .cascade import Cascade
from .decoder import Decoder, embedded, run_layers
from .fallback import FallbackDecoder
from .inputs import Ids
from .kernels import kernel_of, without_cudnn
from .packing import PackedPairs, Packing, Row, regrouped
from .prefetch import prefetch
from .threads import fastest_threads
from .usage import Observer, Stopwatch, Usage
from .weights import Weights

#: Pairs that are tokenised and sorted into batches together. A chunk holds whole queries, so it may be larger.
CHUNK = 1024

#: The same for cascades, which keep the hidden states of a whole chunk until its survivors are known.
CASCADE_CHUNK = 256

#: Pairs from which a call on a CPU is worth a measurement of the fastest number of threads.
LARGE = 256

#: Chunks for each of several devices, if there are enough queries, so that no device waits long for the last one.
SHARES = 4


@dataclass(frozen=True)
class Shape:
    """The part of a model that is run, and the heads that read it.

    Args:
        cutoffs: layers at which a score is read, ascending.
        heads: index of the head for each cutoff.
        compress_layers: layer indices before which passages are pooled, as for
            :func:`~pyterrier_llmrerank.engine.decoder.decode`.
        compress_ratio: hidden states pooled into one; 1 is off.
        pad_id: reproduce the released code's padding with this id; None for scores without padding.
        prune: pairs of a cutoff and the number of candidates per query that continue after it.
        attn_implementation: the attention kernel, as for :func:`~pyterrier_llmrerank.engine.kernels.kernel_of`.
    """

    cutoffs: tuple[int, ...]
    heads: tuple[int, ...]
    compress_layers: tuple[int, ...] = ()
    compress_ratio: int = 1
    pad_id: int | None = None
    prune: tuple[tuple[int, int], ...] = ()
    attn_implementation: str | None = None

    @property
    def stages(self) -> list[tuple[int, ...]]:
        """The cutoffs in groups; all but the last end where candidates are dropped."""
        drops = [layer for layer, _ in self.prune]
        bounds = zip([0, *drops], [*drops, self.cutoffs[-1]], strict=True)
        return [tuple(cutoff for cutoff in self.cutoffs if above < cutoff <= last) for above, last in bounds]


@dataclass(frozen=True)
class Scorer:
    """Score pairs with one model in one shape. It opens files only when something asks for their contents.

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
            pairs: query and passage of each.
            observer: names pairs in errors and receives progress and usage.
            cascade: decides which pairs survive each stage of a shape that prunes. Survivors keep their hidden states.

        Returns:
            fp32 logits as float64, ``[cutoffs, pairs]``; NaN where a cascade dropped the pair before the cutoff.

        Raises:
            ValueError, ImportError: the attention kernel or a cutoff cannot be used with this model.
            ScoringError: a pair has no tokens, unknown tokens or more tokens than its table of positions, if it has
                one (checked before its chunk is scored); a score is not finite; memory runs out; or anything else
                fails. The other devices finish their batch. ``scores`` holds all logits computed so far.
            KeyboardInterrupt: Ctrl-C, with ``scores`` as above.
        """
        observer = observer or Observer()
        for weights in self.weights:  # one by one: transformers builds models under process-wide settings
            kernel_of(self.shape.attn_implementation, weights.device, weights.dtype)
            model, _, _ = weights.at_depth(self.shape.cutoffs[-1])
            if isinstance(model, FallbackDecoder):
                model.check_cutoffs(self.shape.cutoffs)
        call = Call(pairs, self._chunks(pairs), len(self.shape.cutoffs), observer, cascade)
        devices = [DeviceScorer(self, weights, call) for weights in self.weights]
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
            size = min(size, -(-len(pairs) // (SHARES * len(self.weights))))
        return query_chunks([query for query, _ in pairs], max(size, self.batch_size or 0))


class Stopped(Exception):  # noqa: N818
    """Raised between two batches because another device failed."""


class Call:
    """The state of one call of :meth:`Scorer.score`, shared by its devices.

    Args:
        pairs: query and passage of each.
        chunks: indices of pairs, chunk by chunk.
        cutoffs: the number of cutoffs.
        observer: follows the call.
        cascade: decides which pairs survive; None if all do.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        chunks: Iterator[list[int]],
        cutoffs: int,
        observer: Observer,
        cascade: Cascade | None,
    ) -> None:
        self.pairs = pairs
        self.observer = observer
        self.cascade = cascade
        #: Logits so far, ``[cutoffs, pairs]``; NaN where there is none yet.
        self.scores = np.full((cutoffs, len(pairs)), np.nan)
        #: Set when no further batch is to be started.
        self.stopped = threading.Event()
        self._chunks = chunks
        self._lock = threading.Lock()

    def next_chunk(self) -> list[int] | None:
        """Take the next chunk; None if there is none left or the call has stopped."""
        with self._lock:
            return None if self.stopped.is_set() else next(self._chunks, None)

    def progress(self, pairs: int) -> None:
        """Report pairs as done, one thread at a time."""
        with self._lock:
            self.observer.progress(pairs)

    def error(self, message: str) -> ScoringError:
        """Return an error that carries the scores so far."""
        return ScoringError(message, self.scores)


class TokenizedPairs(NamedTuple):
    """A chunk of pairs with their token ids.

    Args:
        pairs: their indices among all pairs.
        ids: their token ids.
    """

    pairs: list[int]
    ids: list[Ids]


class PendingBatch(NamedTuple):
    """A batch whose scores the device may still be computing.

    Args:
        pairs: their indices among all pairs.
        cutoffs: rows of the score matrix that the batch fills.
        result: waits for the scores and returns them, ``[cutoffs, pairs]``.
    """

    pairs: list[int]
    cutoffs: slice
    result: Callable[[], np.ndarray]


@dataclass
class Stage:
    """A run of layers between two points where a cascade drops candidates.

    Args:
        cutoffs: layers at which it reads scores.
        is_last: whether no stage follows.
        alive: positions in the chunk of the pairs that take part.
        states_before: each pair's hidden states before the stage, by position in the chunk: a row, and the pair's index
            in it. Empty for the first stage.
        states_after: the same after the stage, filled as batches are run. Empty for the last stage.
        prefix: the prefix at the end of the latest batch; the next batch may start with it.
    """

    cutoffs: tuple[int, ...]
    is_last: bool
    alive: list[int]
    states_before: dict[int, tuple[Row, int]]
    states_after: dict[int, tuple[Row, int]] = field(default_factory=dict)
    prefix: PrefixCache | None = None


class DeviceScorer:
    """Take chunks of a call on one device, and write their scores into the call.

    It holds the token ids of two chunks at most: it tokenises the next one, in a thread, while it scores one.

    Args:
        scorer: the model's shape, encoding and batch size.
        weights: the weights on the device.
        call: the call.
    """

    def __init__(self, scorer: Scorer, weights: Weights, call: Call) -> None:
        self.shape, self.weights, self.call = scorer.shape, weights, call
        self.model, heads, tokenizer = weights.at_depth(self.shape.cutoffs[-1])
        self._heads = torch.stack([heads[index] for index in self.shape.heads])  # a list of indices would be copied
        self._encode = partial(scorer.encode, tokenizer)
        self._kernel = kernel_of(self.shape.attn_implementation, weights.device, weights.dtype)
        width = int(weights.checkpoint.config.hidden_size)
        self._budget = Budget(pairs=scorer.batch_size) if scorer.batch_size else Budget.of_device(weights.device, width)
        self._limits = limits_of(self.model)
        self._pending: deque[PendingBatch] = deque()
        self._latest: list[int] = []  # pairs of the latest batch
        self._tokenising = Stopwatch()

    def run(self) -> None:
        """Score chunks until there are none left or another device fails.

        Raises:
            ScoringError, KeyboardInterrupt: as :meth:`Scorer.score`; the other devices are told to stop.
        """
        device = self.weights.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # torch keeps that per thread
            begun, waiting = time.perf_counter(), Stopwatch()
            try:
                for chunk in prefetch(map(self._tokenise, iter(self.call.next_chunk, None)), waiting):
                    self._score_chunk(chunk)
                self._collect()
            except BaseException as error:
                self.call.stopped.set()
                with suppress(Exception):  # there is an error already
                    self._collect()
                if not isinstance(error, Stopped):
                    self._raise(error)
            finally:
                seconds = time.perf_counter() - begun - waiting.seconds
                self.call.observer.used(Usage(tokenising_seconds=self._tokenising.seconds, model_seconds=seconds))

    def _raise(self, error: BaseException) -> NoReturn:
        """Re-raise our own errors; wrap any other in a ScoringError that names the latest batch."""
        if isinstance(error, ScoringError) or not isinstance(error, Exception):
            raise error
        if isinstance(error, MemoryError):
            message = "out of memory outside the model; rerank fewer queries at a time."
        else:
            pairs = self._latest
            others = f" or one of {len(pairs) - 1} more pairs in its batch" if len(pairs) > 1 else ""
            at = f" at {self._label(pairs[0])}{others}" if pairs else ""
            message = f"scoring failed on {self.weights.device}{at}: {type(error).__name__}: {reason(error)}"
        raise self.call.error(message) from error

    def _label(self, pair: int) -> str:
        return self.call.observer.label(pair)

    # -- token ids

    def _tokenise(self, pairs: list[int]) -> TokenizedPairs:
        """Tokenise a chunk; ScoringError if the model cannot read one of its pairs."""
        texts = [self.call.pairs[pair] for pair in pairs]
        with self._tokenising:
            encoded = self._encode_or_name(pairs, texts)
            for pair, ids in zip(pairs, encoded, strict=True):
                if problem := problem_of_ids(ids, *self._limits):
                    raise self.call.error(f"{self._label(pair)} {problem}")
        queries = {query for (query, _), ids in zip(texts, encoded, strict=True) if ids.query_truncated}
        passages = sum(ids.passage_truncated for ids in encoded)
        self.call.observer.used(Usage(truncated_queries=len(queries), truncated_passages=passages))
        return TokenizedPairs(pairs, encoded)

    def _encode_or_name(self, pairs: list[int], texts: list[tuple[str, str]]) -> list[Ids]:
        """Return token ids, or raise a ScoringError that names the pair whose tokenisation fails."""
        try:
            return self._encode(texts)
        except BaseException as error:
            if not _is_failure(error):
                raise
            failure = error
        at = f"{self._label(pairs[0])} and {len(pairs) - 1} more pairs together"  # unless one pair fails alone
        for pair, text in zip(pairs, texts, strict=True):
            try:
                self._encode([text])
            except BaseException as error:
                if not _is_failure(error):
                    raise
                at, failure = self._label(pair), error
                break
        raise self.call.error(f"cannot tokenise {at}: {type(failure).__name__}: {reason(failure)}") from failure

    # -- batches

    def _score_chunk(self, chunk: TokenizedPairs) -> None:
        """Take a chunk through all stages."""
        alive, states = list(range(len(chunk.pairs))), dict[int, tuple[Row, int]]()
        for cutoffs in self.shape.stages:
            stage = Stage(cutoffs, cutoffs[-1] == self.shape.cutoffs[-1], alive, states)
            ids = [chunk.ids[index] for index in alive]
            too_large = run_in_batches(ids, partial(self._run_batch, chunk, stage), self._budget)
            if too_large is not None:
                self._collect()
                raise self.call.error(
                    f"out of memory on {self.weights.device} with one pair alone: "
                    f"{self._label(chunk.pairs[alive[too_large]])}, {ids[too_large].length} tokens; "
                    "allow fewer tokens a passage, a 16-bit dtype, or a device with more memory."
                )
            if not stage.is_last and self.call.cascade is not None:
                alive = self._survivors(chunk, stage, self.call.cascade)
            states = {index: stage.states_after[index] for index in alive if index in stage.states_after}

    @torch.inference_mode()
    def _run_batch(self, chunk: TokenizedPairs, stage: Stage, batch: list[int]) -> None:
        """Start a batch, given by positions in ``stage.alive``, and wait for the one before it."""
        if self.call.stopped.is_set():
            raise Stopped
        members = [stage.alive[position] for position in batch]
        pairs = self._latest = [chunk.pairs[member] for member in members]
        ids = [chunk.ids[member] for member in members]
        if isinstance(self.model, FallbackDecoder):
            states = self._fallback_states(self.model, ids, stage)
        else:
            states = self._decoder_states(self.model, members, ids, stage)
        first = self.shape.cutoffs.index(stage.cutoffs[0])
        cutoffs = slice(first, first + len(stage.cutoffs))
        logits = torch.einsum("cbw,cw->cb", states.float(), self._heads[cutoffs])
        self._pending.append(PendingBatch(pairs, cutoffs, to_host(logits)))
        self._collect(leave=1)

    def _fallback_states(self, model: FallbackDecoder, ids: list[Ids], stage: Stage) -> Tensor:
        """Run a model by its own forward."""
        packed = PackedPairs(ids)
        states: Tensor = model(packed, stage.cutoffs)
        self._count(packed, int(packed.real.sum()))
        return states

    def _decoder_states(self, model: Decoder, members: list[int], ids: list[Ids], stage: Stage) -> Tensor:
        """Run a stage's layers on the hidden states of the stage before."""
        known = None if stage.prefix is None else stage.prefix.ids
        if stage.states_before:
            row = regrouped([stage.states_before[member] for member in members], ids, known)
        else:
            row = embedded(model, PackedPairs(ids, self.shape.pad_id, known))
            self._count(row.packing, len(row.states))
        last_prefix = stage.prefix if row.packing.owner[-1] < 0 else PrefixCache(ids[-1].prefix)
        states, row = run_layers(
            model, row, stage.cutoffs,
            compress_layers=self.shape.compress_layers, compress_ratio=self.shape.compress_ratio,
            resumable=not stage.is_last, kernel=self._kernel, reuse_prefix=stage.prefix, save_prefix=last_prefix,
        )  # fmt: skip
        stage.prefix = last_prefix
        if not stage.is_last:
            stage.states_after |= {member: (row, place) for place, member in enumerate(members)}
        return states

    def _count(self, packing: Packing, tokens: int) -> None:
        """Report the tokens and positions of a batch that enters the first layer."""
        positions = len(packing) * packing.longest
        self.call.observer.used(Usage(tokens=tokens, positions=positions, filled=int(packing.real.sum())))

    def _collect(self, leave: int = 0) -> None:
        """Wait for scores until only ``leave`` batches are pending, so that the device always has work."""
        call = self.call
        while len(self._pending) > leave:
            batch = self._pending[0]
            logits = batch.result()
            self._pending.popleft()  # after the result, which is asked for again if it fails
            finite = np.isfinite(logits).all(axis=0)
            call.scores[batch.cutoffs, np.array(batch.pairs)[finite]] = logits[:, finite]
            if not finite.all():
                with suppress(ScoringError):
                    self._collect()
                pair, dtype = batch.pairs[int(finite.argmin())], self.weights.dtype
                advice = "is the checkpoint sound?" if dtype == torch.float32 else "try dtype='float32'."
                raise call.error(f"the score of {self._label(pair)} is not finite in {dtype}; {advice}")
            if batch.cutoffs.stop == len(call.scores):
                call.progress(len(batch.pairs))

    def _survivors(self, chunk: TokenizedPairs, stage: Stage, cascade: Cascade) -> list[int]:
        """Return the positions in the chunk of the pairs that survive a stage."""
        self._collect()
        layer = stage.cutoffs[-1]
        members = {chunk.pairs[member]: member for member in stage.alive}
        survivors = cascade.survivors(layer, list(members), self.call.scores[self.shape.cutoffs.index(layer)])
        self.call.progress(len(members) - len(survivors))
        return [members[pair] for pair in survivors]


def limits_of(model: Decoder | FallbackDecoder) -> tuple[int, int | None]:
    """Return the size of a model's vocabulary, and its number of positions; None for any number."""
    if isinstance(model, FallbackDecoder):
        return model.vocabulary, model.positions
    return len(cast(Tensor, model.embed_tokens.weight)), None


def problem_of_ids(ids: Ids, vocabulary: int, positions: int | None) -> str | None:
    """Say why a model cannot read token ids; None if it can.

    >>> problem_of_ids(Ids([1, 5], [7], []), vocabulary=8, positions=2)
    'has 3 tokens, but the model has 2 positions; allow fewer tokens a passage.'
    """
    if not ids.length:
        return "has no tokens, so that there is nothing to score."
    if (largest := max(ids.flat())) >= vocabulary:
        return f"holds token {largest} of the tokenizer, but the model knows {vocabulary} tokens."
    if positions is not None and ids.length > positions:
        return f"has {ids.length} tokens, but the model has {positions} positions; allow fewer tokens a passage."
    return None


def to_host(computed: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy a tensor to the host.

    Returns:
        A function that waits for this copy only, not for later GPU work, and returns the array.
    """
    if computed.device.type != "cuda":
        return lambda: computed.cpu().numpy()
    copy = computed.to("cpu", non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # leaves the core to the tokeniser
    copied.record()

    def result() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return result


def _is_failure(error: BaseException) -> bool:
    """Return whether a tokenizer failed, rather than memory ran out or the process is to end."""
    if isinstance(error, Exception):
        return not isinstance(error, MemoryError)
    return type(error).__module__ == "pyo3_runtime"  # a panic in Rust is no Exception, and cannot be imported
