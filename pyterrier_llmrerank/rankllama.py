"""RankLLaMA: a Llama with LoRA and one linear head, fine-tuned to score a query and a document."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from .files import require
from .inputs import Ids, RankLLaMAInputs, document
from .reranker import LLMReranker, column, path_like, positive, problem_of

if TYPE_CHECKING:
    from .checkpoints import Checkpoint
    from .scoring import Shape


class RankLLaMAReranker(LLMReranker):
    """Rerank with RankLLaMA (Ma et al., 2023: Fine-Tuning LLaMA for Multi-Stage Text Retrieval).

    A pair reads ``<s> query: {query}<s> document: {title} {text}`` and is scored by a linear head on the
    last token's state after the last layer.

    Args:
        model: a PEFT ``SEQ_CLS`` adapter with its score head, or a merged ``*ForSequenceClassification``
            model: a folder or a hub id.
        base_model: what the adapter is put on (folder, ``.gguf`` file or hub id), instead of the base
            that it names itself.
        query_max_length: tokens kept of ``query: {query}``, without ``<s>``.
        passage_max_length: tokens kept of ``document: {title} {text}``, without ``<s>``. Both together
            are held to ``query_max_length + passage_max_length - 2`` tokens with both ``<s>``, at the
            expense of the query. The document checkpoint was trained with 2048.
        text_field: the column with the text.
        title_field: a column with titles; used where the frame has it and the row's title is not None or
            NaN. None to read no titles.
        url_field: likewise for URLs, which stand before the title (the document model reads them).
        batch_size: pairs a batch; None for as many as fit a token budget.
        device: for example ``"cuda:1"``; None for CUDA or MPS where there is one, else the CPU.
        dtype: ``"auto"`` is bfloat16 where the device computes in it natively, else float32; or name
            ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        verbose: show a progress bar.

    Raises:
        ValueError: an argument is not what is allowed.
        FileNotFoundError: a local checkpoint is not there. What is to come from the hub is looked for, and
            may fail, on first use.

    >>> from pyterrier_llmrerank import RankLLaMAReranker
    >>> RankLLaMAReranker(passage_max_length=256)
    RankLLaMAReranker('castorini/rankllama-v1-7b-lora-passage', passage_max_length=256)
    """

    schematic: ClassVar = {"label": "RankLLaMA", "help_url": "https://arxiv.org/abs/2310.08319"}

    def __init__(
        self,
        model: str = "castorini/rankllama-v1-7b-lora-passage",
        *,
        base_model: str | None = None,
        query_max_length: int = 32,
        passage_max_length: int = 164,
        text_field: str = "text",
        title_field: str | None = "title",
        url_field: str | None = None,
        batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        verbose: bool = False,
    ) -> None:
        self._set_shared(model, text_field, batch_size, device, dtype, verbose)
        self.base_model = None if base_model is None else path_like("base_model", base_model)
        self.query_max_length = positive("query_max_length", query_max_length)
        self.passage_max_length = positive("passage_max_length", passage_max_length)
        self.title_field = None if title_field is None else column("title_field", title_field)
        self.url_field = None if url_field is None else column("url_field", url_field)
        require(self.model, "model")
        if self.base_model is not None:
            require(self.base_model, "base_model")

    def _checkpoint(self) -> partial[Any]:
        from .checkpoints import RankLLaMACheckpoint

        return partial(RankLLaMACheckpoint, self.model, self.base_model)

    def _shape(self, checkpoint: Checkpoint) -> Shape:
        from .scoring import Shape

        return Shape(cutoffs=(checkpoint.layers,), heads=(0,))

    def deepest(self) -> int | None:
        """All layers are run."""
        return None

    def _encode(self, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        return RankLLaMAInputs(self.query_max_length, self.passage_max_length)(tokenizer, pairs)

    def _bodies(self, inp: pd.DataFrame) -> list[str]:
        titles, urls = (self._optional(inp, field) for field in (self.title_field, self.url_field))
        return [document(*parts) for parts in zip(inp[self.text_field], titles, urls, strict=True)]

    def _body(self, passage: str) -> str:
        return document(passage)

    def _optional(self, inp: pd.DataFrame, field: str | None) -> list[str | None]:
        """A column whose values may be missing, as the whole column may."""
        if field is None or field not in inp.columns:
            return [None] * len(inp)
        values = [None if pd.api.types.is_scalar(value) and pd.isna(value) else value for value in inp[field]]
        for row, value in enumerate(values):
            if value is not None and (problem := problem_of(value)):
                raise ValueError(f"{field!r} is {problem} for {self._label(inp, row)}.")
        return values
