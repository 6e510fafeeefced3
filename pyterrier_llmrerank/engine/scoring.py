"""Pairs to scores: ids, batches through the decoder, and the heads on what comes out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import ScoringError, reason
from .attention import PrefixCache
from .batching import Budget, query_chunks, run_in_batches
from .cascade import Cascade
from .decoder import Decoder, embedded, run_layers
from .fallback import FallbackDecoder
from .inputs import Ids
from .kernels import kernel_of
from .packing import PackedPairs, Packing, Row, regrouped
from .usage import Stopwatch, Usage
from .weights import Weights

#: Pairs whose ids are made, and which are sorted into batches, together; a query's pairs stay together beyond it.
CHUNK = 1024

#: The same where candidates leave on the way: the states of all of them are held until it is known which go on.
CASCADE_CHUNK = 256

#: Several devices have at least so many chunks each to take, where there are queries enough, so that none waits long.
SHARES = 4

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Shape:
    """What is run of a model: how deep, how wide, and which heads read it.

    Args:
        cutoffs: layers at which a score is read, ascending.
        heads: the head that reads each, by its index.
        compress_layers, compress_ratio: as :func:`~pyterrier_llmrerank.engine.decoder.decode`.
        pad_id: reproduce the released code's padding with this id; None for scores without padding.
        prune: those of the cutoffs after which candidates leave, and how many of each query go on.
        attn_implementation: the kernel of attention, as :func:`~pyterrier_llmrerank.engine.kernels.kernel_of`.
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
        """The cutoffs, cut after each where candidates leave."""
        leave = [layer for layer, _ in self.prune]
        bounds = zip([0, *leave], [*leave, self.cutoffs[-1]], strict=True)
        return [tuple(cutoff for cutoff in self.cutoffs if above < cutoff <= last) for above, last in bounds]


class Stopped(Exception):  # noqa: N818
    """Raised between two batches where another device cannot go on."""


