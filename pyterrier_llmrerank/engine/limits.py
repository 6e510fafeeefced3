"""Check that a model can read a pair's token ids."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor

from .decoder import Decoder
from .fallback import FallbackDecoder
from .inputs import Ids


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
