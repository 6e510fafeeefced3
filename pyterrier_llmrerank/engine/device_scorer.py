"""Score chunks of a call on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import ScoringError, reason
from .attention import PrefixCache
from .attention_kernels import Kernel, kernel_of, packed_flash
from .batching import Budget, run_in_batches
from .call import ScoringCall, Stopped
from .cascade import Cascade
from .decoder import Decoder, embedded, run_layers
from .fallback import FallbackDecoder
from .inputs import Ids
from .length_groups import STEP
from .packing import PackedPairs, Packing, Row, regrouped
from .pending import PendingResults
from .prefetch import prefetch
from .shape import Shape
from .tokenising import ChunkTokenizer, Limits, TokenizedPairs
from .usage import Stopwatch, Usage
from .weights import Weights


@dataclass
class Stage:
    """Holds the pairs of a chunk between two points where a cascade drops candidates.

    Args:
        cutoffs: layers of the stage at which scores are read.
        is_last: whether no stage follows.
        alive: positions in the chunk of the pairs that take part.
        states_before: each pair's hidden states before the stage, by position in the chunk: a row, and the pair's index
            in it. Empty for the first stage.
        states_after: the same after the stage; each batch adds its own. Empty for the last stage.
        prefix: the prefix at the end of the latest batch; the next batch may begin with it.
    """

    cutoffs: tuple[int, ...]
    is_last: bool
    alive: list[int]
    states_before: dict[int, tuple[Row, int]]
    states_after: dict[int, tuple[Row, int]] = field(default_factory=dict)
    prefix: PrefixCache | None = None


class DeviceScorer:
    """Takes chunks from a call, scores them on one device, and writes their scores into the call.

    It holds the token ids of two chunks at most: it tokenises the next one, in a thread, while it scores one.

    Args:
        weights: the weights on the device.
        shape: the part of the model that is run.
        encode: turns pairs of query and passage into token ids.
        batch_size: pairs per batch; None for a token budget that fits the device.
        call: the call, which hands out chunks and takes their scores.

    Raises:
        ValueError, ImportError: the attention kernel, a cutoff or the padding cannot be used with this model.
    """

    def __init__(
        self,
        weights: Weights,
        shape: Shape,
        encode: Callable[[PreTrainedTokenizerBase, Sequence[tuple[str, str]]], list[Ids]],
        batch_size: int | None,
        call: ScoringCall,
    ) -> None:
        self.call = call
        self._weights, self._shape = weights, shape
        config: Any = weights.checkpoint.config
        width = int(config.hidden_size)
        self._kernel: Kernel | None = None
        if weights.checkpoint.supports_layerwise:
            head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
            self._kernel = kernel_of(shape.attn_implementation, weights.device, weights.dtype, head_width)
        self._model, heads, tokenizer = weights.at_depth(shape.cutoffs[-1])
        if isinstance(self._model, FallbackDecoder):
            self._model.check_cutoffs(shape.cutoffs)
        self._heads = torch.stack([heads[index] for index in shape.heads])  # a list of indices would be copied
        self._budget = Budget(pairs=batch_size) if batch_size else Budget.of_device(weights.device, width)
        limits = Limits.of(self._model)
        if shape.pad_id is not None and shape.pad_id >= limits.vocabulary:
            raise ValueError(
                f"released=True: the tokenizer pads with token {shape.pad_id}, but the model knows {limits.vocabulary} "
                "tokens; allowed: False."
            )
        self._tokenize = ChunkTokenizer(partial(encode, tokenizer), limits, call)
        self._results = PendingResults(call, weights.dtype)
        self._latest: list[int] = []  # pairs of the latest batch

    def run(self) -> None:
        """Score chunks until there are none left or another device fails.

        Raises:
            ScoringError, KeyboardInterrupt: as :meth:`~pyterrier_llmrerank.engine.scoring.Scorer.score`; the other
                devices are told to stop.
        """
        device = self._weights.device
        with (  # torch keeps both per thread
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
            torch.autocast(device.type, enabled=False),
        ):
            begun, waiting = time.perf_counter(), Stopwatch()
            try:
                for chunk in prefetch(map(self._tokenize, iter(self.call.next_chunk, None)), waiting):
                    self._score_chunk(chunk)
                self._results.collect()
            except BaseException as error:
                self.call.stopped.set()
                with suppress(Exception):  # there is an error already
                    self._results.collect()
                if not isinstance(error, Stopped):
                    self._raise(error)
            finally:
                seconds = time.perf_counter() - begun - waiting.seconds
                tokenising = self._tokenize.stopwatch.seconds
                self.call.observer.used(Usage(tokenising_seconds=tokenising, model_seconds=seconds))

    def _raise(self, error: BaseException) -> NoReturn:
        """Re-raise our own errors; wrap any other in a ScoringError that names the latest batch."""
        if isinstance(error, ScoringError) or not isinstance(error, Exception):
            raise error
        if isinstance(error, MemoryError):
            message = "out of memory outside the model; rerank fewer queries at a time."
        else:
            pairs = self._latest
            others = f" or one of {len(pairs) - 1} other pairs in its batch" if len(pairs) > 1 else ""
            at = f" at {self.call.label(pairs[0])}{others}" if pairs else ""
            message = f"scoring failed on {self._weights.device}{at}: {type(error).__name__}: {reason(error)}"
        raise self.call.error(message) from error

    def _score_chunk(self, chunk: TokenizedPairs) -> None:
        """Take a chunk through all stages."""
        alive, states = list(range(len(chunk.pairs))), dict[int, tuple[Row, int]]()
        for cutoffs in self._shape.stages:
            stage = Stage(cutoffs, cutoffs[-1] == self._shape.cutoffs[-1], alive, states)
            ids = [chunk.ids[index] for index in alive]
            too_large = run_in_batches(ids, partial(self._run_batch, chunk, stage), self._budget)
            if too_large is not None:
                self._results.collect()
                raise self.call.error(
                    f"out of memory on {self._weights.device} with one pair alone: "
                    f"{self.call.label(chunk.pairs[alive[too_large]])}, {ids[too_large].length} tokens; "
                    "use fewer tokens per passage, a 16-bit dtype, or a device with more memory."
                )
            if not stage.is_last and self.call.cascade is not None:
                alive = self._survivors(chunk, stage, self.call.cascade)
            states = {index: stage.states_after[index] for index in alive if index in stage.states_after}

    @torch.inference_mode()
    def _run_batch(self, chunk: TokenizedPairs, stage: Stage, batch: list[int]) -> None:
        """Start a batch, given by positions in ``stage.alive``, and wait for the batch before it."""
        if self.call.stopped.is_set():
            raise Stopped
        members = [stage.alive[position] for position in batch]
        pairs = self._latest = [chunk.pairs[member] for member in members]
        ids = [chunk.ids[member] for member in members]
        if isinstance(self._model, FallbackDecoder):
            states = self._fallback_states(self._model, ids, stage)
        else:
            states = self._decoder_states(self._model, members, ids, stage)
        first = self._shape.cutoffs.index(stage.cutoffs[0])
        cutoffs = slice(first, first + len(stage.cutoffs))
        logits = torch.einsum("cbw,cw->cb", states.float(), self._heads[cutoffs])
        self._results.add(pairs, cutoffs, logits)
        self._results.collect(leave=1)

    def _fallback_states(self, model: FallbackDecoder, ids: list[Ids], stage: Stage) -> Tensor:
        """Run a model by its own forward."""
        packed = PackedPairs(ids)
        states: Tensor = model(packed, stage.cutoffs)
        self._count(packed, int(packed.real.sum()), len(packed) * packed.longest)
        return states

    def _decoder_states(self, model: Decoder, members: list[int], ids: list[Ids], stage: Stage) -> Tensor:
        """Run a stage's layers on the hidden states of the stage before."""
        known = None if stage.prefix is None else stage.prefix.ids
        if stage.states_before:
            row = regrouped([stage.states_before[member] for member in members], ids, known)
        else:
            row = embedded(model, PackedPairs(ids, self._shape.pad_id, known))
            positions = attended_positions(row.packing, self._weights.device, self._kernel)
            self._count(row.packing, len(row.states), positions)
        last_prefix = stage.prefix if row.packing.owner[-1] < 0 else PrefixCache(ids[-1].prefix)
        states, row = run_layers(
            model, row, stage.cutoffs,
            compress_layers=self._shape.compress_layers, compress_ratio=self._shape.compress_ratio,
            resumable=not stage.is_last, kernel=self._kernel, reuse_prefix=stage.prefix, save_prefix=last_prefix,
        )  # fmt: skip
        stage.prefix = last_prefix
        if not stage.is_last:
            stage.states_after |= {member: (row, place) for place, member in enumerate(members)}
        return states

    def _count(self, packing: Packing, tokens: int, positions: int) -> None:
        """Report the tokens and positions of a batch that enters the first layer."""
        self.call.observer.used(Usage(tokens=tokens, positions=positions, filled=int(packing.real.sum())))

    def _survivors(self, chunk: TokenizedPairs, stage: Stage, cascade: Cascade) -> list[int]:
        """Return the positions in the chunk of the pairs that survive a stage."""
        self._results.collect()
        layer = stage.cutoffs[-1]
        members = {chunk.pairs[member]: member for member in stage.alive}
        survivors = cascade.survivors(layer, list(members), self.call.scores[self._shape.cutoffs.index(layer)])
        self.call.progress(len(members) - len(survivors))
        return [members[pair] for pair in survivors]


def attended_positions(packing: Packing, device: torch.device, kernel: Kernel | None) -> int:
    """Count the positions over which attention runs in a :class:`~pyterrier_llmrerank.engine.attention.Layout`.

    Args:
        packing: the pairs.
        device: the device of the hidden states.
        kernel: the kernel for pairs without padding; None for SDPA.
    """
    if packing.padding.any():
        kernel = None  # SDPA takes masks
    if kernel is cast(Kernel, packed_flash):
        return int(packing.lengths.sum())
    if kernel is None and device.type == "cpu":  # in groups
        return int((-(-packing.lengths // STEP) * STEP).sum())
    return len(packing) * packing.longest
