"""Matroyshka's checkpoints: layer-wise models and plain language models, with a head for each of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..errors import short
from .adapters import Adapter
from .checkpoint import EMBEDDINGS, Checkpoint, silence_warnings
from .config import LAYER_WISE
from .description import Description
from .json_files import read_json
from .locate import adapter_folder, folder_of, portable
from .matroyshka_parts import Assembly, token_adapter_for


def is_layer_wise(model: str) -> bool:
    """Tell whether a model has layer-wise heads of its own.

    Raises:
        FileNotFoundError, ConnectionError: as :func:`~pyterrier_llmrerank.checkpoints.locate.folder_of`.
    """
    config = folder_of(model, "model") / "config.json"
    return config.is_file() and str(read_json(config).get("model_type")).startswith(LAYER_WISE)


class MatroyshkaCheckpoint(Checkpoint):
    """Reads a layer-wise checkpoint (``cost_wise_*``) or a plain causal LM, with adapters merged in order.

    A plain causal LM gets a head for each layer from ``start_layer`` on, each a copy of the row of ``Yes`` in its LM
    head. Without ``start_layer`` it has one such head, at its deepest layer. It reads no ``reranker.json``:
    ``parts`` hold the values from descriptions.

    Args:
        model: folder, ``.gguf`` file or hub id.
        adapters: LoRA folders, each a local one, one below the model's own folder, or a hub id.
        start_layer: the shallowest layer with a head.
        layer_sep: layers from one head to the next; 1 by default.
        overlay: folders of token adapters, to run over the weights with ``adapters`` merged in. Other rerankers can
            use the same weights without them.
        parts: the assembled parts, with the prompt, the lengths and the number of layers; None if there are none.
        named: the user's name for the model, if it was resolved to the base ``model``; for messages.

    Raises:
        FileNotFoundError, ConnectionError: as :func:`~pyterrier_llmrerank.checkpoints.locate.folder_of`.
        ValueError: ``start_layer`` or ``layer_sep`` does not fit the model, ``parts`` contradict the files, or as
            :class:`Checkpoint`.
    """

    kind = "matroyshka"

    def __init__(
        self,
        model: str,
        adapters: Sequence[str],
        start_layer: int | None,
        layer_sep: int | None = None,
        overlay: Sequence[str] = (),
        *,
        parts: Description | None = None,
        named: str | None = None,
    ) -> None:
        argument, folder_argument = f"model={model!r}", "model"
        if named not in (None, model):
            argument, folder_argument = f"base={model!r}", f"base of model={named!r}"
        super().__init__(folder_of(model, folder_argument), argument)
        #: The prompt and the lengths, from descriptions and the user.
        self.parts = Description(kind=self.kind) if parts is None else parts
        self.parts.check_layers(self.layers, f"model={named or model!r}")
        self.base = portable(model)
        self.start_layer, self.layer_sep = self._heads_at(start_layer, layer_sep)
        names = [("adapters", name) for name in adapters] + [("token_adapters", name) for name in overlay]
        self.adapters = [Adapter(adapter_folder(name, model), f"{role}: {name!r}", name) for role, name in names]
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
        """Describe the model with all its adapters merged in, as it was opened."""
        own = self.parts
        return replace(
            super().description(), start_layer=self.start_layer, layer_sep=self.layer_sep, prompt=own.prompt,
            query_max_length=own.query_max_length, max_length=own.max_length,
        )  # fmt: skip

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
        return name in self.lm_head_names or (self.layer_wise and name in heads)

    def head_module(self, index: int) -> str:
        """Return the name that the original training gives a head."""
        return f"lm_head.{index}.linear_head"

    def heads(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Read the heads of all layers, with adapters merged in."""
        modules = [self.head_module(index) for index in range(len(self.head_layers))]
        if self.layer_wise:
            names = [f"{module}.weight" for module in modules]
            self.check_weights(dict.fromkeys(names, (1, int(self.config.hidden_size))))
            return torch.stack([self.merged_head(self.read_stored(name), name) for name in names])
        yes = tokenizer("Yes", add_special_tokens=False)["input_ids"]
        if not yes:
            raise ValueError(f"{self.argument}: its tokenizer gives no token for 'Yes', whose row initialises heads.")
        row = self._lm_head_row(yes[-1])
        return torch.stack([self.merged_head(row, module) for module in modules])

    def _lm_head_row(self, token: int) -> Tensor:
        if not self.supports_layerwise:  # other families name their tables differently
            with self.blame_config(), silence_warnings():
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
        table = EMBEDDINGS if tied else "lm_head.weight"
        self.check_weights({table: (int(self.config.vocab_size), int(self.config.hidden_size))})
        return self._row(self.tensor(table), token)

    def _row(self, table: Tensor, token: int) -> Tensor:
        if token >= len(table):
            raise ValueError(f"{self.argument}: 'Yes' is token {token}, beyond the {len(table)} of its LM head.")
        return table[token]


def open_assembled(*named: Any, assembly: Assembly, ratio: int | None = None) -> MatroyshkaCheckpoint:
    """Open the checkpoint of assembled parts; files are downloaded.

    Args:
        named: values that are equal for equal weights, as far as these are known without a download. They only
            identify the call.
        assembly: the parts.
        ratio: lay the token adapter for this ratio over the weights, if there is one; None for no token adapter.
    """
    parts = assembly.parts(fetch=True)
    overlay = () if ratio is None else token_adapter_for(parts.token_adapters, ratio)
    return MatroyshkaCheckpoint(
        str(parts.base), parts.adapters, parts.start_layer, parts.layer_sep, overlay,
        parts=parts, named=str(assembly.given.base),
    )  # fmt: skip
