"""Operations counted from tokens equal torch's own count while the model runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODELS, frame, ids_of, words
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from pyterrier_llmrerank import MatroyshkaReranker
from pyterrier_llmrerank.engine.flops import Layer, Operations
from pyterrier_llmrerank.engine.inputs import Ids

FULL = MatroyshkaReranker(MODELS / "costwise_full", dtype="float32")
SHAPES: dict[str, dict[str, Any]] = {
    "whole": {},
    "single": {"cutoff": 5},
    "several": {"cutoff": [3, 6]},
    "compressed": {"cutoff": 7, "compress_layers": [2, 4], "compress_ratio": 2},
    "cascade": {"prune": {3: 4, 6: 2}},
    "compressed cascade": {"compress_layers": [4], "compress_ratio": 4, "prune": {3: 4, 5: 2}},
}


def ids_of_rows(rows: pd.DataFrame) -> list[Ids]:
    return ids_of(FULL, list(zip(rows["query"], rows["text"], strict=True)))


def counted(queries: int, documents: int, more: int = 0) -> Operations:
    """Operations for the rows of ``frame``, and for ``more`` queries without rows."""
    ids = ids_of_rows(frame(queries, documents))
    query_of_pair = np.repeat(np.arange(queries), documents)
    return Operations(FULL.scorer().open(), ids, query_of_pair, queries + more)


@pytest.mark.parametrize("name", SHAPES)
def test_operations_of_the_layers_matrices_equal_torchs_count(name: str) -> None:
    reranker, operations = FULL.at(**SHAPES[name]), counted(3, 8)
    with FlopCounterMode(display=False) as counter:
        scored = reranker.transform(frame(3, 8))
    exits = scored["exit_layer"].to_numpy() if "exit_layer" in scored else None
    shape = reranker.scorer().shape
    operations.width = 0  # torch counts heads and attention apart, as batched products
    operations.layers = [layer._replace(attended=0) for layer in operations.layers]
    own = operations(shape.cutoffs, shape.compress_layers, shape.compress_ratio, exits).sum()
    counts = counter.get_flop_counts()["Global"]
    assert own == counts.get(torch.ops.aten.mm, 0) + counts.get(torch.ops.mkldnn._linear_pointwise, 0)


def test_operations_of_attention_and_heads_equal_a_count_by_token() -> None:
    operations = counted(2, 3)
    operations.layers = [layer._replace(matrices=0, keys_values=0) for layer in operations.layers]
    wanted = np.zeros(2)
    for pair, ids in enumerate(ids_of_rows(frame(2, 3))):
        prefix, length = len(ids.prefix), ids.length
        keys = sum(range(prefix + 1, length + 1)) + (sum(range(1, prefix + 1)) if pair % 3 == 0 else 0)
        wanted[pair // 3] += 4 * 64 * (2 * keys + length) + 2 * 64 * 2  # two layers for all tokens, one for the last
    assert operations([2, 3]).tolist() == wanted.tolist()


@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_a_sliding_window_limits_the_keys(window: int | None) -> None:
    layer = Layer(0, 0, 0, window)
    wanted = [sum(min(token, window or token) for token in range(1, n + 1)) for n in range(9)]
    assert layer.keys(np.arange(9)).tolist() == wanted


def test_a_query_without_pairs_of_its_own_takes_none() -> None:
    by_query = counted(2, 3, more=1)([8])
    assert len(by_query) == 3
    assert by_query[2] == 0
    assert (by_query[:2] > 0).all()


def test_a_fallback_decoder_takes_the_same_at_any_depth(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=700, n_positions=128, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODELS / "mistral_base").save_pretrained(tmp_path)
    reranker = MatroyshkaReranker(tmp_path, dtype="float32", start_layer=1)
    decoder, _, _ = reranker.scorer().weights[0].at_depth(3)
    ids = ids_of(reranker, [("panda", words(n, 9)) for n in range(4)])
    operations = Operations(decoder, ids, np.zeros(4, dtype=int), 1)
    assert operations([1]) == operations([3])
    per_layer = 2 * 12 * 32 * 32 * sum(pair.length for pair in ids)
    assert operations([3])[0] == pytest.approx(3 * per_layer, rel=0.5)  # the rest is attention
