"""Checkpoints: a decoder's configuration, tokenizer, weights with adapters merged in, and scoring heads."""

from __future__ import annotations

import copy
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers import logging as transformers_logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import reason, short
from .adapters import Adapter, canonical, merged
from .config import check_sizes, model_settings, read_json, refuse_pointer
from .description import FILE, Description, assemble, read_description, token_adapter_for
from .families import FAMILIES
from .locate import adapter_folder, folder_of, portable
from .tensors import TensorFiles
from .tokenizer import open_tokenizer, vocabulary_of

#: The start of a layer-wise model_type; the decoder's family follows.
LAYER_WISE = "cost_wise_"

#: Buffers that older releases of transformers stored, and that are computed now: rotary angles, and causal masks with
#: the value of what they hide.
ROTARY = re.compile(
    r"(.*\.)?((maybe_)?rotary(_pos)?(_emb)?\.((original_)?inv_freq|(cos|sin)_cached)|(attn|attention)\.embed_positions)"
)
MASK = re.compile(r"(.*\.)?(attn|attention)\.(bias|causal_mask)")
HIDDEN = re.compile(r"(.*\.)?(attn|attention)\.masked_bias")

#: The name of RankLLaMA's head.
SCORE = "score.weight"

#: The name of a decoder's input embeddings.
EMBEDDINGS = "embed_tokens.weight"


def is_layer_wise(model: str) -> bool:
    """Tell whether a model has layer-wise heads of its own.

    Raises:
        FileNotFoundError, ConnectionError: as :func:`~pyterrier_llmrerank.checkpoints.locate.folder_of`.
    """
    config = folder_of(model, "model") / "config.json"
    return config.is_file() and str(read_json(config).get("model_type")).startswith(LAYER_WISE)


