"""Several depths of one Matroyshka as features: a union that is one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
import pyterrier as pt

from .matroyshka import MatroyshkaReranker, sigmoid
from .reranker import ranked, warn_of_ties


class MatroyshkaFeatures(pt.Transformer):
    """The scores of one reranker at several depths as features, out of one pass.

    What ``m.at(cutoff=8) ** m.at(cutoff=16)`` compiles to.

    Args:
        rerankers: equal but for their cutoff, which is one layer or None; a feature each, in this order.
    """

    schematic: ClassVar = {"label": "Matroyshka **", "help_url": MatroyshkaReranker.schematic["help_url"]}

    def __init__(self, rerankers: Sequence[MatroyshkaReranker]) -> None:
        self.rerankers = tuple(rerankers)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Add ``features``, an array with a score a depth for each row, as the union of the re-rankers would."""
        first = self.rerankers[0]
        if len(inp) == 0:
            features: Any = pd.Series(dtype=object)
            ranks = first.transform(inp)["rank"]
        else:
            for reranker in self.rerankers:
                reranker._weights()  # keeps them, and as many layers as this one needs, for the next frame
            layers = [first._last_layer() if r.cutoff is None else cast(int, r.cutoff) for r in self.rerankers]
            together = first.at(cutoff=layers, normalize=False)
            try:
                scored = together.transform(inp)
            finally:
                first._add_up(together.usage)
            scores = [scored.get(f"score_{layer}", scored["score"]).to_numpy() for layer in layers]
            ranks = ranked(inp.assign(score=scores[0]))["rank"]
            features = list(first._finish(np.stack(scores, axis=1)))
        return inp.assign(**({} if "rank" in inp else {"rank": ranks}), features=features)

    def fuse_feature_union(self, other: pt.Transformer, is_left: bool) -> pt.Transformer | None:
        """Take in one more depth of the same reranker."""
        return fused(self, other) if is_left else fused(other, self)

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """None to draw: they are one."""
        return {}

    def __repr__(self) -> str:
        return f"MatroyshkaFeatures({list(self.rerankers)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MatroyshkaFeatures) and self.rerankers == other.rerankers

    def __hash__(self) -> int:
        return hash(self.rerankers)


class AtDepth(pt.Transformer):
    """One of the depths that a reranker read on its way, as the score.

    Args:
        layer: which of its cutoffs.
        cutoffs: all of them: their columns are dropped.
        normalize: give the sigmoid of what was read there, after ranking by it.
    """

    schematic: ClassVar = {"label": "at depth"}

    def __init__(self, layer: int, cutoffs: Sequence[int], normalize: bool = False) -> None:
        self.layer = layer
        self.cutoffs = tuple(cutoffs)
        self.normalize = normalize
        self._has_warned = False

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score by ``score_<layer>``, rank, and drop the columns of the cutoffs.

        Raises:
            pyterrier.validate.InputValidationError: that column is missing.
        """
        name = f"score_{self.layer}"
        pt.validate.result_frame(inp, extra_columns=[name], context=self)
        logits = inp[name].to_numpy(dtype=float)
        scores = sigmoid(logits) if self.normalize else logits
        self._has_warned = self._has_warned or warn_of_ties(self, inp["qid"], scores, logits)
        own = inp.columns.intersection([f"score_{cutoff}" for cutoff in self.cutoffs])
        return ranked(inp.assign(score=scores).drop(columns=own), logits)

    def __repr__(self) -> str:
        return f"AtDepth({self.layer}, {self.cutoffs}{', normalize=True' if self.normalize else ''})"

    def _arguments(self) -> tuple[int, tuple[int, ...], bool]:
        return self.layer, self.cutoffs, self.normalize

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AtDepth) and self._arguments() == other._arguments()

    def __hash__(self) -> int:
        return hash((AtDepth, self._arguments()))


def fused(left: pt.Transformer, right: pt.Transformer) -> MatroyshkaFeatures | None:
    """Both sides' depths in one pass, or None where they differ in more than depth."""
    rerankers: list[MatroyshkaReranker] = []
    for side in (left, right):
        if isinstance(side, MatroyshkaFeatures):
            rerankers += side.rerankers
        elif isinstance(side, MatroyshkaReranker) and not isinstance(side.cutoff, tuple):
            rerankers.append(side)
        else:
            return None
    if len({reranker.at(cutoff=None) for reranker in rerankers}) > 1 or rerankers[0].released or rerankers[0].prune:
        return None  # the released code reads other heads when asked for several depths; what was pruned has no depths
    return MatroyshkaFeatures(rerankers)
