"""nDCG@10 in training is nDCG@10 as ir_measures computes it."""

import math

import pandas as pd
import pytest
from conftest import RECORDS

from pyterrier_llmrerank.training import DistillTraining
from pyterrier_llmrerank.training.validation import Validation


def test_positives_of_a_record_compete_with_its_negatives() -> None:
    measure = Validation.of_records(RECORDS[:2], DistillTraining.body)
    assert len(measure.pairs) == 10
    assert measure(lambda pairs: [float(query in body) + len(body) / 1e6 for query, body in pairs]) == 1.0
    positives = {record["pos"][0] for record in RECORDS}
    last = measure(lambda pairs: [0.0 if body in positives else 1.0 + n for n, (_, body) in enumerate(pairs)])
    assert last == pytest.approx(1 / math.log2(6))


def test_nothing_in_common_is_an_error() -> None:
    pairs = pd.DataFrame({"qid": ["1"], "docno": ["d"], "query": ["q"], "body": ["b"]})
    qrels = pd.DataFrame({"qid": ["2"], "docno": ["d"], "label": [1]})
    with pytest.raises(ValueError, match="no query has both"):
        Validation(pairs, qrels)
