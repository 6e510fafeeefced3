"""Open tokenizers so that they give the same ids as the code that made their vocabulary.

The class that transformers picks rebuilds a tokenizer from its vocabulary and the defaults of the class. It ignores
the other files. Here ``tokenizer.json`` is taken literally, and sentencepiece itself runs ``tokenizer.model``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from ..errors import reason, short
from .json_files import read_json

#: The files that may hold a vocabulary; the first ones found are used.
VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


class LlamaTokenizer(SentencePieceBackend):
    """Tokenizes for Llama and Mistral. The class has the name that saved tokenizers give their class.

    Unless ``legacy``, the text after a special token gets no leading space.
    """

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        """Split a text into pieces."""
        if self.legacy or not text:
            return list(super().tokenize(text, *args, **kwargs))
        prefix = "" if self.init_kwargs.get("add_prefix_space") is False else "▁"
        tokens: list[str] = super().tokenize(prefix + text.replace("▁", " "), *args, **kwargs)
        if tokens[:1] == ["▁"] and tokens[1:2] and tokens[1] in self.all_special_tokens:
            return tokens[1:]
        return tokens


class GemmaTokenizer(SentencePieceBackend):
    """Tokenizes for Gemma. The class has the name that saved tokenizers give their class."""


#: Classes of tokenizers that are a sentencepiece model and nothing else, by the name in a folder's settings.
SENTENCEPIECE: dict[str | None, type[SentencePieceBackend]] = {
    None: LlamaTokenizer,
    "LlamaTokenizer": LlamaTokenizer,
    "CodeLlamaTokenizer": LlamaTokenizer,
    "GemmaTokenizer": GemmaTokenizer,
}

#: Classes of byte-level BPE tokenizers.
BYTE_LEVEL: dict[str | None, type[PreTrainedTokenizerBase]] = {
    "GPT2Tokenizer": GPT2Tokenizer,
    "Qwen2Tokenizer": Qwen2Tokenizer,
}

#: Classes that do not define a first token.
GENERIC_CLASSES = (None, "TokenizersBackend", "PreTrainedTokenizerFast", "MistralCommonBackend")


def vocabulary_of(folder: Path) -> tuple[str, ...] | None:
    """Return the names of a folder's vocabulary files; None if it has no vocabulary."""
    return next((names for names in VOCABULARIES if all((folder / name).is_file() for name in names)), None)