def score(
    replicas: Sequence[Weights],
    shape: Shape,
    pairs: Sequence[tuple[str, str]],
    encode: Callable[[PreTrainedTokenizerBase, list[tuple[str, str]]], list[Ids]],
    *,
    batch_size: int | None,
    label: Callable[[int], str],
    progress: Callable[[int], object],
    used: Callable[[Usage], object],
    cascade: Cascade | None = None,
) -> np.ndarray:
    """Score every pair at every cutoff of the shape, or as far as it goes.

    Pairs are made into ids and scored a chunk of whole queries at a time. Each device takes the next chunk when it is
    through with one, so that a faster one takes more; the first works in this thread, others in threads of their own.

    Args:
        replicas: the model, once for each device.
        shape: how much of it to run.
        pairs: query and passage of each.
        encode: makes ids of them.
        batch_size: pairs a batch; None for a token budget that fits the device.
        label: names a pair, for messages.
        progress: told how many pairs are done with each batch; one thread at a time.
        used: told what it takes, in parts that add up, also where scoring has to stop; by any thread.
        cascade: which pairs go on where the shape prunes. Survivors' states go on from where they are.

    Returns:
        fp32 logits as float64, ``[cutoffs, pairs]``; NaN where a pair did not come so far.

    Raises:
        ValueError, ImportError: attention cannot be computed, or a cutoff read, as the shape says.
        ScoringError: a pair has no tokens, tokens that the model does not know, or more than it has positions, which
            shows before its chunk is scored; a score is not finite; memory runs out, with one pair alone or between
            batches; or whatever else goes wrong. The other devices stop after their batch; carries all scores so far.
        KeyboardInterrupt: Ctrl-C; likewise, as ``scores``.
    """
    for weights in replicas:  # one after the other: transformers builds models under settings of the whole process
        kernel_of(shape.attn_implementation, weights.device, weights.dtype)
        model, _, _ = weights.at_depth(shape.cutoffs[-1])
        if isinstance(model, FallbackDecoder):
            model.check_cutoffs(shape.cutoffs)
    scores = np.full((len(shape.cutoffs), len(pairs)), np.nan)
    size = CHUNK if len(shape.stages) == 1 else CASCADE_CHUNK
    if len(replicas) > 1:
        size = min(size, -(-len(pairs) // (SHARES * len(replicas))))
    parts = deque(query_chunks([query for query, _ in pairs], max(size, batch_size or 0)))
    stopped, lock = threading.Event(), threading.Lock()

    def next_part() -> list[int] | None:
        with lock:
            return parts.popleft() if parts and not stopped.is_set() else None

    def locked_progress(count: int) -> None:
        with lock:
            progress(count)

    def work(weights: Weights) -> None:
        cuda = weights.device.type == "cuda"
        try:
            with torch.cuda.device(weights.device) if cuda else nullcontext():  # a setting of each thread
                _score_on(
                    weights, shape, pairs, iter(next_part, None), scores, encode, stopped.is_set,
                    batch_size=batch_size, label=label, progress=locked_progress, used=used, cascade=cascade,
                )  # fmt: skip
        except BaseException:
            stopped.set()
            raise

    try:
        with ThreadPoolExecutor(len(replicas)) as threads:  # each begins with what it is first given
            try:
                others = [threads.submit(work, weights) for weights in replicas[1:]]
                work(replicas[0])
                for other in others:
                    other.result()
            finally:
                stopped.set()
    except KeyboardInterrupt as error:
        error.scores = scores  # type: ignore[attr-defined]
        raise
    finally:
        used(Usage(pairs=int(np.isfinite(scores[0]).sum())))
    return scores


def _score_on(
    weights: Weights,
    shape: Shape,
    pairs: Sequence[tuple[str, str]],
    parts: Iterator[list[int]],
    scores: np.ndarray,
    encode: Callable[[PreTrainedTokenizerBase, list[tuple[str, str]]], list[Ids]],
    is_stopped: Callable[[], bool],
    *,
    batch_size: int | None,
    label: Callable[[int], str],
    progress: Callable[[int], object],
    used: Callable[[Usage], object],
    cascade: Cascade | None,
) -> None:
    """One device's work in :func:`score`: write into ``scores`` those of the parts, indices of pairs, that it gets.

    No more ids are held than those of two parts; those of the next are made while one is scored. A text is tokenised
    once a part. When ``is_stopped``, no batch is begun any more, and what was begun is still written.
    """
    kernel = kernel_of(shape.attn_implementation, weights.device, weights.dtype)
    model, heads, tokenizer = weights.at_depth(shape.cutoffs[-1])
    heads = heads[list(shape.heads)]
    stages = shape.stages
    known = _known(model)
    in_work: list[tuple[list[int], slice, Callable[[], np.ndarray]]] = []
    running: list[int] = []  # the pairs of the batch that was begun last
    prefix: PrefixCache | None = None  # that with which the last batch ended: the next may begin with it

    def collect(leave: int = 0) -> None:
        """Wait for batches until so many are left for the device to work on."""
        while len(in_work) > leave:
            batch, read, result = in_work[0]
            got = result()  # what fails here is asked for again
            del in_work[0]
            finite = np.isfinite(got).all(axis=0)
            scores[read, np.array(batch)[finite]] = got[:, finite]
            if not finite.all():
                with suppress(ScoringError):
                    collect()
                raise ScoringError(
                    f"the score of {label(batch[int(finite.argmin())])} is not finite in {weights.dtype}; "
                    + ("try dtype='float32'." if weights.dtype != torch.float32 else "is the checkpoint sound?"),
                    scores,
                )
            if read.stop == len(scores):
                progress(len(batch))

    @torch.inference_mode()
    def run(stage: int, going: list[int], batch: list[int]) -> None:
        """Take pairs through a stage: ``batch`` says which of those of the chunk that are ``going``."""
        nonlocal prefix, running
        if is_stopped():
            raise Stopped
        members = [going[index] for index in batch]
        running = [chunk[member] for member in members]
        pairs_ids = [ids[member] for member in members]
        cutoffs = stages[stage]
        packing: Packing
        if isinstance(model, FallbackDecoder):
            packed = PackedPairs(pairs_ids)
            states = model(packed, cutoffs)
            packing, tokens = packed, int(packed.real.sum())
        else:
            known = None if prefix is None else prefix.ids
            if stage == 0:
                row = embedded(model, PackedPairs(pairs_ids, shape.pad_id, known))
            else:
                row = regrouped([held[stage - 1, member] for member in members], pairs_ids, known)
            packing, tokens = row.packing, len(row.states)
            on = stage + 1 < len(stages)
            leaves = prefix if row.packing.owner[-1] < 0 else PrefixCache(pairs_ids[-1].prefix)
            states, row = run_layers(
                model, row, cutoffs, compress_layers=shape.compress_layers, compress_ratio=shape.compress_ratio,
                resumable=on, kernel=kernel, reuse_prefix=prefix, save_prefix=leaves,
            )  # fmt: skip
            prefix = leaves
            if on:
                held.update({(stage, member): (row, number) for number, member in enumerate(members)})
        if stage == 0:
            positions = len(packing) * packing.longest
            used(Usage(tokens=tokens, positions=positions, filled=int(packing.real.sum())))
        first = shape.cutoffs.index(cutoffs[0])
        read = slice(first, first + len(cutoffs))
        computed = torch.einsum("cbw,cw->cb", states.float(), heads[read])
        in_work.append((running, read, _brought_back(computed)))
        collect(leave=1)

    def leave(stage: int, going: list[int]) -> list[int]:
        """Those of the chunk that still go on after a stage."""
        if cascade is None or stage + 1 == len(stages):
            return going
        collect()
        layer = stages[stage][-1]
        of_chunk = {chunk[member]: member for member in going}
        stay = cascade.survivors(layer, list(of_chunk), scores[shape.cutoffs.index(layer)])
        progress(len(going) - len(stay))
        members = [of_chunk[pair] for pair in stay]
        for key in held.keys() - {(stage, member) for member in members}:
            del held[key]
        return members

    budget = Budget(pairs=batch_size) if batch_size else Budget.of_device(weights.device)
    begun, tokenising, waiting = time.perf_counter(), Stopwatch(), Stopwatch()

    def encoded(part: list[int]) -> tuple[list[int], list[Ids]]:
        with tokenising:
            made = _encoded(partial(encode, tokenizer), [pairs[i] for i in part], lambda i: label(part[i]), scores)
            for index, pair in zip(part, made, strict=True):
                if problem := problem_of_ids(pair, *known):
                    raise ScoringError(f"{label(index)} {problem}", scores)
        truncated = {pairs[i][0] for i, ids in zip(part, made, strict=True) if ids.query_truncated}
        used(Usage(truncated_queries=len(truncated), truncated_passages=sum(ids.passage_truncated for ids in made)))
        return part, made

    try:
        for chunk, ids in _one_ahead(encoded, parts, waiting):
            going = list(range(len(chunk)))
            held: dict[tuple[int, int], tuple[Row, int]] = {}  # where each pair's states are, after each stage
            for stage in range(len(stages)):
                prefix = None  # of each stage anew: its layers are others
                too_large = run_in_batches([ids[member] for member in going], partial(run, stage, going), budget)
                if too_large is not None:
                    collect()
                    member = going[too_large]
                    raise ScoringError(
                        f"out of memory on {weights.device} with one pair alone: {label(chunk[member])}, "
                        f"{ids[member].length} tokens; "
                        "allow fewer tokens a passage, a smaller dtype, or a larger device.",
                        scores,
                    )
                going = leave(stage, going)
        collect()
    except BaseException as error:
        with suppress(Exception):  # there is one already
            collect()
        if isinstance(error, Stopped):
            return
        if isinstance(error, ScoringError) or not isinstance(error, Exception):
            raise
        if isinstance(error, MemoryError):
            said = "out of memory between two batches; rerank fewer queries at a time."
        else:
            others = f" or one of {len(running) - 1} more pairs in its batch" if len(running) > 1 else ""
            at = f" at {label(running[0])}{others}" if running else ""
            said = f"scoring failed on {weights.device}{at}: {type(error).__name__}: {reason(error)}"
        raise ScoringError(said, scores) from error
    finally:
        model_seconds = time.perf_counter() - begun - waiting.seconds
        used(Usage(tokenising_seconds=tokenising.seconds, model_seconds=model_seconds))


def _encoded(
    encode: Callable[[list[tuple[str, str]]], list[Ids]],
    pairs: list[tuple[str, str]],
    label: Callable[[int], str],
    scores: np.ndarray,
) -> list[Ids]:
    """The ids of pairs; ScoringError where there are none, with the name of the pair that is the cause."""
    try:
        return encode(pairs)
    except (MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a tokenizer that panics raises no Exception
        failed = error
    at = f"{label(0)} and {len(pairs) - 1} more pairs together"  # unless one of them fails alone
    for number, pair in enumerate(pairs):
        try:
            encode([pair])
        except (MemoryError, KeyboardInterrupt):
            raise
        except BaseException as error:
            at, failed = label(number), error
            break
    raise ScoringError(f"cannot tokenise {at}: {type(failed).__name__}: {reason(failed)}", scores) from failed


def _known(model: Decoder | FallbackDecoder) -> tuple[int, int | None]:
    """How many tokens a model knows, and how many positions; None for any number."""
    if isinstance(model, FallbackDecoder):
        return model.vocabulary, model.positions
    return len(cast(Tensor, model.embed_tokens.weight)), None


def problem_of_ids(ids: Ids, vocabulary: int, positions: int | None) -> str | None:
    """What is wrong with a pair's ids, or None.

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


def _brought_back(computed: Tensor) -> Callable[[], np.ndarray]:
    """Begin to copy a result to the host; the call waits until it is there, not for what a GPU was given after it."""
    if computed.device.type != "cuda":
        return lambda: computed.cpu().numpy()
    copy = computed.to("cpu", non_blocking=True)
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record()

    def result() -> np.ndarray:
        there.synchronize()
        return copy.numpy()

    return result


def _one_ahead(make: Callable[[Item], Made], items: Iterable[Item], waiting: Stopwatch) -> Iterator[Made]:
    """What is made of each of some items; that of the next is being made, in a thread, while one is worked on."""
    thread = ThreadPoolExecutor(1)  # begins with what it is first given
    made: list[Made] = []
    try:
        for item in items:
            coming = thread.submit(make, item) if made else None
            yield from made
            with waiting:
                made = [coming.result() if coming else make(item)]
        yield from made
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
