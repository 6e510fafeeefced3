"""The configuration of a decoder: the settings in its ``config.json``, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import reason, short
from .families import FAMILIES

#: The start of a layer-wise model_type; the decoder's family follows.
LAYER_WISE = "cost_wise_"

#: The largest value of each size in a configuration: ten times that of any known model, yet small enough to build
#: without weights in little memory. The tensors must agree with it in any case.
MAX_SIZES = {
    "num_hidden_layers": 10_000,
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
        2**24,
    ),
    "sliding_window": 2**31,
}

#: Settings to ignore: they have no effect on a headless decoder in our own dtype, or could make transformers fetch
#: code.
IGNORED_SETTINGS = {
    "model_type", "auto_map", "architectures", "transformers_version", "dtype", "torch_dtype", "num_labels", "id2label",
    "label2id", "problem_type", "attn_implementation", "experts_implementation",
}  # fmt: skip


def model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove the :data:`IGNORED_SETTINGS` and the private settings of transformers, at any depth."""
    return {
        key: model_settings(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in IGNORED_SETTINGS and not key.startswith("_")
    }


def check_sizes(settings: Mapping[str, Any], names: Mapping[str, str], argument: str) -> None:
    """Raise ValueError on sizes that no model has, before anything of that size is built.

    Args:
        settings: a checkpoint's configuration.
        names: the family's own names for some of :data:`MAX_SIZES`.
        argument: the caller's argument and its value, for messages.
    """
    for usual, largest in MAX_SIZES.items():
        for name in {usual, names.get(usual, usual)}:
            value = settings.get(name)
            if value is None or (name == "sliding_window" and value == 0):  # both mean no sliding window
                continue
            sizes = value if isinstance(value, list) else [value]  # some families have one for each layer
            if not all(type(size) is int and 1 <= size <= largest for size in sizes):
                raise ValueError(f"{argument}: {name} is {short(value)}; allowed: integers from 1 to {largest}.")


@contextmanager
def blame_config(model_type: object, argument: str) -> Iterator[None]:
    """Turn any error inside, where transformers builds a model, into a ValueError that blames ``config.json``."""
    try:
        yield
    except Exception as error:  # transformers checks little: a wrong setting may fail anywhere, with any error
        raise ValueError(
            f"{argument}: config.json does not describe a model_type {short(model_type)}: {reason(error)}"
        ) from error


def decoder_config(settings: dict[str, Any], argument: str) -> PreTrainedConfig:
    """Check a causal decoder's settings, and return them as a configuration of transformers.

    Args:
        settings: the content of ``config.json``.
        argument: the caller's argument and its value, for messages.

    Raises:
        ValueError: the model is of a family that is not supported, is quantised or is not a causal decoder, or a
            setting is not allowed.
    """
    family = _family(settings, argument)
    if settings.get("quantization_config"):
        raise ValueError(f"{argument}: its weights are quantised; open the model that they were quantised from.")
    check_sizes(settings, CONFIG_MAPPING[family].attribute_map, argument)
    kept = model_settings(settings)
    if kept.get("sliding_window") == 0:  # in some configurations of transformers, 0 means no window
        kept["sliding_window"] = None
    with blame_config(settings.get("model_type"), argument):
        config = CONFIG_MAPPING[family].from_dict(kept)
    if config.is_encoder_decoder:
        raise ValueError(f"{argument}: model_type {family!r} is an encoder and a decoder; expected a decoder alone.")
    if getattr(config, "is_causal", True) is not True:  # transformers lets such a model see later tokens
        raise ValueError(
            f"{argument}: is_causal is {short(config.is_causal)} in config.json; allowed: true, because a token of a "
            "reranker never sees later ones."
        )
    rope = getattr(config, "rope_parameters", None)
    rotary = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    if rotary in ("dynamic", "longrope"):
        raise ValueError(
            f"{argument}: rope_type {rotary!r} is not supported: its angles depend on the longest row of a batch, so "
            "that a score would depend on its neighbours."
        )
    return config


def _family(settings: Mapping[str, Any], argument: str) -> str:
    """Return the family of a decoder.

    Raises:
        ValueError: the family is not supported.
    """
    model_type = str(settings.get("model_type"))
    family = model_type.removeprefix(LAYER_WISE)
    if model_type != family and family not in FAMILIES:  # published models of other types hold another family's weights
        called = "; published models of this type hold Gemma 2 weights" if family == "gemma" else ""
        raise ValueError(
            f"{argument}: model_type {short(model_type)} is not supported{called}; "
            f"layer-wise models that open: {', '.join(LAYER_WISE + known for known in FAMILIES)}."
        )
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{argument}: model_type {short(model_type)} is not supported; allowed: {', '.join(FAMILIES)} "
            "and transformers' other causal language models."
        )
    return family
