"""Training and large calls on a CPU run on the fastest number of threads, and leave torch's number as it was."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from pyterrier_llmrerank.engine import threads as module
from pyterrier_llmrerank.engine.threads import TURNS, fastest_threads, seconds_of_layer

CPU = torch.device("cpu")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Six threads, without a number in the environment."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(6)
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.mark.parametrize("best", [1, 2, 4, 6])
def test_the_fastest_number_of_threads_is_used(
    best: int, threads: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pyterrier_llmrerank.engine.threads")
    asked: list[int] = []

    def seconds(number: int) -> float:
        asked.append(number)
        slow = 60.0 if len(asked) in (best, 9, 14) else 0.0  # a disturbance
        return 0.001 * (1 + abs(number - best)) + slow

    with fastest_threads(CPU, seconds):
        assert torch.get_num_threads() == best
    assert torch.get_num_threads() == 6
    assert asked == [1, 2, 4, 6] * (TURNS + 1)
    assert f"running on {best} of 6 threads (1: " in caplog.text


def test_a_given_number_of_threads_is_kept(threads: pytest.MonkeyPatch) -> None:
    def seconds(number: int) -> float:
        pytest.fail("it was measured")

    with fastest_threads(torch.device("cuda"), seconds):
        assert torch.get_num_threads() == 6
    threads.setenv("OMP_NUM_THREADS", "6")
    with fastest_threads(CPU, seconds):
        assert torch.get_num_threads() == 6
    threads.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    with fastest_threads(CPU, seconds):
        assert torch.get_num_threads() == 1


def test_the_number_of_threads_is_restored_after_an_error(threads: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with fastest_threads(CPU, float):
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == 6


def test_a_layer_is_measured_on_the_threads_asked_for(threads: pytest.MonkeyPatch) -> None:
    assert seconds_of_layer(2) > 0
    assert torch.get_num_threads() == 2


def test_a_measurement_holds_for_ten_minutes_at_most(threads: pytest.MonkeyPatch) -> None:
    clock, best, measured = [0.0], [2], []

    def seconds(number: int) -> float:
        measured.append(clock[0])
        return abs(number - best[0])

    threads.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    used = []
    for clock[0], best[0] in ((3.0, 2), (599.0, 4), (600.0, 4), (6000.0, 1)):  # the load changes after the first
        with fastest_threads(CPU, seconds):
            used.append(torch.get_num_threads())
    assert used == [2, 2, 4, 1]
    assert sorted({*measured}) == [3.0, 600.0, 6000.0]


def test_overlapping_blocks_share_the_number_and_restore_it(threads: pytest.MonkeyPatch) -> None:
    """The second block begins before the first ends, and ends after it; a measurement would disturb the first."""

    def seconds(number: int) -> float:
        pytest.fail("it was measured")

    first, second = fastest_threads(CPU, float), fastest_threads(CPU, seconds)
    first.__enter__()
    second.__enter__()
    assert torch.get_num_threads() == 1
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.get_num_threads() == 6
