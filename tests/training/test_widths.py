"""Widths are drawn as a function of the place in the run."""

import numpy as np

from pyterrier_llmrerank.training.widths import Widths


def test_widths_are_a_function_of_the_place_in_the_run() -> None:
    widths = Widths((4, 8, 12), (1, 2, 4))
    drawn = [widths.draw(step, part) for step in range(200) for part in range(2)]
    assert drawn == [widths.draw(step, part) for step in range(200) for part in range(2)]
    assert {ratio for _, ratio in drawn} == {1, 2, 4}
    for layer in (4, 8, 12):
        assert 0.4 < np.mean([layer in layers for layers, _ in drawn]) < 0.6
    assert Widths().draw(3, 0) == ((), 1)
