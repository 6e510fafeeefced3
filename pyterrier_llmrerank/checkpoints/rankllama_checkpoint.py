"""RankLLaMA's checkpoints: an adapter with its base, or a merged classifier, and the ``score`` head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import short
from .adapters import Adapter
from .checkpoint import EMBEDDINGS, SCORE, Checkpoint
from .config import check_sizes
from .description import FILE, Description, read_description
from .locate import folder_of, portable
from .tokenizer import vocabulary_of


class RankLLaMACheckpoint(Checkpoint):
    """Reads a PEFT SEQ_CLS adapter and its base, or a merged ``*ForSequenceClassification`` model.

    Args:
        model: the adapter or the merged model: folder, ``.gguf`` file or hub id.
        base_model: the base to use in place of the one that the adapter names; None for the adapter's.

    Raises:
        FileNotFoundError, ConnectionError: as :func:`~pyterrier_llmrerank.checkpoints.locate.folder_of`.
        ValueError: ``base_model`` is given but ``model`` is not an adapter, ``reranker.json`` contradicts the files, or
            as :class:`Checkpoint`.
    """

    kind = "rankllama"

    def __init__(self, model: str, base_model: str | None) -> None:
        folder = folder_of(model, "model")
        argument = f"model={model!r}"
        adapter, base = None, model
        own = read_description(model, folder, "rankllama", argument)
        self._adapter_folder = folder
        #: The format of its input, if its description names one.
        self.input_format = None if own is None else own.input_format
        self._own_description = Description(kind=self.kind) if own is None else own
        if (folder / "adapter_config.json").is_file():
            adapter = Adapter(folder, argument)
            if own is not None and own.base != adapter.base:
                raise ValueError(
                    f"{argument}: base is {short(own.base)} in {FILE}, but {short(adapter.base)} in "
                    "adapter_config.json; the two must agree."
                )
            base = base_model or adapter.base
            folder = folder_of(base_model, "base_model") if base_model else adapter.base_folder()
            argument = f"base_model={base!r}"
        elif own is not None and own.adapters:
            raise FileNotFoundError(f"{argument}: {folder / FILE} describes an adapter without adapter_config.json.")
        elif base_model is not None:
            raise ValueError(
                f"base_model={base_model!r} is given, but {argument} is not an adapter (no adapter_config.json)."
            )
        super().__init__(folder, argument)
        self.base = portable(base)
        if own is not None:
            own.check_layers(self.layers, f"model={model!r}")
        if adapter is not None:
            self.adapter, self.adapters = adapter, (adapter,)
            if self.supports_layerwise and EMBEDDINGS in adapter.whole:  # perhaps of more tokens than the base has
                tokens = next(iter(adapter.whole_shape(EMBEDDINGS)), 0)
                check_sizes({"vocab_size": tokens}, {}, adapter.argument)
                self.config.vocab_size = self.settings["vocab_size"] = tokens

    def description(self) -> Description:
        """Describe the model with all its adapters merged in, with the lengths in its own description."""
        lengths = {name: getattr(self._own_description, name) for name in ("query_max_length", "passage_max_length")}
        return replace(super().description(), **lengths)

    @property
    def head_layers(self) -> Sequence[int]:
        """The deepest layer alone."""
        return (self.layers,)

    @property
    def has_heads(self) -> bool:
        """Whether the adapter or the model has a ``score`` head."""
        return (self.adapter is not None and SCORE in self.adapter.whole) or SCORE in self

    def is_head(self, name: str) -> bool:
        """Tell whether a tensor is the ``score`` head, or the head of a language model or Matroyshka."""
        return name == SCORE or name.startswith("lm_head.") or name in self.lm_head_names

    def heads(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Read the ``score`` head, from the adapter if it has one."""
        if self.adapter is not None and SCORE in self.adapter.whole:
            return self.merged_head(self.adapter.read_whole(SCORE), SCORE, self.adapter.argument)[None]
        if SCORE not in self:
            raise ValueError(
                f"{self.argument}: no score head ({SCORE!r}), neither in an adapter nor in the model; "
                "expected a RankLLaMA adapter or a *ForSequenceClassification model with one label, or fit() first."
            )
        return self.merged_head(self.read_stored(SCORE), SCORE)[None]

    def _tokenizer_folder(self) -> Path:
        """Return the adapter's folder if it has a vocabulary, else the base's."""
        return self.folder if vocabulary_of(self._adapter_folder) is None else self._adapter_folder