@contextmanager
def silence_warnings() -> Iterator[None]:
    """Silence the warnings of transformers."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(40)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


class Checkpoint(ABC):
    """Read a decoder and its scoring heads tensor by tensor, with LoRA adapters merged in.

    Args:
        folder: the folder of the decoder's files.
        argument: the caller's argument and its value, for messages.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the model's family is not supported.
    """

    def __init__(self, folder: Path, argument: str) -> None:
        self.folder = folder
        self.argument = argument
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            hint = (
                "it is a LoRA adapter: give the model it belongs to, and this as one of adapters"
                if adapter
                else "it is no model"
            )
            raise FileNotFoundError(f"{argument}: {folder} has no config.json; {hint}.")
        self.settings = read_json(folder / "config.json")
        self.config = self._decoder_config()
        #: The adapters of this checkpoint.
        self.adapters: Sequence[Adapter] = ()
        #: The token adapters among them, which run over the decoder's weights rather than being merged into them.
        self.overlay: Sequence[Adapter] = ()
        #: The adapter that the user opened as the model, and that training continues; None without one.
        self.adapter: Adapter | None = None
        #: The model below the adapters, as the user or an adapter names it.
        self.base = ""

    def _decoder_config(self) -> PreTrainedConfig:
        model_type = str(self.settings.get("model_type"))
        family = model_type.removeprefix(LAYER_WISE)
        if self.layer_wise and family not in FAMILIES:  # published models of other types hold another family's weights
            called = "; published models of this type hold Gemma 2 weights" if family == "gemma" else ""
            raise ValueError(
                f"{self.argument}: model_type {short(model_type)} is not supported{called}; "
                f"layer-wise models that open: {', '.join(LAYER_WISE + known for known in FAMILIES)}."
            )
        if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(
                f"{self.argument}: model_type {short(model_type)} is not supported; allowed: {', '.join(FAMILIES)} "
                "and transformers' other causal language models."
            )
        if self.settings.get("quantization_config"):
            raise ValueError(f"{self.argument}: its weights are quantised; open the model they were made from.")
        check_sizes(self.settings, CONFIG_MAPPING[family].attribute_map, self.argument)
        settings = model_settings(self.settings)
        if settings.get("sliding_window") == 0:  # some configurations of transformers mean no window
            settings["sliding_window"] = None
        with self.described():
            config = CONFIG_MAPPING[family].from_dict(settings)
        if config.is_encoder_decoder:
            raise ValueError(
                f"{self.argument}: model_type {model_type!r} is an encoder and a decoder; expected a decoder alone."
            )
        if getattr(config, "is_causal", True) is not True:  # transformers lets such a model see later tokens
            raise ValueError(
                f"{self.argument}: is_causal is {short(config.is_causal)} in config.json; allowed: true, because a "
                "token of a reranker never sees later ones."
            )
        rope = getattr(config, "rope_parameters", None)
        rotary = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
        if rotary in ("dynamic", "longrope"):
            raise ValueError(
                f"{self.argument}: rope_type {rotary!r} is not supported: its angles depend on the longest row of "
                "a batch, so that a score would depend on its neighbours."
            )
        return config

    @contextmanager
    def described(self) -> Iterator[None]:
        """Raise ValueError on any error inside, where transformers builds a model from the configuration."""
        try:
            yield
        except Exception as error:  # it checks little, so that nonsense fails anywhere with any error
            family = short(self.settings.get("model_type"))
            raise ValueError(
                f"{self.argument}: config.json does not describe a model_type {family}: {reason(error)}"
            ) from error

    #: The kind of reranker that opens it.
    kind: ClassVar[str]

    def description(self) -> Description:
        """Describe the model with all its adapters merged in, so that it needs no base."""
        return Description(kind=self.kind, layers=self.layers)

    @property
    def layer_wise(self) -> bool:
        """Whether it is a layer-wise checkpoint, with a head for each of several layers."""
        return str(self.settings.get("model_type")).startswith(LAYER_WISE)

    @property
    def supports_layerwise(self) -> bool:
        """Whether its layers can be run one by one; else transformers' own forward runs them all."""
        return self.config.model_type in FAMILIES

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return int(self.config.num_hidden_layers)

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
        """Tell whether a tensor in the files is a head, whether it is needed or not."""

    def head_module(self, index: int) -> str | None:
        """Return the module name under which an adapter may update a head; None if it cannot."""
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's own tokenizer, which makes the ids; it is opened once."""
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

    @cached_property
    def files(self) -> TensorFiles:
        """The weight files; opening them reads no weight."""
        return TensorFiles(self.folder, "model", self.argument)

    @cached_property
    def _names(self) -> dict[str, str]:
        """The tensors' names in the files, by their names in the headless decoder."""
        names: dict[str, str] = {}
        for name in self.files:
            if (same := names.setdefault(canonical(name), name)) != name:
                raise ValueError(f"{self.argument}: the checkpoint has both {same!r} and {name!r}; expected one.")
        return names

    @cached_property
    def _lm_head(self) -> set[str]:
        """The names of the language model's head in the files."""
        if self.supports_layerwise:
            return {"lm_head.weight"}
        with self.described(), torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(self.config)  # type: ignore[no-untyped-call]
        head = causal.get_output_embeddings()
        heads = [(name, module) for name, module in causal.named_modules() if module is head]
        names = {f"{name}.{own}" for name, module in heads for own, _ in module.named_parameters()}
        return names | {"embed_out.weight"}  # its name in GPT-NeoX's files

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

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
        if not any(name.startswith(deepest) for name in self._names):
            wrong = f"no {deepest}*"
        elif any(name.startswith(beyond) for name in self._names):
            wrong = f"{beyond}* too"
        else:
            return
        raise ValueError(f"{self.argument}: num_hidden_layers is {self.layers}, but the checkpoint has {wrong}.")

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the files hold these weights.

        Args:
            shapes: their shapes, by their names in the headless decoder.
        """
        for name, wanted in shapes.items():
            if self._replacing_adapter(name) is not None:
                continue
            if name not in self:
                raise ValueError(f"{self.argument}: the checkpoint has no tensor {name!r}.")
            if (shape := self.files.shape(self._names[name])) != wanted:
                raise ValueError(
                    f"{self.argument}: tensor {name!r} is {list(shape)}, its config.json asks for {list(wanted)}."
                )

    def check_unused(self, names: Iterable[str]) -> None:
        """Raise ValueError on a tensor that is not used although scores may depend on it.

        Args:
            names: the tensors in the files that the decoder does not have.
        """
        unknown = sorted(name for name in names if not self._is_computed(name) and not self.is_head(name))
        if unknown:
            raise ValueError(
                f"{self.argument}: the checkpoint has a tensor {short(unknown[0])}, which a model_type "
                f"{self.config.model_type!r} with this config.json does not have ({len(unknown)} such tensors); scores "
                "would ignore it."
            )

    def _is_computed(self, name: str) -> bool:
        """Tell whether a tensor in the files, known by its name there or a part of it, is a buffer that is computed."""
        if ROTARY.fullmatch(name):
            return True
        same = (file for file in self.files if f".{file}".endswith(f".{name}") or f".{name}".endswith(f".{file}"))
        shapes = [self.files.shape(file) for file in same]
        if HIDDEN.fullmatch(name):
            return all(math.prod(shape) == 1 for shape in shapes)
        masks = all(len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] for shape in shapes)
        return MASK.fullmatch(name) is not None and masks

    def tensor(self, name: str) -> Tensor:
        """Read a weight by its name in the headless decoder: fp32 if an adapter updates it, else in its stored dtype.

        Raises:
            ValueError: the checkpoint has no such tensor, or its dtype is not allowed for weights.
        """
        return self.merge_updates(name.removesuffix(".weight"), self._stored(name))

    def place(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Read a weight as :meth:`tensor` does, and return a copy on a device, with no larger one on the way."""
        module, stored = name.removesuffix(".weight"), self._stored(name)
        if updates := self._updates(module):
            return merged(stored, updates, dtype, device)
        return stored.to(device=device, dtype=dtype, copy=True)

    def _stored(self, name: str) -> Tensor:
        """Read a weight without updates, perhaps from the adapter that replaces it as a whole."""
        if (adapter := self._replacing_adapter(name)) is not None:
            return adapter.read_whole(name)
        if name not in self:
            raise ValueError(f"{self.argument}: the checkpoint has no tensor {name!r}.")
        return self.files.read(self._names[name])

    def _replacing_adapter(self, name: str) -> Adapter | None:
        """Return the adapter that replaces a weight as a whole, None if there is none."""
        return next((adapter for adapter in self.adapters if name in adapter.whole), None)

    def _updates(self, module: str) -> list[tuple[Tensor, Tensor]]:
        """Return the factors of a module's updates by all adapters, in order."""
        return [adapter.factors(module) for adapter in self.adapters if module in adapter.modules]

    def merge_updates(self, module: str, weight: Tensor) -> Tensor:
        """Return a weight of a module with the updates of all adapters added; the weight itself without any."""
        updates = self._updates(module)
        return merged(weight, updates, torch.float32) if updates else weight

    def _head(self, weight: Tensor, name: str, argument: str | None = None) -> Tensor:
        width = int(self.config.hidden_size)
        if weight.numel() != width:
            raise ValueError(
                f"{argument or self.argument}: head {name!r} is {list(weight.shape)}; expected [1, {width}]."
            )
        return self.merge_updates(name.removesuffix(".weight"), weight.reshape(1, width)).reshape(width).float()

    def _stored_head(self, name: str) -> Tensor:
        """Read a head from the model's own files, with adapters merged in."""
        return self._head(self.files.read(self._names[name]), name)


