"""The widths at which a model is trained."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """The widths at which a model is trained: each step draws one.

    Args:
        layers: before each of these, the step pools or not, with equal odds.
        ratios: the step's ratio is one of these.
        seed: of the draw.
    """

    layers: tuple[int, ...] = ()
    ratios: tuple[int, ...] = (1,)
    seed: int = 42

    def draw(self, step: int, part: int) -> tuple[tuple[int, ...], int]:
        """Layers and ratio of one batch, as a function of its place in the run: the same in every process.

        Args:
            step: optimizer steps done before.
            part: which of the batches that are accumulated into this step.
        """
        generator = random.Random(f"{self.seed}/{step}/{part}")
        return tuple(layer for layer in self.layers if generator.random() < 0.5), generator.choice(self.ratios)
