"""Write a reranker as one model with all adapters merged in: layer-wise, or a classifier for other programs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .checkpoints import tokenizer as tokenizers
from .checkpoints.cards import exported_card, merged_card
from .checkpoints.description import EXPORTED, Description
from .checkpoints.input_format import InputFormat
from .checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
from .checkpoints.saving import all_or_nothing, classifier_settings, write_merged
from .engine.inputs import Encoding, MatroyshkaInputs, special_ids
from .engine.weights import Weights, build_decoder

#: Pairs whose ids show whether another program reads an exported tokenizer as intended.
PROBES = [("what is tea?", "Leaves, 42 of them."), (" two  spaces\n", "naïve 大熊猫</s> don't"), ("", "")]


def write_layer_wise(weights: Weights, parts: Description, folder: Path) -> None:
    """Write a Matroyshka as one layer-wise model (``cost_wise_*``) with the heads of all its layers.

    Args:
        weights: the model.
        parts: describes the model's input.
        folder: a new or an empty folder.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the model does not support layer-wise execution.
    """
    checkpoint = cast(MatroyshkaCheckpoint, weights.checkpoint)
    heads = _heads(weights)
    settings = {
        "model_type": f"cost_wise_{checkpoint.config.model_type}",
        "architectures": [f"CostWise{type(checkpoint.config).__name__.removesuffix('Config')}ForCausalLM"],
        "start_layer": checkpoint.start_layer, "layer_sep": checkpoint.layer_sep, "layer_wise": True,
    }  # fmt: skip
    named = {f"{checkpoint.head_module(number)}.weight": head[None] for number, head in enumerate(heads)}
    description = replace(
        checkpoint.description(), prompt=parts.prompt,
        query_max_length=parts.query_max_length, max_length=parts.max_length,
    )  # fmt: skip
    with all_or_nothing(folder):
        _write(weights, named, settings, description, folder)


def write_depth(weights: Weights, layer: int, inputs: MatroyshkaInputs, base: str | None, folder: Path) -> None:
    """Write a Matroyshka down to one layer as a plain classifier, with a tokenizer that turns pairs into ids.

    Args:
        weights: the model.
        layer: the layer, which has a head.
        inputs: the encoding that the tokenizer reproduces and the model card describes.
        base: the model that the card names.
        folder: a new or an empty folder.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the model does not support layer-wise execution, or transformers gives other ids with the tokenizer.
    """
    checkpoint = weights.checkpoint
    head = _heads(weights)[checkpoint.head_layers.index(layer)]
    instructions = inputs.query_instruction, inputs.passage_instruction
    tokenizer = copy.deepcopy(checkpoint.tokenizer())
    pieces = inputs.pieces(tokenizer)
    settings = classifier_settings(checkpoint, pieces[-1]) | {"num_hidden_layers": layer}
    if kinds := checkpoint.settings.get("layer_types"):
        settings["layer_types"] = kinds[:layer]
    wanted = [ids.flat() for ids in MatroyshkaInputs(inputs.prompt)(tokenizer, PROBES)]  # of any length
    tokenizers.set_pair(tokenizer, special_ids(tokenizer), pieces, checkpoint.argument)
    limits = inputs.query_limit, inputs.max_length
    card = exported_card(base, settings, weights.dtype, pieces, instructions, limits)
    description = Description(kind=EXPORTED, layers=layer, prompt=inputs.prompt)
    with all_or_nothing(folder):
        _write(weights, {"score.weight": head[None]}, settings, description, folder, tokenizer, card)
        texts = [(instructions[0] + query, instructions[1] + passage) for query, passage in PROBES]
        tokenizers.check_pairs(folder, texts, wanted, checkpoint.argument)


def write_rankllama(
    weights: Weights, inputs: Encoding, columns: tuple[bool, bool], description: Description, folder: Path
) -> None:
    """Write a RankLLaMA as one ``*ForSequenceClassification`` model.

    Args:
        weights: the model.
        inputs: the encoding of its input.
        columns: whether it reads titles, and URLs.
        description: describes the input.
        folder: a new or an empty folder.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the model does not support layer-wise execution, or is untrained.
    """
    checkpoint, form = weights.checkpoint, description.input_format or InputFormat()
    head = _heads(weights)
    settings = classifier_settings(checkpoint, inputs(checkpoint.tokenizer(), [("", "")])[0].suffix)
    limits = inputs.query_max_length, inputs.passage_max_length
    card = merged_card(checkpoint.base, settings["architectures"][0], form, columns, limits)
    with all_or_nothing(folder):
        _write(weights, {"score.weight": head}, settings, description, folder, card=card)


def _heads(weights: Weights) -> Tensor:
    """Return the heads, ``[heads, hidden]``; ValueError if the model cannot be merged or is untrained."""
    weights.checkpoint.require_layerwise("merged", True, "False")
    return weights.checkpoint.heads(weights.checkpoint.tokenizer())


def _write(
    weights: Weights,
    heads: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    description: Description,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
) -> None:
    checkpoint = weights.checkpoint
    write_merged(
        checkpoint, build_decoder(checkpoint), heads, settings, weights.dtype, folder, description, tokenizer, card
    )
