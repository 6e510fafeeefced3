"""Checkpoints: a decoder with its configuration, weights, tokenizer and scoring heads, and whether they fit."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from ..errors import reason, short
from .adapters import Adapter
from .buffers import is_computed
from .config import LAYER_WISE, blame_config, decoder_config
from .description import Description
from .families import FAMILIES
from .json_files import read_json, refuse_pointer
from .merging import MergedWeights
from .tokenizer import open_tokenizer, vocabulary_of

#: The name of RankLLaMA's head.
SCORE = "score.weight"

#: The name of a decoder's input embeddings.
EMBEDDINGS = "embed_tokens.weight"


@contextmanager
def silence_warnings() -> Iterator[None]:
    """Silence the warnings of transformers."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(40)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


class Checkpoint(MergedWeights, ABC):
    """Opens a decoder with its scoring heads, and reads both tensor by tensor, with LoRA adapters merged in.

    Args:
        folder: the folder of the decoder's files.
        argument: the caller's argument and its value, for messages.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the model's family is not supported.
    """

    #: The kind of reranker that opens the checkpoint.
    kind: ClassVar[str]

    def __init__(self, folder: Path, argument: str) -> None:
        super().__init__(folder, argument)
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            hint = (
                "it is a LoRA adapter: give the model it belongs to, and this folder among the adapters"
                if adapter
                else "it is not a model"
            )
            raise FileNotFoundError(f"{argument}: {folder} has no config.json; {hint}.")
        self.settings = read_json(folder / "config.json")
        self.config = decoder_config(self.settings, argument)
        #: The token adapters among the adapters. They run over the decoder's weights and are not merged into them.
        self.overlay: Sequence[Adapter] = ()
        #: The adapter that the user opened as the model, and that training continues; None without one.
        self.adapter: Adapter | None = None
        #: The model below the adapters, as the user or an adapter names it.
        self.base = ""

    def blame_config(self) -> AbstractContextManager[None]:
        """Return a context that turns any error in building the model into a ValueError that blames ``config.json``."""
        return blame_config(self.settings.get("model_type"), self.argument)

    def description(self) -> Description:
        """Describe the model with all its adapters merged in, so that it needs no base."""
        return Description(kind=self.kind, layers=self.layers)

    @property
    def all_adapters(self) -> list[Adapter]:
        """The adapters below, and the one that training continues."""
        return [*self.adapters, *([self.adapter] if self.adapter else [])]

    @property
    def layer_wise(self) -> bool:
        """Whether it is a layer-wise checkpoint, with a head for each of several layers."""
        return str(self.settings.get("model_type")).startswith(LAYER_WISE)

    @property
    def supports_layerwise(self) -> bool:
        """Whether its layers can be run one by one; else transformers' own forward runs them all."""
        return self.config.model_type in FAMILIES

    def require_layerwise(self, name: str, value: object, allowed: str) -> None:
        """Raise ValueError for an option's value if the layers cannot be run one by one."""
        if not self.supports_layerwise:
            raise ValueError(
                f"{name}={value!r}: the layers of {self.argument} (model_type {self.config.model_type!r}) cannot be "
                f"run one by one; allowed: {allowed}."
            )

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return int(self.config.num_hidden_layers)

    # -- heads

    @property
    @abstractmethod
    def head_layers(self) -> Sequence[int]:
        """The layers with a head, ascending; the k-th head belongs to the k-th of them."""

    @property
    def has_heads(self) -> bool:
        """Whether it has a scoring head; else one has to be trained first."""
        return True

    @abstractmethod
    def heads(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Read the heads, fp32 ``[heads, width]``.

        Raises:
            ValueError: a head is missing or has the wrong shape.
        """

    @abstractmethod
    def is_head(self, name: str) -> bool:
        """Tell whether a tensor in the files is a head, in use or not."""

    def head_module(self, index: int) -> str | None:
        """Return the module name under which an adapter may update a head; None if it cannot."""
        return None

    def merged_head(self, weight: Tensor, name: str, argument: str | None = None) -> Tensor:
        """Return a head with the updates of all adapters added, fp32 ``[width]``.

        Args:
            weight: the stored head.
            name: the name of its tensor.
            argument: the caller's argument and its value, for messages; None for the checkpoint's.

        Raises:
            ValueError: it has the wrong shape.
        """
        width = int(self.config.hidden_size)
        if weight.numel() != width:
            raise ValueError(
                f"{argument or self.argument}: head {name!r} is {list(weight.shape)}; expected [1, {width}]."
            )
        return self.merge_updates(name.removesuffix(".weight"), weight.reshape(1, width)).reshape(width).float()

    @cached_property
    def lm_head_names(self) -> set[str]:
        """The names that the language model's head may have in the files."""
        if self.supports_layerwise:
            return {"lm_head.weight"}
        with self.blame_config(), torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(self.config)  # type: ignore[no-untyped-call]
        head = causal.get_output_embeddings()
        heads = [(name, module) for name, module in causal.named_modules() if module is head]
        names = {f"{name}.{own}" for name, module in heads for own, _ in module.named_parameters()}
        return names | {"embed_out.weight"}  # its name in GPT-NeoX's files

    # -- tokenizer

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's own tokenizer, which makes the ids; the first call opens it."""
        return self._tokenizer

    @cached_property
    def public_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy for users, so that padding, truncation and tokens that they set do not change scores."""
        return copy.deepcopy(self._tokenizer)

    def _tokenizer_folder(self) -> Path:
        return self.folder

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        folder = self._tokenizer_folder()
        try:
            for name in vocabulary_of(folder) or ():  # files that are not used may be pointers
                refuse_pointer(folder / name)
            with silence_warnings():  # transformers warns of every unknown model type
                opened = open_tokenizer(folder, self.config)
            opened("Yes")  # some wrong settings raise only when they are used
            return opened
        except ImportError as error:
            raise ImportError(f"{self.argument}: {error}") from error
        except Exception as error:  # the tokenizers library has no exception class of its own
            raise ValueError(f"{self.argument}: no usable tokenizer in {folder}: {reason(error)}") from error

    # -- whether the parts fit

    def check_adapters(self, shapes: dict[str, tuple[int, ...]], weights: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless every adapter fits the decoder.

        Args:
            shapes: the shapes of the modules that LoRA may update.
            weights: the shapes of all weights, each of which an adapter may replace.
        """
        head_shape = (1, int(self.config.hidden_size))
        heads = {self.head_module(index): head_shape for index in range(len(self.head_layers))}
        for adapter in self.adapters:
            adapter.check(shapes | {name: shape for name, shape in heads.items() if name is not None})
            for name in sorted(adapter.whole.keys() - {SCORE}):
                if (shape := adapter.whole_shape(name)) != weights.get(name):
                    wanted = f"in the model it is {list(weights[name])}" if name in weights else "the model has none"
                    raise ValueError(f"{adapter.argument}: holds the whole tensor {name!r}, {list(shape)}; {wanted}.")

    def check_depth(self) -> None:
        """Raise ValueError unless the files hold as many layers as the configuration says."""
        deepest, beyond = (f"layers.{layer}." for layer in (self.layers - 1, self.layers))
        if not any(name.startswith(deepest) for name in self):
            wrong = f"no {deepest}*"
        elif any(name.startswith(beyond) for name in self):
            wrong = f"{beyond}* too"
        else:
            return
        raise ValueError(f"{self.argument}: num_hidden_layers is {self.layers}, but the checkpoint has {wrong}.")

    def check_unused(self, names: Iterable[str]) -> None:
        """Raise ValueError on a tensor that is not used although scores may depend on it.

        Args:
            names: the tensors in the files that the decoder does not have.
        """
        unknown = sorted(name for name in names if not is_computed(name, self.files) and not self.is_head(name))
        if unknown:
            raise ValueError(
                f"{self.argument}: the checkpoint has a tensor {short(unknown[0])}, which a model_type "
                f"{self.config.model_type!r} with this config.json does not have ({len(unknown)} such tensors); scores "
                "would ignore it."
            )
