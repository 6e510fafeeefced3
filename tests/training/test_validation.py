"""nDCG@10 in training is nDCG@10 as ir_measures computes it."""

import math

import pandas as pd
import pytest
from conftest import RECORDS

from pyterrier_llmrerank.training import DistillTraining
from pyterrier_llmrerank.training.validation import Validation


def test_positives_of_a_record_compete_with_its_negatives() -> None:
    measure = Validation.of_records(RECORDS[:2], DistillTraining().body)
    assert len(measure.pairs) == 10
    assert measure(lambda pairs: [float(query in body) + len(body) / 1e6 for query, body, _ in pairs]) == 1.0
    positives = {record["pos"][0] for record in RECORDS}
    last = measure(lambda pairs: [0.0 if body in positives else 1.0 + n for n, (_, body, _) in enumerate(pairs)])
    assert last == pytest.approx(1 / math.log2(6))


def test_candidates_and_judgements_without_a_common_query_are_refused() -> None:
    pairs = pd.DataFrame({"qid": ["1"], "docno": ["d"], "query": ["q"], "body": ["b"], "prompt": [None]})
    qrels = pd.DataFrame({"qid": ["2"], "docno": ["d"], "label": [1]})
    with pytest.raises(ValueError, match="no query has both"):
        Validation(pairs, qrels)


def test_queries_without_candidates_do_not_count() -> None:
    pairs = pd.DataFrame({"qid": ["1"], "docno": ["d"], "query": ["q"], "body": ["b"], "prompt": [None]})
    qrels = pd.DataFrame({"qid": ["1", "2"], "docno": ["d", "d"], "label": [1, 1]})
    assert Validation(pairs, qrels)(lambda asked: [1.0]) == 1.0


def test_a_prompt_of_the_data_goes_with_its_pairs() -> None:
    measure = Validation.of_records([RECORDS[0] | {"prompt": "Relevant?"}, RECORDS[1]], DistillTraining().body)
    seen: set[str | None] = set()
    measure(lambda asked: [float(len(body)) for _, body, prompt in asked if seen.add(prompt) is None])  # type: ignore[func-returns-value]
    assert seen == {"Relevant?", None}
