"""Losses over groups of one positive and some negatives.

A group is a query with its passages, the positive first; scores are ``[..., groups, size]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

#: Train methods with cascaded distillation, without the ending ``_teacher``.
TARGETS = ("distill_final_layer", "distill_last_layer", "distill_fix_layer")

#: All train methods, with the original program's names.
METHODS = ("normal", "distill", *TARGETS, *(f"{method}_teacher" for method in TARGETS))

#: Layers from one distillation target of ``distill_fix_layer`` to the next.
TARGET_SEP = 8


class Loss(Protocol):
    """Computes a loss over the scores of all heads."""

    @property
    def needs_full_pass(self) -> bool:
        """Whether the loss needs scores without compression."""

    @property
    def teacher_settings(self) -> dict[str, Any]:
        """The settings that need a teacher's scores, by name; empty if the loss needs none."""

    def __call__(self, student: Tensor, full: Tensor | None = None, teacher: Tensor | None = None) -> Tensor:
        """Compute the loss of ``[layers, groups, size]`` scores."""


def named(settings: dict[str, Any]) -> str:
    """Return settings with their values, for messages."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def cross_entropy(scores: Tensor, target: Tensor | None = None) -> Tensor:
    r"""Compute :math:`-\sum_i t_i \log \mathrm{softmax}(s)_i`, averaged over groups.

    This is RankLLaMA's loss (Ma et al., 2023), and the term of each layer in Matroyshka's.

    Args:
        scores: ``[groups, size]``.
        target: probabilities, ``[groups, size]``, with sum 1 in each group; None for the positive alone.
    """
    log_probabilities = scores.log_softmax(-1)
    wanted = log_probabilities[:, 0] if target is None else (target * log_probabilities).sum(-1)
    return -wanted.mean()


def likely_positives(teacher: Tensor, margin: float | None) -> Tensor | None:
    """Mark the negatives that the teacher scores above their positive minus a margin.

    Collections have few judged passages for each query, so many of these are unjudged positives. ``margin`` is like
    ``absolute_margin`` in the hard negatives of sentence-transformers.

    Args:
        teacher: the teacher's scores, ``[groups, size]``, the positive first.
        margin: the smallest difference between a positive and a negative; None marks nothing.

    Returns:
        A mask, ``[groups, size]``, or None.
    """
    if margin is None:
        return None
    likely = teacher > teacher[:, :1] - margin
    likely[:, 0] = False
    return likely


def without(scores: Tensor, excluded: Tensor | None) -> Tensor:
    """Return scores in which a softmax gives the excluded ones no weight; unchanged for None."""
    return scores if excluded is None else scores.masked_fill(excluded, -math.inf)


@dataclass(frozen=True)
class DistilledLoss:
    r"""Computes RankLLaMA's cross-entropy over groups, and the divergence from a teacher's scores.

    :math:`\mathrm{CE}(s) + w \, \mathrm{KL}(\mathrm{softmax}(t / \tau) \,\|\, \mathrm{softmax}(s))`, averaged over
    groups, where :math:`s` are the scores, :math:`t` the teacher's, :math:`w` ``teacher_weight`` and :math:`\tau`
    ``teacher_temperature``.

    Args:
        teacher_weight: weight of the divergence; 0 for the original loss (Ma et al., 2023).
        teacher_temperature: divisor of the teacher's scores; above 1 flattens their distribution.
        absolute_margin: exclude a negative from the cross-entropy if its teacher score is above the positive's
            minus this margin; None keeps all.

    Raises:
        ValueError: ``teacher_temperature`` is set without ``teacher_weight``.
    """

    teacher_weight: float = 0.0
    teacher_temperature: float = 1.0
    absolute_margin: float | None = None

    #: RankLLaMA is trained at full width only.
    needs_full_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.teacher_temperature != 1 and not self.teacher_weight > 0:
            raise ValueError(
                f"teacher_temperature={self.teacher_temperature}: without teacher_weight, it has no effect; allowed: "
                "1, or a teacher_weight above 0."
            )

    @property
    def teacher_settings(self) -> dict[str, Any]:
        """The settings that need a teacher's scores, by name."""
        weight = {"teacher_weight": self.teacher_weight} if self.teacher_weight > 0 else {}
        margin = {} if self.absolute_margin is None else {"absolute_margin": self.absolute_margin}
        return {**weight, **margin}

    def __call__(self, student: Tensor, full: Tensor | None = None, teacher: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            student: scores, ``[1, groups, size]``.
            full: ignored.
            teacher: the teacher's scores, ``[groups, size]``.

        Raises:
            ValueError: the teacher's scores are needed and missing.
        """
        scores = student[0]
        if not self.teacher_settings:
            return cross_entropy(scores)
        if teacher is None:
            raise ValueError(f"{named(self.teacher_settings)} needs teacher scores; the data has none.")
        teacher = teacher.to(scores.dtype)
        loss = cross_entropy(without(scores, likely_positives(teacher, self.absolute_margin)))
        if self.teacher_weight > 0:
            from torch.nn.functional import kl_div

            wanted = (teacher / self.teacher_temperature).log_softmax(-1)
            distance = kl_div(scores.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            loss = loss + self.teacher_weight * distance
        return loss


@dataclass(frozen=True)
class CascadeLoss:
    """Computes Matroyshka's loss over all layers, with cascaded self-distillation (Liu et al., 2025).

    Each layer, from the deepest to the shallowest, adds a cross-entropy against the positive; against the teacher's
    scores, if the method ends in ``_teacher``; and against the current target. A target is the scores of a deeper
    layer without compression: ``distill_final_layer`` uses the deepest layer, ``distill_last_layer`` the next deeper
    one, and ``distill_fix_layer`` changes its target at every eighth layer. Without ``_teacher``, the deepest layer
    alone learns from the teacher's scores, if there are any. ``normal`` and ``distill`` are the cross-entropies against
    the positive alone; ``distill_final_layer_teacher`` has no target, as in the original program.

    Args:
        method: one of :data:`METHODS`.
        teacher_temperature: divisor of the teacher's scores; above 1 flattens their distribution.
        absolute_margin: as for :class:`DistilledLoss`, in the cross-entropy against the positive; allowed in methods
            with ``_teacher``.

    Raises:
        ValueError: the method is unknown, or has no teacher for ``absolute_margin`` or ``teacher_temperature``.
    """

    method: str = "distill_fix_layer_teacher"
    teacher_temperature: float = 1.0
    absolute_margin: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"train_method={self.method!r}; allowed: {', '.join(METHODS)}.")
        if self.teacher_temperature != 1 and not self.needs_full_pass:
            raise ValueError(
                f"teacher_temperature={self.teacher_temperature}: train_method={self.method!r} has no teacher; "
                f"allowed: 1, or one of {', '.join(TARGETS)}, also with _teacher."
            )
        if self.absolute_margin is not None and not self._has_teacher:
            raise ValueError(
                f"absolute_margin={self.absolute_margin}: train_method={self.method!r} has no teacher; allowed: None, "
                "or a train_method that ends in _teacher."
            )

    @property
    def needs_full_pass(self) -> bool:
        """Whether the loss needs scores without compression."""
        return self.method.startswith(TARGETS)

    @property
    def teacher_settings(self) -> dict[str, Any]:
        """The settings that need a teacher's scores, by name."""
        method = {"train_method": self.method} if self._has_teacher else {}
        temperature = {} if self.teacher_temperature == 1 else {"teacher_temperature": self.teacher_temperature}
        margin = {} if self.absolute_margin is None else {"absolute_margin": self.absolute_margin}
        return {**method, **temperature, **margin}

    @property
    def _has_teacher(self) -> bool:
        """Whether each layer learns from a teacher's scores."""
        return self.method.endswith("_teacher")

    def __call__(self, student: Tensor, full: Tensor | None = None, teacher: Tensor | None = None) -> Tensor:
        """Sum the loss over the layers.

        Args:
            student: trainable scores, ``[layers, groups, size]``, shallowest layer first.
            full: scores without compression, of the same shape; they get no gradient.
            teacher: another model's scores, ``[groups, size]``.

        Raises:
            ValueError: the method needs scores that are missing.
        """
        import torch

        if self.teacher_settings and teacher is None:
            raise ValueError(f"{named(self.teacher_settings)} needs teacher scores; the data has none.")
        if self.needs_full_pass and full is None:
            raise ValueError(f"train_method={self.method!r} needs the scores of a full pass.")
        kind = self.method.removesuffix("_teacher")
        soft, excluded = None, None
        if teacher is not None:
            soft = (teacher.to(student.dtype) / self.teacher_temperature).softmax(-1)
            excluded = likely_positives(teacher, self.absolute_margin)
        target: Tensor | None = None
        terms = []
        for step, layer in enumerate(reversed(range(len(student)))):
            scores = student[layer]
            terms.append(cross_entropy(without(scores, excluded)))
            if not self.needs_full_pass:
                continue
            if soft is not None and (self._has_teacher or step == 0):
                terms.append(cross_entropy(scores, soft))
            if target is not None:
                terms.append(cross_entropy(scores, target))
            if self._becomes_target(kind, step, self._has_teacher):
                assert full is not None
                target = full[layer].detach().softmax(-1)
        return torch.stack(terms).sum()

    @staticmethod
    def _becomes_target(kind: str, step: int, with_teacher: bool) -> bool:
        """Tell whether the layer at this step, counted from the deepest, becomes the target of shallower layers."""
        if kind == "distill_final_layer":
            return step == 0 and not with_teacher
        return kind == "distill_last_layer" or step % TARGET_SEP == 0
