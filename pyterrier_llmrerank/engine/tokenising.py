"""Tokenise the chunks of a call, and name the pairs that cannot be tokenised or read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from torch import Tensor

from ..errors import reason
from .call import ScoringCall
from .decoder import Decoder
from .fallback import FallbackDecoder
from .inputs import Ids
from .usage import Stopwatch, Usage


class Limits(NamedTuple):
    """Holds the limits of the token ids of a pair.

    Args:
        vocabulary: the number of tokens that the model knows.
        positions: the most tokens in a pair; None for any number.
    """

    vocabulary: int
    positions: int | None = None

    @classmethod
    def of(cls, model: Decoder | FallbackDecoder) -> Limits:
        """Return the limits of a model."""
        if isinstance(model, FallbackDecoder):
            return cls(model.vocabulary, model.positions)
        return cls(len(cast(Tensor, model.embed_tokens.weight)))

    def problem(self, ids: Ids) -> str | None:
        """Say why the model cannot read a pair; None if it can.

        >>> Limits(vocabulary=8, positions=2).problem(Ids([1, 5], [7], []))
        'has 3 tokens, but the model has 2 positions; use fewer tokens per passage.'
        """
        if not ids.length:
            return "has no tokens, so there is nothing to score."
        if (largest := max(ids.flat())) >= self.vocabulary:
            return f"holds token {largest} of the tokenizer, but the model knows {self.vocabulary} tokens."
        if self.positions is not None and ids.length > self.positions:
            return (
                f"has {ids.length} tokens, but the model has {self.positions} positions; use fewer tokens per passage."
            )
        return None


class TokenizedPairs(NamedTuple):
    """Holds a chunk of pairs with their token ids.

    Args:
        pairs: their indices among all pairs.
        ids: their token ids.
    """

    pairs: list[int]
    ids: list[Ids]


class ChunkTokenizer:
    """Tokenises chunks of a call for one device.

    Args:
        encode: turns pairs of query and passage into token ids.
        limits: the ids that the model can read.
        call: the call; its observer receives the numbers of truncated texts.
    """

    def __init__(
        self, encode: Callable[[Sequence[tuple[str, str]]], list[Ids]], limits: Limits, call: ScoringCall
    ) -> None:
        self._encode = encode
        self._limits = limits
        self._call = call
        #: Measures the time spent on tokenisation.
        self.stopwatch = Stopwatch()

    def __call__(self, pairs: list[int]) -> TokenizedPairs:
        """Tokenise a chunk.

        Args:
            pairs: indices of the pairs.

        Raises:
            ScoringError: the tokenizer fails, or the model cannot read one of the pairs.
        """
        texts = [self._call.pairs[pair] for pair in pairs]
        with self.stopwatch:
            encoded = self._encode_or_name(pairs, texts)
            for pair, ids in zip(pairs, encoded, strict=True):
                if problem := self._limits.problem(ids):
                    raise self._call.error(f"{self._call.label(pair)} {problem}")
        queries = {query for (query, _), ids in zip(texts, encoded, strict=True) if ids.query_truncated}
        passages = sum(ids.passage_truncated for ids in encoded)
        self._call.observer.used(Usage(truncated_queries=len(queries), truncated_passages=passages))
        return TokenizedPairs(pairs, encoded)

    def _encode_or_name(self, pairs: list[int], texts: list[tuple[str, str]]) -> list[Ids]:
        """Return token ids, or raise a ScoringError that names the pair whose tokenisation fails."""
        try:
            return self._encode(texts)
        except BaseException as error:
            if not is_failure(error):
                raise
            failure = error
        at = f"{self._call.label(pairs[0])} and {len(pairs) - 1} more pairs together"  # unless one pair fails alone
        for pair, text in zip(pairs, texts, strict=True):
            try:
                self._encode([text])
            except BaseException as error:
                if not is_failure(error):
                    raise
                at, failure = self._call.label(pair), error
                break
        raise self._call.error(f"cannot tokenise {at}: {type(failure).__name__}: {reason(failure)}") from failure


def is_failure(error: BaseException) -> bool:
    """Return whether an error means that the tokenizer failed; Ctrl-C and running out of memory do not."""
    if isinstance(error, Exception):
        return not isinstance(error, MemoryError)
    return type(error).__module__ == "pyo3_runtime"  # a panic in Rust is not an Exception, and cannot be imported