class RankLLaMACheckpoint(Checkpoint):
    """Read a PEFT SEQ_CLS adapter and its base, or a merged ``*ForSequenceClassification`` model.

    Args:
        model: the adapter or the merged model: folder, ``.gguf`` file or hub id.
        base_model: the base of the adapter, which overrides the base that the adapter names.

    Raises:
        FileNotFoundError, ConnectionError: as :func:`~pyterrier_llmrerank.checkpoints.locate.folder_of`.
        ValueError: ``base_model`` is given but ``model`` is no adapter, ``reranker.json`` contradicts the files, or as
            :class:`Checkpoint`.
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
            raise FileNotFoundError(f"{argument}: {folder / FILE} describes an adapter, but no adapter_config.json.")
        elif base_model is not None:
            raise ValueError(
                f"base_model={base_model!r} is given, but {argument} is no adapter (no adapter_config.json)."
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
        return name == "score.weight" or name.startswith("lm_head.") or name in self._lm_head

    def heads(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Read the ``score`` head, from the adapter if it has one."""
        if self.adapter is not None and SCORE in self.adapter.whole:
            return self._head(self.adapter.read_whole(SCORE), SCORE, self.adapter.argument)[None]
        if SCORE not in self:
            raise ValueError(
                f"{self.argument}: no score head ({SCORE!r}), neither in an adapter nor in the model; "
                "expected a RankLLaMA adapter or a *ForSequenceClassification model with one label, or fit() first."
            )
        return self._stored_head(SCORE)[None]

    def _tokenizer_folder(self) -> Path:
        """Return the adapter's folder if it has a vocabulary, else the base's."""
        return self.folder if vocabulary_of(self._adapter_folder) is None else self._adapter_folder


