"""A score that is not finite is named, and no other score is lost."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import MODELS, words

from pyterrier_llmrerank import MatroyshkaReranker, ScoringError
from pyterrier_llmrerank.engine import device_scorer, pending
from pyterrier_llmrerank.engine.packing import Row

FULL = str(MODELS / "costwise_full")


@pytest.mark.parametrize(
    ("dtype", "advice"), [("float16", "try dtype='float32'"), ("float32", "the checkpoint may be damaged")]
)
def test_a_score_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch, dtype: str, advice: str) -> None:
    reranker = MatroyshkaReranker(FULL, dtype=dtype)
    real = device_scorer.run_layers

    def overflows(model: object, row: Row, *args: object, **options: object) -> tuple[torch.Tensor, Row]:
        states, row = real(model, row, *args, **options)
        states[:, 1] = torch.inf
        return states, row

    monkeypatch.setattr(device_scorer, "run_layers", overflows)
    with pytest.raises(ScoringError, match=rf"score of pairs\[0\] is not finite in torch\.{dtype}; {advice}") as info:
        reranker.compute_score([("a", "short"), ("b", words(1, 60))])
    assert np.isfinite(info.value.scores).tolist() == [[False, True]]


def test_the_batch_that_runs_when_a_score_fails_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = MatroyshkaReranker(FULL, dtype="float32", batch_size=1)
    real, calls = device_scorer.run_layers, []

    def first_overflows(*args: object, **options: object) -> tuple[torch.Tensor, Row]:
        calls.append(1)
        states, row = real(*args, **options)
        return states * (torch.inf if len(calls) == 1 else 1), row

    monkeypatch.setattr(device_scorer, "run_layers", first_overflows)
    with pytest.raises(ScoringError, match=r"score of pairs\[2\] is not finite") as info:
        reranker.compute_score([("a", words(1, 9)), ("a", words(1, 20)), ("a", words(1, 60))])
    assert np.isfinite(info.value.scores).tolist() == [[False, True, False]]  # the second batch was running


@pytest.mark.parametrize("failure", [MemoryError(), torch.OutOfMemoryError("CUDA error: out of memory")])
def test_a_result_that_cannot_be_copied_is_computed_again(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    reranker = MatroyshkaReranker(FULL, dtype="float32", batch_size=2)
    pairs = [(words(i % 2, 4), words(i, 9 * i)) for i in range(8)]
    wanted, real, calls = reranker.compute_score(pairs), pending.to_host, []

    def brought_back(computed: torch.Tensor) -> Callable[[], np.ndarray]:
        def result() -> np.ndarray:
            calls.append(1)
            if len(calls) == 2:
                raise failure
            return real(computed)()

        return result

    monkeypatch.setattr(pending, "to_host", brought_back)
    np.testing.assert_allclose(reranker.compute_score(pairs), wanted, atol=1e-4)
