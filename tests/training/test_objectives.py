"""Losses agree with their formulas; test_model compares them with the original program."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_llmrerank.training.objectives import METHODS, CascadeLoss, DistilledLoss, cross_entropy

SCORES = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0))
FULL = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(1))
TEACHER = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))


def test_cross_entropy_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    first = -torch.log(torch.tensor(1 / (1 + torch.e)))
    torch.testing.assert_close(cross_entropy(scores), (first + torch.log(torch.tensor(2.0))) / 2)
    uniform = torch.full((2, 2), 0.5)
    torch.testing.assert_close(cross_entropy(scores[1:], uniform[1:]), torch.log(torch.tensor(2.0)))


@given(st.integers(0, 3), st.floats(-5, 5))
def test_a_loss_does_not_depend_on_a_shift_of_all_scores(layer: int, shift: float) -> None:
    loss = CascadeLoss("normal")
    torch.testing.assert_close(loss(SCORES[layer : layer + 1] + shift), loss(SCORES[layer : layer + 1]))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_student_learns(method: str) -> None:
    student, full = SCORES.clone().requires_grad_(), FULL.clone().requires_grad_()
    CascadeLoss(method)(student, full, TEACHER).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert full.grad is None


def test_each_method_has_its_target_layers() -> None:
    """Find the full scores that each target depends on, for 20 layers counted from the deepest."""
    expected = {
        "distill_final_layer": [19],
        "distill_last_layer": list(range(1, 20)),
        "distill_fix_layer": [3, 11, 19],
        "distill_fix_layer_teacher": [3, 11, 19],
        "distill_final_layer_teacher": [],
        "distill": [],
    }
    for method, layers in expected.items():
        loss = CascadeLoss(method)
        usual = loss(SCORES, FULL, TEACHER)
        matters = []
        for layer in range(20):
            other = FULL.clone()
            other[layer, :, 1] += 3
            if not torch.equal(loss(SCORES, other, TEACHER), usual):
                matters.append(layer)
        assert matters == layers, method


def test_a_method_names_the_scores_that_it_lacks() -> None:
    with pytest.raises(ValueError, match="train_method='distil'; allowed: normal, distill,"):
        CascadeLoss("distil")
    with pytest.raises(ValueError, match=r"^train_method='distill_fix_layer_teacher' needs teacher scores"):
        CascadeLoss("distill_fix_layer_teacher")(SCORES, FULL)
    with pytest.raises(ValueError, match=r"^train_method='distill_fix_layer_teacher', absolute_margin=1.5 needs teach"):
        CascadeLoss("distill_fix_layer_teacher", absolute_margin=1.5)(SCORES, FULL)
    with pytest.raises(ValueError, match=r"^teacher_temperature=2.0 needs teacher scores; the data has none"):
        CascadeLoss("distill_fix_layer", teacher_temperature=2.0)(SCORES, FULL)
    with pytest.raises(ValueError, match="needs the scores of a full pass"):
        CascadeLoss("distill_fix_layer")(SCORES)
    without_teacher = CascadeLoss("distill_fix_layer")(SCORES, FULL)
    assert without_teacher < CascadeLoss("distill_fix_layer")(SCORES, FULL, TEACHER)


GROUPS = st.integers(1, 4).flatmap(
    lambda size: st.lists(
        st.tuples(*[st.lists(st.floats(-9, 9, width=32), min_size=size + 1, max_size=size + 1)] * 2),
        min_size=1,
        max_size=3,
    )
)


@given(GROUPS, st.floats(0.1, 4), st.floats(0.25, 8), st.sampled_from([None, 0.0, 1.5]))
def test_distilled_loss_by_hand(
    groups: list[tuple[list[float], list[float]]], weight: float, temperature: float, margin: float | None
) -> None:
    expected = 0.0
    for scores, taught in groups:
        kept = [
            score
            for index, score in enumerate(scores)
            if index == 0 or margin is None or not taught[index] > taught[0] - margin
        ]
        ranked = softmax(scores)
        wanted = softmax([score / temperature for score in taught])
        divergence = sum(t * (math.log(t) - math.log(s)) for t, s in zip(wanted, ranked, strict=True))
        expected += (-math.log(softmax(kept)[0]) + weight * divergence) / len(groups)
    student, teacher = (torch.tensor([group[part] for group in groups], dtype=torch.float64) for part in range(2))
    student.requires_grad_()
    loss = DistilledLoss(weight, temperature, margin)
    value = loss(student[None], teacher=teacher)
    assert value.item() == pytest.approx(expected, abs=1e-9)
    assert torch.autograd.gradcheck(lambda scores: loss(scores[None], teacher=teacher), [student])


def softmax(scores: list[float]) -> list[float]:
    exponents = [math.exp(score - max(scores)) for score in scores]
    return [exponent / sum(exponents) for exponent in exponents]


def test_without_a_weight_the_distilled_loss_is_the_original() -> None:
    scores, taught = SCORES[:1], TEACHER
    assert torch.equal(DistilledLoss()(scores), cross_entropy(scores[0]))
    assert torch.equal(DistilledLoss()(scores, teacher=taught), CascadeLoss("normal")(scores))
    assert not DistilledLoss().teacher_settings
    assert DistilledLoss(1.0).teacher_settings
    assert DistilledLoss(absolute_margin=0.0).teacher_settings
    with pytest.raises(ValueError, match=r"^teacher_weight=1.0 needs teacher scores; the data has none"):
        DistilledLoss(1.0)(scores)
    with pytest.raises(ValueError, match=r"^absolute_margin=0.0 needs teacher scores; the data has none"):
        DistilledLoss(absolute_margin=0.0)(scores)


def test_a_group_of_likely_positives_alone_teaches_by_its_teacher_only() -> None:
    student = torch.zeros(1, 1, 3, requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, 2.0]])
    loss = DistilledLoss(0.0, absolute_margin=0.0)(student, teacher=teacher)
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("method", ["distill_fix_layer_teacher", "distill_last_layer_teacher"])
def test_temperature_and_margin_of_the_cascade(method: str) -> None:
    scaled = CascadeLoss(method, teacher_temperature=2.0)
    torch.testing.assert_close(scaled(SCORES, FULL, TEACHER), CascadeLoss(method)(SCORES, FULL, TEACHER / 2))
    left_out = TEACHER[:, :1] < TEACHER
    assert left_out.any()
    hidden = sum(cross_entropy(layer.masked_fill(left_out, -torch.inf)) - cross_entropy(layer) for layer in SCORES)
    with_margin = CascadeLoss(method, absolute_margin=0.0)(SCORES, FULL, TEACHER)
    torch.testing.assert_close(with_margin, CascadeLoss(method)(SCORES, FULL, TEACHER) + hidden)
    with pytest.raises(ValueError, match=r"absolute_margin=0.0: train_method='normal' has no teacher"):
        CascadeLoss("normal", absolute_margin=0.0)
