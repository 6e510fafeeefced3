"""Reranking by a real pretrained model, and on real collections if they are there."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import ids_of
from pyterrier.measures import nDCG
from transformers import AutoModelForCausalLM

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.bundled import MODELS

PASSAGES = {
    "what do pandas eat": "The giant panda feeds almost entirely on bamboo, and eats up to fifteen kilograms a day.",
    "how high is mount everest": "Everest's summit stands 8,849 metres above sea level.",
    "who wrote hamlet": "Hamlet is a tragedy by William Shakespeare, written around 1600.",
    "why is the sky blue": "Air scatters short wavelengths of sunlight more than long ones, so the sky looks blue.",
}
PAIRS = [(query, passage) for query in PASSAGES for passage in PASSAGES.values()]


def test_scores_are_the_models_own_logits_of_yes(smollm2: str) -> None:
    """Scores equal transformers' whole forward pass over the full vocabulary, one pair at a time."""
    reranker = MatroyshkaReranker(smollm2, dtype="float32")
    got = reranker.compute_score(PAIRS)
    weights = reranker.scorer().weights[0]
    _, _, tokenizer = weights.at_depth(1)
    model = AutoModelForCausalLM.from_pretrained(weights.checkpoint.folder, dtype=torch.float32).eval()
    yes = tokenizer("Yes", add_special_tokens=False)["input_ids"][-1]
    for score, ids in zip(got, ids_of(reranker, PAIRS), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([ids.flat()])).logits[0, -1]
        assert score == pytest.approx(logits[yes].item(), abs=1e-3)


@pytest.mark.parametrize("shape", [{}, {"cutoff": 20, "compress_layers": [8], "compress_ratio": 2}])
def test_a_score_does_not_depend_on_its_batch_in_the_default_dtype(smollm2: str, shape: dict) -> None:
    reranker = MatroyshkaReranker(smollm2, start_layer=4, **shape)
    pairs = [(query, passage * (1 + number % 5)) for number, (query, passage) in enumerate(PAIRS[:10])]
    alone = [reranker.compute_score(pair) for pair in pairs]
    on_cpu = reranker.scorer().device.type == "cpu"
    np.testing.assert_allclose(reranker.compute_score(pairs), alone, atol=1e-4 if on_cpu else 5e-2)


@pytest.mark.parametrize(
    "reranker",
    [
        RankLLaMAReranker("smollm2-135m"),
        MatroyshkaReranker("smollm2-135m"),
        MatroyshkaReranker("smollm2-135m", cutoff=20),
        MatroyshkaReranker("smollm2-135m", cutoff=20, compress_layers=8, compress_ratio=2),
        MatroyshkaReranker("smollm2-135m", compress_layers=8, compress_ratio=4),
    ],
    ids=repr,
)
def test_the_shipped_models_rank(smollm2: str, reranker: LLMReranker) -> None:
    scores = np.asarray(reranker.compute_score(PAIRS)).reshape(len(PASSAGES), -1)
    assert (scores.argmax(axis=1) == np.arange(len(PASSAGES))).all()


def test_a_shipped_model_is_its_adapter_over_the_base(smollm2: str) -> None:
    adapter = str(MODELS / "matroyshka-smollm2-135m")
    shape = {"cutoff": 16, "compress_layers": [8], "compress_ratio": 2, "dtype": "float32"}
    np.testing.assert_allclose(
        MatroyshkaReranker("smollm2-135m", **shape).compute_score(PAIRS),
        MatroyshkaReranker(smollm2, adapters=adapter, start_layer=4, **shape).compute_score(PAIRS),
        atol=1e-4,
    )


def test_an_experiment_over_a_real_collection(smollm2: str, collections: Path) -> None:
    folder = collections / "vaswani"
    strings = {"qid": str, "query": str, "docno": str, "text": str}
    topics = pd.read_csv(folder / "topics.tsv", sep="\t", names=["qid", "query"], dtype=strings).head(4)
    documents = pd.read_json(folder / "docs.jsonl.gz", lines=True, dtype=strings)[["docno", "text"]]
    qrels = pt.io.read_qrels(str(folder / "qrels.txt"))
    run = pt.io.read_results(str(folder / "runs" / "bm25.res.gz"))
    first = pt.Transformer.from_df(run[run["rank"] < 8].merge(documents, on="docno"))
    deep = MatroyshkaReranker(smollm2, start_layer=10, cutoff=[10, 20])
    table = pt.Experiment(
        [first, first >> deep, first >> deep.at(cutoff=10)], topics, qrels, [nDCG @ 10], filter_by_qrels=True
    )
    assert table["nDCG@10"].between(0.01, 1).all()
    both = (first >> deep).transform(topics)
    single = (first >> deep.at(cutoff=10)).transform(topics)
    np.testing.assert_allclose(both["score_10"], single["score"], atol=2e-2)
