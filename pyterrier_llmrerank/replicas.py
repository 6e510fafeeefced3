"""The weights of a reranker on each of its devices, shared with all rerankers that name the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch

from .checkpoints.identity import identity
from .engine.weights import Consumer, Weights, shared_weights

#: The device, dtype, quantization and compilation of one copy.
Setting = tuple[torch.device, torch.dtype, str | None, bool]


class Replicas:
    """Finds one copy of the weights for each device. Opens no file before it is needed.

    Args:
        openers: a call that opens the checkpoint, and perhaps a second that opens it with a token adapter over it.
            Equal calls mean equal weights, as long as the files stay the same.
        settings: the settings of each copy.
    """

    def __init__(self, openers: Sequence[partial[Any]], settings: Sequence[Setting]) -> None:
        self._openers = [(opener.func, identity(opener.args, opener.args[0]), opener) for opener in openers]
        self._settings = settings
        #: Equal for replicas of equal weights in equal settings.
        self.key = tuple((*named, *setting) for setting in settings for *named, _ in self._openers)

    @cached_property
    def weights(self) -> tuple[Weights, ...]:
        """The weights on each device."""
        return tuple(map(self._copy, self._settings))

    def _copy(self, setting: Setting) -> Weights:
        weights: Weights | None = None
        for *named, opener in self._openers:
            create = partial(Weights, opener, *setting, below=weights)
            weights = shared_weights((*named, *setting), create)
        assert weights is not None
        return weights

    def join(self, consumer: Consumer, earlier: Replicas | None) -> None:
        """Keep the weights that a reranker needs in memory, and drop earlier ones."""
        kept = self._stacks()
        for weights in kept:  # joined first, so that layers in both are not dropped
            weights.join(consumer)
        for weights in [] if earlier is None else earlier._stacks():
            if weights not in kept:
                weights.leave(consumer)

    def leave(self, consumer: Consumer) -> None:
        """Drop the weights that only this reranker needs."""
        for weights in self._stacks():
            weights.leave(consumer)

    def _stacks(self) -> list[Weights]:
        """Return the weights on all devices, each token adapter with the weights below it."""
        return [weights for replica in self.weights for weights in replica.stack]
