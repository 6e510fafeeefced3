"""Checks of arguments and cells: errors name the argument, its value and what is allowed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_llmrerank.values import (
    check_column,
    check_devices,
    check_integer,
    check_path,
    check_positive,
    problem_of,
    problem_of_id,
)


@pytest.mark.parametrize("value", [None, "cpu", "cuda", "cuda:1", "mps", ("cuda:0", "cpu")])
def test_devices_have_torchs_names(value: object) -> None:
    assert check_devices("device", value) == value


def test_a_list_of_one_device_is_that_device() -> None:
    assert check_devices("device", ["cuda:3"]) == "cuda:3"
    assert check_devices("device", ["cpu", "cuda"]) == ("cpu", "cuda")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("gpu", "device='gpu': 'gpu' is not a device; allowed: 'cpu'"),
        ("cuda:x", "'cuda:x' is not a device"),
        ("meta", "'meta' is not a device"),
        (["cpu", "CUDA"], "'CUDA' is not a device"),
        ([], "a list of one or more different devices"),
        (["cpu", "cpu"], "a list of one or more different devices"),
    ],
)
def test_unknown_devices_are_named(value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_devices("device", value)


@given(st.integers(1, 2**40))
def test_integers_of_numpy_are_integers(number: int) -> None:
    assert check_positive("n", np.int64(number)) == number
    assert type(check_positive("n", np.int64(number))) is int


@given(st.one_of(st.integers(max_value=0), st.booleans(), st.floats(), st.text(), st.none()))
def test_other_values_are_no_positive_integers(value: object) -> None:
    with pytest.raises(ValueError, match=r"^n=.*; allowed: an integer of at least 1\.$"):
        check_positive("n", value)


def test_true_is_no_integer() -> None:
    with pytest.raises(ValueError, match=r"n=np\.True_; allowed: a layer\."):
        check_integer("n", np.bool_(True), "a layer")


@given(st.text(st.characters(codec="utf-8")))
def test_valid_unicode_has_no_problem(text: str) -> None:
    assert problem_of(text) is problem_of_id(text) is None


@given(st.text(), st.text())
def test_a_lone_surrogate_is_found(before: str, after: str) -> None:
    whole = before.encode(errors="ignore").decode()
    assert problem_of(f"{whole}\ud800{after}") == f"not valid Unicode (a lone surrogate at character {len(whole)})"


@pytest.mark.parametrize("value", [None, 3, b"bytes", float("nan")])
def test_values_that_are_no_texts_are_shown(value: object) -> None:
    assert problem_of(value) == f"{value!r}, not a string (an empty one is scored)"


def test_ids_are_strings_or_numbers() -> None:
    assert problem_of_id(7) is None
    assert problem_of_id(["7"]) == "['7'], neither a string nor a number"


@pytest.mark.parametrize("value", ["", None, 3])
def test_empty_names_of_columns_and_models_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="text_field=.*; allowed: the name of a column"):
        check_column("text_field", value)
    with pytest.raises(ValueError, match="model=.*; allowed: a folder, a .gguf file or a hub id"):
        check_path("model", value)
