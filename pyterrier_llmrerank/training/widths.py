"""The widths that training draws: the layers after which passages are pooled, and the ratio."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """Draws the width of each batch.

    Args:
        layers: layers after which passages may be pooled, each with probability one half.
        ratios: ratios to draw from.
        seed: the seed for drawing widths.
    """

    layers: tuple[int, ...] = ()
    ratios: tuple[int, ...] = (1,)
    seed: int = 42

    def draw(self, step: int, part: int) -> tuple[tuple[int, ...], int]:
        """Draw layers and ratio by the batch's place in the run, so that all processes draw the same.

        Args:
            step: the number of optimiser steps before this one.
            part: index of the batch in the step, which may accumulate several.
        """
        generator = random.Random(f"{self.seed}/{step}/{part}")
        return tuple(layer for layer in self.layers if generator.random() < 0.5), generator.choice(self.ratios)
