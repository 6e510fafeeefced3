"""Losses over groups of one positive and some negatives.

A group is a query with its passages, the positive first; scores come as ``[.., groups, size]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import kl_div

#: Distillation targets of the cascade, by the name of the method without its ``_teacher`` ending.
TARGETS = ("distill_final_layer", "distill_last_layer", "distill_fix_layer")

#: Every train method there is, under the names of the original program.
METHODS = ("normal", "distill", *TARGETS, *(f"{method}_teacher" for method in TARGETS))

#: ``distill_fix_layer`` takes a new target at every so many layers.
RENEWED_EVERY = 8


class Loss(Protocol):
    """A loss over the scores of all heads."""

    @property
    def needs_full_pass(self) -> bool:
        """Whether scores without compression are needed beside the student's."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the data must have a teacher's scores."""

    def __call__(self, student: Tensor, full: Tensor | None = None, teacher: Tensor | None = None) -> Tensor:
        """Compute the loss of ``[layers, groups, size]`` scores."""


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


def likely_positives(teacher: Tensor, margin: float | None) -> Tensor | None:
    """Mark the negatives that the teacher scores above their positive less a margin, ``[groups, size]``.

    Collections judge few passages a query, so that many of these are positives that nobody judged. This is the
    ``absolute_margin`` of sentence-transformers' hard negatives.

    Args:
        teacher: the teacher's scores, ``[groups, size]``, the positive first.
        margin: the least distance between a positive and a negative; None to mark nothing.

    Returns:
        A mask, or None where nothing is to be marked.
    """
    if margin is None:
        return None
    likely = teacher > teacher[:, :1] - margin
    likely[:, 0] = False
    return likely


def without(scores: Tensor, left_out: Tensor | None) -> Tensor:
    """Scores that a softmax does not see where ``left_out`` is true."""
    return scores if left_out is None else scores.masked_fill(left_out, -torch.inf)


@dataclass(frozen=True)
class DistilledLoss:
    r"""RankLLaMA's cross-entropy over groups, and its distance from a teacher's scores.

    :math:`\mathrm{CE}(s) + w \, \mathrm{KL}(\mathrm{softmax}(t / \tau) \,\|\, \mathrm{softmax}(s))`, averaged over
    groups, where :math:`s` are the scores, :math:`t` the teacher's, :math:`w` ``teacher_weight`` and :math:`\tau`
    ``teacher_temperature``.

    Args:
        teacher_weight: 0 for the cross-entropy alone, which is the original loss (Ma et al., 2023).
        teacher_temperature: the teacher's scores are divided by it; above 1 they differ less.
        absolute_margin: leave negatives out of the cross-entropy whose teacher score is above the positive's less this
            margin; None to keep all.
    """

    teacher_weight: float = 0.0
    teacher_temperature: float = 1.0
    absolute_margin: float | None = None

    #: There is one width to train, the full one.
    needs_full_pass: ClassVar[bool] = False

    @property
    def needs_teacher(self) -> bool:
        """Whether the data must have a teacher's scores."""
        return self.teacher_weight > 0 or self.absolute_margin is not None

    def __call__(self, student: Tensor, full: Tensor | None = None, teacher: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            student: scores, ``[1, groups, size]``.
            full: not used.
            teacher: the teacher's scores, ``[groups, size]``.

        Raises:
            ValueError: a teacher's scores are needed and not given.
        """
        scores = student[0]
        if not self.needs_teacher:
            return cross_entropy(scores)
        if teacher is None:
            raise ValueError(
                f"teacher_weight={self.teacher_weight:g}, absolute_margin={self.absolute_margin}: the data has no "
                "teacher scores."
            )
        teacher = teacher.to(scores.dtype)
        loss = cross_entropy(without(scores, likely_positives(teacher, self.absolute_margin)))
        if self.teacher_weight > 0:
            wanted = (teacher / self.teacher_temperature).log_softmax(-1)
            distance = kl_div(scores.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            loss = loss + self.teacher_weight * distance
        return loss


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
        teacher_temperature: the teacher's scores are divided by it; above 1 they differ less.
        absolute_margin: as for :class:`DistilledLoss`, in the cross-entropy against the positive; it needs a method
            with ``_teacher``.

    Raises:
        ValueError: no such method.
    """

    method: str = "distill_fix_layer_teacher"
    teacher_temperature: float = 1.0
    absolute_margin: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"train_method={self.method!r}; allowed: {', '.join(METHODS)}.")
        if self.absolute_margin is not None and not self.needs_teacher:
            raise ValueError(
                f"absolute_margin={self.absolute_margin}: train_method={self.method!r} has no teacher; allowed: None, "
                "or a train_method that ends in _teacher."
            )

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
        soft, left_out = None, None
        if teacher is not None:
            soft = (teacher.to(student.dtype) / self.teacher_temperature).softmax(-1)
            left_out = likely_positives(teacher, self.absolute_margin)
        target: Tensor | None = None
        terms = []
        for step, layer in enumerate(reversed(range(len(student)))):
            scores = student[layer]
            terms.append(cross_entropy(without(scores, left_out)))
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
