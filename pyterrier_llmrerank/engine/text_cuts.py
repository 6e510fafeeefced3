"""Find places to cut a long text before it is tokenised, without a change of its first ids.

Cuts are made before a space that follows a letter or a digit. If a tokenizer separates words from punctuation, they are
also made before Chinese and Japanese marks, for texts without spaces. The text after the cut cannot change the ids
before it if no step of the tokenizer looks across the cut and no token spans it. The tokenizer's own description shows
both. For a tokenizer with an unknown step, texts are not cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A place to cut: between the two characters.
CUT = re.compile(r"[^\W_] ")

#: The same, or before a mark that is never part of a word if the tokenizer splits words from punctuation: full stop,
#: commas, and fullwidth ! ? ;
CUT_AT_MARKS = re.compile(r"[^\W_][ \u3002\uff0c\u3001\uff01\uff1f\uff1b]")

_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)

#: Alternatives of patterns that match a word, and a number, up to its end.
LETTERS = frozenset(
    [
        r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        *_CASED, *(words + "(?i:'s" for words in _CASED),
    ]
)  # fmt: skip
NUMBERS = frozenset([r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}"])

#: Alternatives in the patterns of GPT-2, o200k, Llama 3, Qwen, Mistral's Tekken and others. None matches a space after
#: anything but white space. Only ``\s+(?!\S)`` looks ahead, and it matches nothing but white space.
ALTERNATIVES = (
    LETTERS
    | NUMBERS
    | {
        "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "(?i:'s", "'d)", "'d)?", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    }
)  # fmt: skip

_known: WeakKeyDictionary[PreTrainedTokenizerBase, re.Pattern[str] | None] = WeakKeyDictionary()


def cut_after(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> int:
    """Return the first place to cut after ``length`` characters, or the end of the text if there is none."""
    if length >= len(text):
        return len(text)
    if tokenizer not in _known:
        _known[tokenizer] = places_to_cut(tokenizer)
    places = _known[tokenizer]
    found = None if places is None else places.search(text, length - 1)
    return len(text) if found is None else found.start() + 1


def places_to_cut(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Return a pattern for the places where a cut does not change the ids before it; None if there are none."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    if any(re.search(r"[^\s▁][\s▁]", content) for content in added):  # such a token could span a cut
        return None
    if hasattr(tokenizer, "sp_model"):
        return CUT if _sentencepiece_may_cut(tokenizer.sp_model) else None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    places = None if backend is None else _json_places(json.loads(backend.to_str()))
    return CUT if places is CUT_AT_MARKS and any(map(CUT_AT_MARKS.search, added)) else places


def _sentencepiece_may_cut(processor: Any) -> bool:
    """Return whether a sentencepiece model gives the ids before a cut regardless of the text after it."""
    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2")  # it has no types
    model = proto.ModelProto.FromString(processor.serialized_model_proto())
    bpe_or_unigram = model.trainer_spec.model_type in (model.trainer_spec.BPE, model.trainer_spec.UNIGRAM)
    return bool(
        bpe_or_unigram
        and not model.normalizer_spec.precompiled_charsmap
        and model.normalizer_spec.escape_whitespaces
        and not model.trainer_spec.treat_whitespace_as_suffix
        and _none_spans_a_cut("▁", [piece.piece for piece in model.pieces])
    )


def _json_places(description: dict[str, Any]) -> re.Pattern[str] | None:
    """Return the pattern of :func:`places_to_cut` for a tokenizer that ``tokenizer.json`` describes."""
    normalizers = _steps(description["normalizer"], "normalizers")
    splits = _steps(description["pre_tokenizer"], "pretokenizers")
    model = description["model"]
    spaces = set(filter(None, map(_space_mark, [*normalizers, *splits])))
    if not all(map(_is_local_normalizer, normalizers)) or model["type"] not in ("BPE", "Unigram") or len(spaces) != 1:
        return None
    (space,) = spaces
    if not all(_is_local_split(part, space) for part in splits):
        return None
    if space == "Ġ" and any(map(_parts_words, splits)):
        return None if model.get("dropout") else CUT_AT_MARKS  # no token spans two pieces of a split
    unsupported = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    vocabulary = model["vocab"] if model["type"] == "BPE" else [piece for piece, _ in model["vocab"]]
    return CUT if not any(map(model.get, unsupported)) and _none_spans_a_cut(space, vocabulary) else None


def _steps(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """List the steps of a normalizer or pre-tokenizer, which may be None, a single step or a sequence of steps."""
    if step is None:
        return []
    return [part for inner in step[name] for part in _steps(inner, name)] if step["type"] == "Sequence" else [step]


def _space_mark(part: dict[str, Any]) -> str | None:
    """Return the character that a step puts in place of spaces; None if it keeps them."""
    if part["type"] == "ByteLevel":
        return "Ġ"
    return "▁" if part["type"] in ("Replace", "Metaspace") else None


def _is_local_normalizer(normalizer: dict[str, Any]) -> bool:
    """Return whether the text after a cut cannot change how a normalizer treats the text before it."""
    if normalizer["type"] == "Replace":
        return (normalizer["pattern"], normalizer["content"]) == ({"String": " "}, "▁")
    if normalizer["type"] == "Prepend":
        return bool(normalizer["prepend"] == "▁")
    return normalizer["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")


def _is_local_split(split: dict[str, Any], space: str) -> bool:
    """Return whether the text after a cut cannot change how a pre-tokenizer splits the text before it."""
    if split["type"] == "Metaspace":
        return bool(split["replacement"] == "▁")
    if split["type"] == "Split" and space == "▁":  # Gemma's; its normalizer leaves no spaces
        return bool(split["pattern"] == {"String": " "})
    if split["type"] == "Split":
        kept = (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
        return kept and set(str(split["pattern"].get("Regex", "?")).split("|")) <= ALTERNATIVES
    return split["type"] in ("ByteLevel", "Digits")


def _parts_words(split: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer ends a piece wherever a space follows a letter or a digit."""
    if split["type"] != "Split":
        return bool(split["type"] == "ByteLevel" and split.get("use_regex", True))
    alternatives = set(str(split["pattern"].get("Regex", "?")).split("|"))
    return bool(alternatives & LETTERS and alternatives & NUMBERS)


def _none_spans_a_cut(space: str, vocabulary: Iterable[str]) -> bool:
    """Return whether a space is a token, and no token has a space after another character."""
    vocabulary = list(vocabulary)
    return space in vocabulary and not re.search(rf"[^{space}\n]{space}", "\n".join(vocabulary))
