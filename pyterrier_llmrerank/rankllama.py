"""RankLLaMA: a Llama with LoRA and one linear head, fine-tuned to score a query and a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pandas as pd

from .checkpoints import bundled
from .checkpoints.description import described
from .checkpoints.locate import folder_of, located, named_base, require, shown
from .engine.inputs import Ids, RankLLaMAInputs, document
from .reranker import LLMReranker
from .values import column, path_like, positive, problem_of

if TYPE_CHECKING:
    from .checkpoints.checkpoint import Checkpoint, RankLLaMACheckpoint
    from .engine.scoring import Shape
    from .training.fitting import Frames
    from .training.recipes import RankLLaMATraining, Recipe


class RankLLaMAReranker(LLMReranker):
    """Rerank with RankLLaMA (Ma et al., 2023: Fine-Tuning LLaMA for Multi-Stage Text Retrieval).

    A pair reads ``<s> query: {query}<s> document: {title} {text}`` and is scored by a linear head on the
    last token's state after the last layer.

    Args:
        model: a PEFT ``SEQ_CLS`` adapter with its score head, or a merged ``*ForSequenceClassification``
            model: a folder or a hub id, which may name a revision (``"owner/name@v1"``); paths are kept absolute.
            ``"smollm2-135m"`` is the small adapter that comes with this package.
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
        device: for example ``"cuda:1"``; None for CUDA or MPS where there is one, else the CPU. Several,
            ``["cuda:0", "cuda:1"]``, each get a copy of the weights, and share out a frame's queries: each takes the
            next few when it is through with some, a query's candidates together. Kept as a tuple. :meth:`fit` takes
            one.
        dtype: ``"auto"`` is bfloat16 where the device computes in it natively, else float32; or name
            ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        quantization: hold the layers' linear projections in eight bits, by torchao (``pip install
            'pyterrier-llmrerank[quantization]'``): ``"int8"`` or ``"float8"``. Scores change. Activations are
            quantised too where that is fast: to int8 on CUDA, and on a CPU in fp32; to float8 on CUDA of
            capability 8.9 on, in bf16. Training and merged models are not quantised. None for not.
        torch_compile: compile the layers with torch.compile, on first use; batches of other shapes are not
            compiled anew. Needs a C++ compiler on a CPU. (Not named ``compile``: so PyTerrier's pipelines
            call their own compilation.)
        attn_implementation: the kernel of attention: ``"sdpa"``, ``"eager"``, ``"flex_attention"`` (compiled on
            first use, on CUDA and CPUs), ``"flash_attention_2"`` or ``"flash_attention_3"`` (on CUDA in bf16
            or fp16, where their packages are installed). None for ``"sdpa"``.
        verbose: show a progress bar.
        training: how :meth:`fit` trains; None for the original's settings.

    Raises:
        ValueError: an argument is not what is allowed.
        FileNotFoundError: a local checkpoint is not there. What is to come from the hub is looked for, and
            may fail, on first use.
        ImportError: a package that an option needs is not installed; on first use.

    >>> from pyterrier_llmrerank import RankLLaMAReranker
    >>> RankLLaMAReranker(passage_max_length=256)
    RankLLaMAReranker('castorini/rankllama-v1-7b-lora-passage', passage_max_length=256)
    """

    training: RankLLaMATraining | None
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
        device: str | Sequence[str] | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        torch_compile: bool = False,
        attn_implementation: str | None = None,
        verbose: bool = False,
        training: RankLLaMATraining | None = None,
    ) -> None:
        self._set_shared(
            model, text_field, batch_size, device, dtype, quantization, torch_compile, attn_implementation, verbose,
            training,
        )  # fmt: skip
        self.base_model = None if base_model is None else located(path_like("base_model", base_model))
        self.query_max_length = positive("query_max_length", query_max_length)
        self.passage_max_length = positive("passage_max_length", passage_max_length)
        self.title_field = None if title_field is None else column("title_field", title_field)
        self.url_field = None if url_field is None else column("url_field", url_field)
        require(self.model, "model")
        if self.base_model is not None:
            require(self.base_model, "base_model")
        #: The base that the adapter names, where that is a path: it means what it does when the reranker is made.
        self.named_base = named_base(self._source())
        if (folder := Path(self._source()).expanduser()).is_dir():  # fail now, not after a first stage has run
            described(self.model, folder, "rankllama", f"model={self.model!r}")
        if training is not None:
            from .training.recipes import RankLLaMATraining

            if not isinstance(training, RankLLaMATraining):
                raise ValueError(f"training={training!r}; allowed: RankLLaMATraining(...) or None.")

    @classmethod
    def untrained(cls, base: str, **options: Any) -> RankLLaMAReranker:
        """A re-ranker to :meth:`fit`, from a causal language model. It cannot score before.

        Args:
            base: a folder, ``.gguf`` file or hub id; ``"smollm2-135m"`` is the small model without its adapter.
            options: any of the constructor's other arguments; ``training`` holds the settings.

        Raises:
            ValueError: as the constructor; or ``base`` is an adapter.
            FileNotFoundError: as the constructor.

        >>> from pyterrier_llmrerank.training import RankLLaMATraining
        >>> RankLLaMAReranker.untrained("meta-llama/Llama-2-7b-hf", training=RankLLaMATraining(group_size=8))
        RankLLaMAReranker('meta-llama/Llama-2-7b-hf', training=RankLLaMATraining(group_size=8))
        """
        if (Path(base).expanduser() / "adapter_config.json").is_file():
            raise ValueError(f"base={str(base)!r}: an adapter, which is trained already; give it to the constructor.")
        return cls(bundled.base(str(base)), **options)

    def _checkpoint(self) -> partial[Any]:
        from .checkpoints.checkpoint import RankLLaMACheckpoint

        return partial(RankLLaMACheckpoint, *self._opened())

    def _source(self) -> str:
        """Where the model is: a folder, ``.gguf`` file or hub id."""
        return bundled.reranker(self.model, "rankllama")

    def _opened(self) -> tuple[str, str | None]:
        """Model and base model that are opened."""
        return self._source(), self.base_model or self.named_base

    def _shape(self, checkpoint: Checkpoint) -> Shape:
        from .engine.scoring import Shape

        self._check_layerwise(checkpoint)
        return Shape(cutoffs=(checkpoint.layers,), heads=(0,), attn_implementation=self.attn_implementation)

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

    def _recipe(self) -> Recipe:
        from .training.recipes import RankLLaMATraining

        return self.training or RankLLaMATraining()

    def _train(self, training: Frames, validation: Frames | None) -> Path:
        from .training.fitting import fit

        model, base_model = self._opened()
        return fit(
            self._recipe(), model, (), training, validation,
            device=self.device, dtype=self.dtype, verbose=self.verbose, base_model=base_model,
        )  # fmt: skip

    def _base(self) -> str:
        """What the adapter is put on, or what one is to be."""
        return cast("RankLLaMACheckpoint", self._checkpoint()()).base

    def _take_up(self, adapter: str) -> None:
        self.base_model, self.model = located(self._base()), adapter

    def set_parameter(self, name: str, value: Any) -> None:
        """Change a constructor argument; all is as for :meth:`LLMReranker.set_parameter`."""
        before = self.model
        super().set_parameter(name, value)
        if self.model != before:  # another one may name another base
            self.named_base = named_base(self._source())

    def _shown(self, name: str) -> Any:
        value = getattr(self, name)
        return shown(value) if name == "base_model" and value is not None else value

    def _is_adapter(self) -> bool:
        return (folder_of(self._source(), "model") / "adapter_config.json").is_file()

    def save(self, folder: str | Path, *, merged: bool = False) -> None:
        """Write the trained model, in the form that the original programs, PEFT and the constructor open.

        A file ``reranker.json`` describes it, so that ``RankLLaMAReranker(folder)`` opens it.

        Args:
            folder: a new or an empty folder.
            merged: write one ``*ForSequenceClassification`` model, rather than the PEFT ``SEQ_CLS`` adapter
                with its score head. Weights are in ``dtype``, not quantised, the head is fp32.

        Raises:
            FileExistsError: there is something in the folder.
            ValueError: there is no adapter, or it is untrained.
        """
        from .checkpoints.saving import copy_adapter, write_merged, written_whole
        from .engine.weights import build_decoder

        weights = self._weights()
        checkpoint = weights.checkpoint
        heads = checkpoint.heads(checkpoint.tokenizer())  # raises where it is untrained
        if not merged and not self._is_adapter():
            raise ValueError(f"model={self.model!r} is no adapter; allowed: merged=True.")
        family = type(checkpoint.config).__name__.removesuffix("Config")
        settings = {"architectures": [f"{family}ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
        settings |= {"label2id": {"LABEL_0": 0}}
        with written_whole(Path(folder).expanduser()) as target:
            if merged:
                head = {"score.weight": heads}
                decoder, description = build_decoder(checkpoint), checkpoint.description()
                write_merged(checkpoint, decoder, head, settings, weights.dtype, target, description)
            else:
                copy_adapter(folder_of(self._source(), "model"), target, checkpoint.base, checkpoint.tokenizer())
                replace(checkpoint.description(), base=checkpoint.base, adapters=(".",)).write(target)
