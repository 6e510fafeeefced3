"""Several depths of one Matroyshka reranker in a single pass: as features, or as pipelines of an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import pandas as pd
import pyterrier as pt

from .frames import sigmoid, warn_of_ties, with_ranks

if TYPE_CHECKING:
    from .matroyshka import MatroyshkaReranker

#: The paper on Matroyshka rerankers.
PAPER = "https://doi.org/10.1145/3696410.3714620"


class MatroyshkaFeatures(pt.Transformer):
    """Add one reranker's scores at several depths as features, computed in one pass.

    ``m.at(cutoff=8) ** m.at(cutoff=16)`` compiles to it.

    Args:
        rerankers: one for each feature, in order. They are equal except for their cutoff, a single layer or None.
    """

    schematic: ClassVar = {"label": "Matroyshka **", "help_url": PAPER}

    def __init__(self, rerankers: Sequence[MatroyshkaReranker]) -> None:
        self.rerankers = tuple(rerankers)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Add ``features``, an array of scores for each row, as the union of the rerankers would."""
        first = self.rerankers[0]
        if len(inp) == 0:
            features: Any = pd.Series(dtype=object)
            ranks = first.transform(inp)["rank"]
        else:
            for reranker in self.rerankers:
                reranker.scorer()  # keeps its layers in memory for the next frame
            layers = [reranker.cutoffs()[0] for reranker in self.rerankers]
            together = first.at(cutoff=layers, normalize=False)
            try:
                scored = together.transform(inp)
            finally:
                first.add_usage(together.usage)
            scores = [scored.get(f"score_{layer}", scored["score"]).to_numpy() for layer in layers]
            ranks = with_ranks(inp.assign(score=scores[0]))["rank"]
            columns = np.stack(scores, axis=1)
            features = list(sigmoid(columns) if first.normalize else columns)
        return inp.assign(**({} if "rank" in inp else {"rank": ranks}), features=features)

    def fuse_feature_union(self, other: pt.Transformer, is_left: bool) -> pt.Transformer | None:
        """Merge the union with another depth, or other depths, of the same reranker; None if that is impossible."""
        others = other.rerankers if isinstance(other, MatroyshkaFeatures) else (other,)
        rerankers = (*self.rerankers, *others) if is_left else (*others, *self.rerankers)
        return MatroyshkaFeatures(cast(Any, rerankers)) if self._are_depths(rerankers) else None

    def _are_depths(self, rerankers: Sequence[pt.Transformer]) -> bool:
        """Return whether one pass gives the scores of all rerankers."""
        first = self.rerankers[0]
        if first.released or first.prune:  # heads depend on all cutoffs, or some rows do not reach all depths
            return False
        return all(
            isinstance(reranker, type(first))
            and not isinstance(reranker.cutoff, tuple)
            and reranker.at(cutoff=None) == first.at(cutoff=None)
            for reranker in rerankers
        )

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Return {}: diagrams show the rerankers as one transformer."""
        return {}

    def __repr__(self) -> str:
        return f"MatroyshkaFeatures({list(self.rerankers)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MatroyshkaFeatures) and self.rerankers == other.rerankers

    def __hash__(self) -> int:
        return hash(self.rerankers)


class AtDepth(pt.Transformer):
    """Rank by the score at one of the cutoffs of a pass.

    Args:
        layer: the cutoff.
        cutoffs: all cutoffs of the pass; their columns are dropped.
        normalize: return the sigmoid of the score, after ranking by the score itself.
    """

    schematic: ClassVar = {"label": "at depth", "help_url": PAPER}

    def __init__(self, layer: int, cutoffs: Sequence[int], normalize: bool = False) -> None:
        self.layer = layer
        self.cutoffs = tuple(cutoffs)
        self.normalize = normalize
        self._has_warned = False

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score by ``score_<layer>``, rank, and drop the columns of all cutoffs.

        Raises:
            pyterrier.validate.InputValidationError: the column is missing.
        """
        name = f"score_{self.layer}"
        pt.validate.result_frame(inp, extra_columns=[name], context=self)
        logits = inp[name].to_numpy(dtype=float)
        scores = sigmoid(logits) if self.normalize else logits
        self._has_warned = self._has_warned or warn_of_ties(self, inp["qid"], scores, logits)
        own = inp.columns.intersection([f"score_{cutoff}" for cutoff in self.cutoffs])
        return with_ranks(inp.assign(score=scores).drop(columns=own), logits)

    def __repr__(self) -> str:
        return f"AtDepth({self.layer}, {self.cutoffs}{', normalize=True' if self.normalize else ''})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AtDepth) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, tuple[int, ...], bool]:
        return self.layer, self.cutoffs, self.normalize
