"""Losses are what their formulas say; their agreement with the original program is in test_training_model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_llmrerank.training.objectives import METHODS, CascadeLoss, cross_entropy

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


def test_which_layer_is_the_target() -> None:
    """Of 20 layers, counted from the deepest: which full scores does each target depend on?"""
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


def test_what_a_method_needs_is_said() -> None:
    with pytest.raises(ValueError, match="train_method='distil'; allowed: normal, distill,"):
        CascadeLoss("distil")
    with pytest.raises(ValueError, match="needs teacher scores"):
        CascadeLoss("distill_fix_layer_teacher")(SCORES, FULL)
    with pytest.raises(ValueError, match="needs the scores of a full pass"):
        CascadeLoss("distill_fix_layer")(SCORES)
    without_teacher = CascadeLoss("distill_fix_layer")(SCORES, FULL)
    assert without_teacher < CascadeLoss("distill_fix_layer")(SCORES, FULL, TEACHER)
