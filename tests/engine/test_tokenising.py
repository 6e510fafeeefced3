"""A pair that cannot be tokenised or read is named before its chunk is scored."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import MODELS, words

from pyterrier_llmrerank import MatroyshkaReranker, ScoringError
from pyterrier_llmrerank.engine import scoring
from pyterrier_llmrerank.engine.call import ScoringCall
from pyterrier_llmrerank.engine.decoder import decode
from pyterrier_llmrerank.engine.inputs import Ids
from pyterrier_llmrerank.engine.packing import PackedPairs
from pyterrier_llmrerank.engine.tokenising import ChunkTokenizer, Limits
from pyterrier_llmrerank.engine.usage import Observer

FULL = MODELS / "costwise_full"
RERANKER = MatroyshkaReranker(FULL, dtype="float32")
#: Three queries of two passages. With chunks of two pairs, the second pair of the second chunk is at fault.
PAIRS = [(f"{number // 2} panda", words(number, 9)) for number in range(6)]


def the_first_chunk_has_its_scores(error: ScoringError) -> bool:
    """Return whether the pairs of the first chunk have their scores, and no others have any."""
    wanted = np.append(RERANKER.compute_score(PAIRS[:2]), [np.nan] * 4)
    return np.allclose(error.scores[0], wanted, atol=1e-4, equal_nan=True)


class Panic(BaseException):
    """An error like a panic in a Rust tokenizer."""

    __module__ = "pyo3_runtime"


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("error", [SystemExit(143), GeneratorExit(), MemoryError()])
def test_an_exit_during_tokenisation_is_no_scoring_error(error: BaseException, alone: bool) -> None:
    """``alone``: the batch fails with another error, and the exit comes during the search for the pair at fault."""

    def encode(given: list[tuple[str, str]]) -> object:
        raise ValueError("odd") if alone and len(given) > 1 else error

    call = ScoringCall([("a", "b"), ("c", "d")], iter([]), 1, Observer(), None)
    with pytest.raises(type(error)) as info:
        ChunkTokenizer(encode, Limits(700), call)([0, 1])
    assert info.value is error


@pytest.mark.parametrize("error", [ValueError("odd"), Panic("odd")])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pair_that_cannot_be_tokenised_is_named(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, alone: bool
) -> None:
    scorer = RERANKER.scorer()

    def encode(tokenizer: object, given: list[tuple[str, str]]) -> object:
        if PAIRS[3] in given and (alone or len(given) > 1):
            raise error
        return scorer.encode(tokenizer, given)

    monkeypatch.setattr(scoring, "CHUNK", 2)
    at = r"pairs\[3\]" if alone else r"pairs\[2\] and 1 more pairs together"
    with pytest.raises(ScoringError, match=rf"^cannot tokenise {at}: {type(error).__name__}: odd$") as info:
        replace(scorer, encode=encode).score(PAIRS)
    assert the_first_chunk_has_its_scores(info.value)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (Ids([], [], []), "has no tokens, so there is nothing to score"),
        (Ids([1], [700], [2]), "holds token 700 of the tokenizer, but the model knows 700 tokens"),
    ],
)
def test_ids_are_checked_before_their_chunk_is_scored(monkeypatch: pytest.MonkeyPatch, ids: Ids, said: str) -> None:
    scorer = RERANKER.scorer()

    def encode(tokenizer: object, given: list[tuple[str, str]]) -> list[Ids]:
        encoded = scorer.encode(tokenizer, given)
        return [ids if pair == PAIRS[3] else made for pair, made in zip(given, encoded, strict=True)]

    monkeypatch.setattr(scoring, "CHUNK", 2)
    with pytest.raises(ScoringError, match=rf"^pairs\[3\] {said}\.$") as info:
        replace(scorer, encode=encode).score(PAIRS)
    assert the_first_chunk_has_its_scores(info.value)


def test_padding_that_the_model_does_not_know_is_refused() -> None:
    reranker = MatroyshkaReranker(FULL, dtype="float32", released=True, compress_layers=2, compress_ratio=2)
    scorer = reranker.scorer()
    padded = replace(scorer, shape_of=lambda checkpoint: replace(scorer.shape, pad_id=700))
    with pytest.raises(ValueError, match="released=True: the tokenizer pads with token 700, but the model knows 700 t"):
        padded.score(PAIRS)


def test_unchecked_ids_are_refused_by_the_decoder() -> None:
    """Training runs it without a scorer, which checks ids before."""
    packed = PackedPairs([Ids([1], [700], [2])])
    with pytest.raises(ValueError, match="a pair has token 700, but the model knows 700 tokens"):
        decode(RERANKER.scorer().open(), packed, [1])
