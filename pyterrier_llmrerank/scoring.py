"""Pairs to scores: ids, batches through the decoder, and the heads on what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .batching import TOKENS, Budget, chunks, run_in_batches
from .decoder import decode
from .errors import ScoringError
from .inputs import Ids, TokenizedOnce, Tokenizer
from .packing import Rows
from .plain import PlainDecoder
from .weights import Weights

#: Pairs whose ids are made, and which are sorted into batches, together; a query's pairs stay together beyond it.
CHUNK = 1024

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shape:
    """What is run of a model: how deep, how wide, and which heads read it.

    Args:
        cutoffs: layers at which a score is read, ascending.
        heads: the head that reads each, by its index.
        compress_layers, compress_ratio: as :func:`~pyterrier_llmrerank.decoder.decode`.
        pad_id: reproduce the released code's padding with this id; None for scores without padding.
    """

    cutoffs: tuple[int, ...]
    heads: tuple[int, ...]
    compress_layers: tuple[int, ...] = ()
    compress_ratio: int = 1
    pad_id: int | None = None


def score(
    weights: Weights,
    shape: Shape,
    pairs: Sequence[tuple[str, str]],
    encode: Callable[[Tokenizer, list[tuple[str, str]]], list[Ids]],
    *,
    batch_size: int | None,
    label: Callable[[int], str],
    progress: Callable[[int], object],
) -> np.ndarray:
    """Score every pair at every cutoff of the shape.

    Pairs are made into ids and scored a chunk at a time: the ids of one are made while the one before it is scored,
    and memory does not grow with their number.

    Args:
        weights: the model.
        shape: how much of it to run.
        pairs: query and passage of each.
        encode: makes ids of them.
        batch_size: pairs a batch; None for a token budget that fits the device.
        label: names a pair, for messages.
        progress: told how many pairs are done with each batch.

    Returns:
        fp32 logits as float64, ``[cutoffs, pairs]``.

    Raises:
        ScoringError: a score is not finite, or one pair alone does not fit in memory; carries the scores so far.
    """
    model, heads, tokenizer = weights.at_depth(shape.cutoffs[-1])
    heads = heads[list(shape.heads)]
    scores = np.full((len(shape.cutoffs), len(pairs)), np.nan)
    running: list[tuple[list[int], Tensor]] = []

    def collect(keep: int = 0) -> None:
        """Wait for batches until so many are left for the device to work on."""
        while len(running) > keep:
            batch, computed = running.pop(0)
            got = computed.cpu().numpy()
            finite = np.isfinite(got).all(axis=0)
            scores[:, np.array(batch)[finite]] = got[:, finite]
            if not finite.all():
                with suppress(ScoringError):
                    collect()
                raise ScoringError(
                    f"the score of {label(batch[int(finite.argmin())])} is not finite in {weights.dtype}; "
                    + ("try dtype='float32'." if weights.dtype != torch.float32 else "is the checkpoint sound?"),
                    scores,
                )
            progress(len(batch))

    @torch.inference_mode()
    def run(batch: list[int]) -> None:
        rows = Rows([ids[index] for index in batch], shape.pad_id)
        if isinstance(model, PlainDecoder):
            states = model(rows, shape.cutoffs)
        else:
            states = decode(
                model, rows, shape.cutoffs, compress_layers=shape.compress_layers, compress_ratio=shape.compress_ratio
            )
        computed = torch.einsum("cbw,cw->cb", states.float(), heads)
        running.append(([chunk[index] for index in batch], computed))
        collect(keep=1)

    remembering = TokenizedOnce(tokenizer)
    encoded = (
        (chunk, encode(remembering, [pairs[i] for i in chunk])) for chunk in chunks([q for q, _ in pairs], CHUNK)
    )
    budget = Budget(rows=batch_size) if batch_size else Budget(TOKENS.get(weights.device.type, TOKENS["cpu"]))
    for chunk, ids in _one_ahead(encoded):
        too_large = run_in_batches(ids, run, budget)
        if too_large is not None:
            collect()
            raise ScoringError(
                f"out of memory on {weights.device} with one pair alone: {label(chunk[too_large])}, "
                f"{ids[too_large].length} tokens; allow fewer tokens a passage, a smaller dtype, or a larger device.",
                scores,
            )
    collect()
    return scores


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, the next of which is always being made, in another thread, while one is worked on."""
    done = object()
    with ThreadPoolExecutor(1) as thread:
        coming: Future[Any] = thread.submit(next, items, done)
        while (item := coming.result()) is not done:
            coming = thread.submit(next, items, done)
            yield item