class MatroyshkaCheckpoint(Checkpoint):
    """Read a layer-wise checkpoint (``cost_wise_*``) or a plain causal LM, with adapters merged in order.

    A plain causal LM gets a head for each layer from ``start_layer`` on, each a copy of the row of ``Yes`` in its LM
    head. Without ``start_layer`` it has one such head, at its deepest layer. A model with ``reranker.json`` opens by
    its description, in which arguments replace its values.

    Args:
        model: folder, ``.gguf`` file or hub id.
        adapters: LoRA folders, each a local one, one below the model's own folder, or a hub id.
        start_layer: the shallowest layer with a head.
        layer_sep: layers from one head to the next; 1 by default.
        overlay: folders of token adapters, to run over the weights with ``adapters`` merged in. The weights can serve
            without them too.
        ratio: use the model's own token adapter for this ratio, if it has one.

    Raises:
        FileNotFoundError, ConnectionError: as :func:`~pyterrier_llmrerank.checkpoints.locate.folder_of`.
        ValueError: ``start_layer`` or ``layer_sep`` does not fit the model, ``reranker.json`` contradicts the files, or
            as :class:`Checkpoint`.
    """

    kind = "matroyshka"

    def __init__(
        self,
        model: str,
        adapters: Sequence[str],
        start_layer: int | None,
        layer_sep: int | None = None,
        overlay: Sequence[str] = (),
        ratio: int | None = None,
    ) -> None:
        folder, argument = folder_of(model, "model"), f"model={model!r}"
        given = Description(
            kind=self.kind, base=model, adapters=tuple(adapters), start_layer=start_layer, layer_sep=layer_sep
        )
        parts = assemble(given, folder, argument)
        if (base := cast(str, parts.base)) != model:
            folder, argument = folder_of(base, f"base of {argument}"), f"base={base!r}"
        super().__init__(folder, argument)
        parts.check_layers(self.layers, f"model={model!r}")
        self.base = portable(base)
        #: The question that the model's description names; None if it names none.
        self.prompt = parts.prompt
        adapters, start_layer = parts.adapters, parts.start_layer
        overlay = (*overlay, *(token_adapter_for(parts.token_adapters, ratio) if ratio else ()))
        self.start_layer, self.layer_sep = self._heads_at(start_layer, parts.layer_sep)
        names = [("adapters", name) for name in adapters] + [("token_adapters", name) for name in overlay]
        self.adapters = [Adapter(adapter_folder(name, base), f"{role}: {name!r}", name) for role, name in names]
        self.overlay = self.adapters[len(adapters) :]
        for adapter in self.adapters:
            if adapter.whole:
                raise ValueError(
                    f"{adapter.argument}: holds whole tensors {sorted(adapter.whole)}; expected plain LoRA."
                )
            updated = adapter.modules_ending_in("linear_head")
            if updated and not self.layer_wise and start_layer is None:
                raise ValueError(
                    f"{adapter.argument}: updates layer-wise heads (linear_head), but {self.argument} has none; "
                    "give the start_layer with which it was trained."
                )
            if updated and updated != {self.head_module(index) for index in range(len(self.head_layers))}:
                raise ValueError(
                    f"{adapter.argument}: updates {len(updated)} layer-wise heads (linear_head), {self.argument} has "
                    f"{len(self.head_layers)} from start_layer={self.start_layer} on; the two must agree."
                )

    def _heads_at(self, start_layer: int | None, layer_sep: int | None) -> tuple[int, int]:
        if self.layer_wise:
            start, step = self.settings.get("start_layer"), self.settings.get("layer_sep", 1)
            for name, given, own in (("start_layer", start_layer, start), ("layer_sep", layer_sep, step)):
                if given not in (None, own):
                    raise ValueError(f"{name}={given}: {self.argument} was trained with {name} {short(own)}.")
        else:
            start, step = self.layers if start_layer is None else start_layer, layer_sep or 1
        if type(start) is not int or type(step) is not int or not 1 <= start <= self.layers or step < 1:
            raise ValueError(
                f"start_layer={short(start)}, layer_sep={short(step)}: {self.argument} has {self.layers} layers; "
                f"allowed: integers, from 1 to {self.layers} and from 1 on."
            )
        return start, step

    def description(self) -> Description:
        """Describe the model with all its adapters merged in; the prompt is the caller's."""
        return replace(super().description(), start_layer=self.start_layer, layer_sep=self.layer_sep)

    def pad_id(self) -> int:
        """Return the tokenizer's pad token, on which the released code's scores depend.

        Raises:
            ValueError: it has none.
        """
        pad_id = self.tokenizer().pad_token_id
        if pad_id is None:
            raise ValueError(
                f"released=True: the tokenizer of {self.argument} has no pad token, which scores depend on."
            )
        return int(pad_id)

    @property
    def head_layers(self) -> Sequence[int]:
        """Every ``layer_sep``-th layer from ``start_layer`` to the deepest."""
        return range(self.start_layer, self.layers + 1, self.layer_sep)

    def is_head(self, name: str) -> bool:
        """Tell whether a tensor is a layer's head, or the language model's."""
        heads = {f"{self.head_module(index)}.weight" for index in range(len(self.head_layers))}
        return name in self._lm_head or (self.layer_wise and name in heads)

    def head_module(self, index: int) -> str:
        """Return the name that the original training gives a head."""
        return f"lm_head.{index}.linear_head"

    def heads(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Read the heads of all layers, with adapters merged in."""
        modules = [self.head_module(index) for index in range(len(self.head_layers))]
        if self.layer_wise:
            self.check_weights({f"{module}.weight": (1, int(self.config.hidden_size)) for module in modules})
            return torch.stack([self._stored_head(f"{module}.weight") for module in modules])
        yes = tokenizer("Yes", add_special_tokens=False)["input_ids"]
        if not yes:
            raise ValueError(f"{self.argument}: its tokenizer makes no token of 'Yes', whose row initialises heads.")
        row = self._lm_head_row(yes[-1])
        return torch.stack([self._head(row, module) for module in modules])

    def _lm_head_row(self, token: int) -> Tensor:
        if not self.supports_layerwise:  # other families name their tables differently
            with self.described(), silence_warnings():
                opened: Any = AutoModelForCausalLM.from_pretrained(
                    self.folder,
                    config=self.config,
                    dtype="auto",
                    output_loading_info=True,
                    use_safetensors=self.files.safetensors,
                )
            causal, loading = opened
            if missing := loading["missing_keys"]:
                raise ValueError(f"{self.argument}: the checkpoint has no tensor {min(missing)!r}.")
            self.check_unused(loading["unexpected_keys"])
            return self._row(causal.get_output_embeddings().weight.data, token)
        tied = self.config.tie_word_embeddings and "lm_head.weight" not in self
        table = "embed_tokens.weight" if tied else "lm_head.weight"
        self.check_weights({table: (int(self.config.vocab_size), int(self.config.hidden_size))})
        return self._row(self.tensor(table), token)

    def _row(self, table: Tensor, token: int) -> Tensor:
        if token >= len(table):
            raise ValueError(f"{self.argument}: 'Yes' is token {token}, beyond the {len(table)} of its LM head.")
        return table[token]
