"""Losses over groups of one positive and some negatives.

A group is a query with its passages, the positive first; scores come as ``[.., groups, size]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Distillation targets of the cascade, by the name of the method without its ``_teacher`` ending.
TARGETS = ("distill_final_layer", "distill_last_layer", "distill_fix_layer")

#: Every train method there is, under the names of the original program.
METHODS = ("normal", "distill", *TARGETS, *(f"{method}_teacher" for method in TARGETS))

#: ``distill_fix_layer`` takes a new target at every so many layers.
RENEWED_EVERY = 8


def cross_entropy(scores: Tensor, target: Tensor | None = None) -> Tensor:
    r"""Softmax cross-entropy over groups, :math:`-\sum_i t_i \log \mathrm{softmax}(s)_i`, averaged over them.

    RankLLaMA's loss (Ma et al., 2023), and the term that every layer adds in Matroyshka's.

    Args:
        scores: ``[groups, size]``.
        target: what they should be distributed like, ``[groups, size]``, summing to 1 in each group; None
            for all on the first, the positive.
    """
    log_probabilities = scores.log_softmax(-1)
    wanted = log_probabilities[:, 0] if target is None else (target * log_probabilities).sum(-1)
    return -wanted.mean()


@dataclass(frozen=True)
class CascadeLoss:
    """Matroyshka's loss over all layers, cascaded self-distillation included (Liu et al., 2025).

    From the deepest layer to the shallowest, each adds a cross-entropy against the positive; against the
    teacher's scores, where the method ends in ``_teacher``; and against the current target. Targets are
    the full pass's scores at a deeper layer: ``distill_final_layer`` keeps the deepest's,
    ``distill_last_layer`` takes the next deeper one's, ``distill_fix_layer`` renews its at every eighth.
    Without ``_teacher`` the deepest layer alone is distilled from the teacher's scores, if there are any.
    ``normal`` and ``distill`` are the cross-entropies against the positive alone;
    ``distill_final_layer_teacher`` has no target, as released.

    Args:
        method: one of :data:`METHODS`.

    Raises:
        ValueError: no such method.
    """

    method: str = "distill_fix_layer_teacher"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"train_method={self.method!r}; allowed: {', '.join(METHODS)}.")

    @property
    def needs_full_pass(self) -> bool:
        """Whether scores without compression are needed beside the student's."""
        return self.method.startswith(TARGETS)

    @property
    def needs_teacher(self) -> bool:
        """Whether the data must have a teacher's scores."""
        return self.method.endswith("_teacher")

    def __call__(self, student: Tensor, full: Tensor | None = None, teacher: Tensor | None = None) -> Tensor:
        """Sum the loss over the layers.

        Args:
            student: scores of the pass that learns, ``[layers, groups, size]``, shallowest layer first.
            full: scores without compression, likewise; only their values are used.
            teacher: another model's scores, ``[groups, size]``.

        Raises:
            ValueError: the method needs scores that are not given.
        """
        with_teacher = self.needs_teacher
        if with_teacher and teacher is None:
            raise ValueError(f"train_method={self.method!r} needs teacher scores; the data has none.")
        if self.needs_full_pass and full is None:
            raise ValueError(f"train_method={self.method!r} needs the scores of a full pass.")
        kind = self.method.removesuffix("_teacher")
        soft = None if teacher is None else teacher.to(student.dtype).softmax(-1)
        target: Tensor | None = None
        terms = []
        for step, layer in enumerate(reversed(range(len(student)))):
            scores = student[layer]
            terms.append(cross_entropy(scores))
            if not self.needs_full_pass:
                continue
            if soft is not None and (with_teacher or step == 0):
                terms.append(cross_entropy(scores, soft))
            if target is not None:
                terms.append(cross_entropy(scores, target))
            if self._renews(kind, step, with_teacher):
                assert full is not None
                target = full[layer].detach().softmax(-1)
        return torch.stack(terms).sum()

    @staticmethod
    def _renews(kind: str, step: int, with_teacher: bool) -> bool:
        """Whether the layer at this step, counted from the deepest, sets the target for those above it."""
        if kind == "distill_final_layer":
            return step == 0 and not with_teacher
        return kind == "distill_last_layer" or step % RENEWED_EVERY == 0