def open_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a folder.

    Args:
        folder: a folder with a vocabulary, and perhaps ``tokenizer_config.json`` and ``special_tokens_map.json``.
        config: the model's configuration, which names the tokenizer's class if no other file does.

    Raises:
        ValueError: there is no vocabulary, or its ids are not certain to be right.
        ImportError: reading it needs a package that is missing.
        Exception: transformers may raise any exception on broken files.
    """
    vocabulary = vocabulary_of(folder)
    if vocabulary is None:
        raise ValueError(
            "it has no vocabulary; expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
        )
    settings, special = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    named = settings.get("tokenizer_class") or getattr(config, "tokenizer_class", None) or _class_of(config)
    opened: PreTrainedTokenizerBase
    if vocabulary == ("tokenizer.json",):
        opened = PreTrainedTokenizerFast.from_pretrained(folder)
        if "bos_token" not in settings | special:
            if named is None:
                raise ValueError("its tokenizer_config.json has neither bos_token nor tokenizer_class; expected one")
            by_name = tokenizer_class_from_name(named) if isinstance(named, str) else None
            if by_name is None or named == "MistralCommonBackend":
                raise ValueError(
                    f"tokenizer_class is {short(named)}, which transformers does not have, and no bos_token is named; "
                    'expected a class of transformers, or "bos_token" (null for none) in tokenizer_config.json'
                )
            by_class = by_name.from_pretrained(folder)
            opened.bos_token = by_class.bos_token
        if getattr(opened.backend_tokenizer.model, "dropout", None):
            opened.backend_tokenizer.model.dropout = None  # it drops merges at random, for training
    else:
        allowed: Collection[str | None] = SENTENCEPIECE if vocabulary == ("tokenizer.model",) else BYTE_LEVEL
        name = None if named is None else str(named).removesuffix("Fast")
        if name not in allowed:
            raise ValueError(
                f"tokenizer_class is {short(named)}, and with {' and '.join(vocabulary)} alone it must be "
                f"{' or '.join(filter(None, allowed))}; any other is read from a tokenizer.json, which transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes"
            )
        if name in BYTE_LEVEL:
            opened = BYTE_LEVEL[name].from_pretrained(folder)
        else:
            opened = _sentencepiece(folder, name, settings, special)
    if len(opened) <= len(opened.added_tokens_decoder):
        raise ValueError(f"the vocabulary in {' and '.join(vocabulary)} has special tokens only")
    return opened


def _class_of(config: PreTrainedConfig) -> str | None:
    """Return the tokenizer class that transformers has for a model type; None if the class is generic."""
    name = TOKENIZER_MAPPING_NAMES.get(config.model_type)
    return name if name not in GENERIC_CLASSES else None


def _sentencepiece(
    folder: Path, name: str | None, settings: dict[str, Any], special: dict[str, Any]
) -> SentencePieceBackend:
    """Open a tokenizer that is a ``tokenizer.model`` alone, with the ids of the slow class that the folder names."""
    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise ImportError(
            f"reading {folder / 'tokenizer.model'} needs sentencepiece and protobuf: "
            "pip install 'pyterrier-llmrerank[sentencepiece]'"
        )
    from sentencepiece import SentencePieceProcessor

    if options := settings.get("sp_model_kwargs"):
        raise ValueError(f"sp_model_kwargs is {short(options)} in tokenizer_config.json; allowed: {{}}")
    try:
        model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except (RuntimeError, OSError) as error:
        raise ValueError("tokenizer.model is not a sentencepiece model; expected one, or a tokenizer.json") from error
    own = {kind: getattr(model, f"{kind}_id")() for kind in ("bos", "eos", "unk")}
    tokens = {f"{kind}_token": model.id_to_piece(number) for kind, number in own.items() if number >= 0}
    opened: SentencePieceBackend = SENTENCEPIECE[name].from_pretrained(
        folder,
        legacy=name == "GemmaTokenizer" or settings.get("legacy") is not False,
        **{token: piece for token, piece in tokens.items() if token not in settings | special},
    )
    return opened


def set_pair(
    tokenizer: PreTrainedTokenizerBase,
    alone: tuple[Sequence[int], Sequence[int]],
    together: tuple[Sequence[int], Sequence[int], Sequence[int]],
    argument: str,
) -> None:
    """Let a tokenizer put ids around the two texts of a pair, each of which it tokenises by itself.

    Args:
        tokenizer: the tokenizer, which is changed.
        alone: the ids before and after a single text, which stay as they are.
        together: the ids before, between and after the two texts.
        argument: the caller's argument and its value, for messages.

    Raises:
        ValueError: the tokenizer is not run from a ``tokenizer.json``.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{argument}: other programs get other ids from its tokenizer.model; expected a model with tokenizer.json."
        )
    ids = dict(zip(("first", "last", "start", "between", "end"), (*alone, *together), strict=True))
    pieces = {name: {"id": name, "ids": list(own), "tokens": tokenizer.convert_ids_to_tokens(list(own))}
              for name, own in ids.items() if own}  # fmt: skip
    single, pair = (
        " ".join(name for name in names.split() if name in pieces or name[0] == "$")
        for names in ("first $A last", "start $A between $B end")
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=list(pieces.values())
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]


def check_pairs(folder: Path, pairs: Sequence[tuple[str, str]], ids: Sequence[list[int]], argument: str) -> None:
    """Raise ValueError unless a saved tokenizer, opened by transformers, turns pairs of texts into these ids.

    Args:
        folder: where the tokenizer is saved.
        pairs: pairs of texts.
        ids: the ids of each pair.
        argument: the caller's argument and its value, for messages.
    """
    opened = AutoTokenizer.from_pretrained(folder)
    for pair, wanted in zip(pairs, ids, strict=True):
        if (made := opened(*pair)["input_ids"]) != wanted:
            raise ValueError(
                f"{argument}: for {pair!r} its tokenizer gives the ids {wanted}, but in transformers {made}; expected "
                "a tokenizer.json that names no class of its own."
            )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files.

    Raises:
        OSError: they cannot be written; names the folder.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no exception class of its own
        raise OSError(f"{folder}: the tokenizer cannot be written: {reason(error)}") from error
