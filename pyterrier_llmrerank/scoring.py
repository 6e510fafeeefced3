"""Ids to scores: batches through the decoder, and the heads on what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .batching import TOKENS, run_in_batches
from .compression import Spans
from .decoder import decode
from .errors import ScoringError
from .inputs import Ids
from .weights import Weights


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
    ids: Sequence[Ids],
    *,
    batch_size: int | None,
    label: Callable[[int], str],
    progress: Callable[[int], object],
) -> np.ndarray:
    """Score every pair at every cutoff of the shape.

    Args:
        weights: the model.
        shape: how much of it to run.
        ids: the pairs.
        batch_size: rows a batch; None for a token budget that fits the device.
        label: names a pair, for messages.
        progress: told how many pairs are done with each batch.

    Returns:
        fp32 logits as float64, ``[cutoffs, pairs]``.

    Raises:
        ScoringError: a score is not finite, or one pair alone does not fit in memory; carries the scores so far.
    """
    model, heads, _ = weights.at_depth(shape.cutoffs[-1])
    heads = heads[list(shape.heads)]
    scores = np.full((len(shape.cutoffs), len(ids)), np.nan)
    # The released code pads each row to a multiple of 8.
    lengths = [pair.length if shape.pad_id is None else -(-pair.length // 8) * 8 for pair in ids]

    @torch.inference_mode()
    def run(batch: list[int]) -> None:
        length = lengths[batch[0]]  # the longest stands first
        rows = [ids[index] for index in batch]
        padding = shape.pad_id or 0
        states = decode(
            model,
            torch.tensor([row.flat() + [padding] * (length - row.length) for row in rows], device=weights.device),
            spans_of(rows),
            shape.cutoffs,
            compress_layers=shape.compress_layers,
            compress_ratio=shape.compress_ratio,
            padded=None if shape.pad_id is None else [lengths[index] for index in batch],
        )
        got = torch.einsum("cbw,cw->cb", states.float(), heads).cpu().numpy()
        finite = np.isfinite(got).all(axis=0)
        scores[:, np.array(batch)[finite]] = got[:, finite]
        if not finite.all():
            raise ScoringError(
                f"the score of {label(batch[int(finite.argmin())])} is not finite in {weights.dtype}; "
                + ("try dtype='float32'." if weights.dtype != torch.float32 else "is the checkpoint sound?"),
                scores,
            )
        progress(len(batch))

    too_large = run_in_batches(
        lengths, run, tokens=None if batch_size else TOKENS.get(weights.device.type, TOKENS["cpu"]), rows=batch_size
    )
    if too_large is not None:
        raise ScoringError(
            f"out of memory on {weights.device} with one pair alone: {label(too_large)}, {lengths[too_large]} tokens; "
            "allow fewer tokens a passage, a smaller dtype, or a larger device.",
            scores,
        )
    return scores


def spans_of(rows: Sequence[Ids]) -> Spans:
    """How the rows of a batch are made up."""
    return Spans([len(row.prefix) for row in rows], [len(row.body) for row in rows], [len(row.suffix) for row in rows])
