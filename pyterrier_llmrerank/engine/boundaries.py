"""Where a long text may be cut before it is tokenised, so that its first ids stay the same.

A text is cut before a space that follows a letter or a digit. What comes after cannot change the ids of what comes
before if no step of the tokenizer looks across, and no token reaches across. Both can be read off the tokenizer's
own description; where it holds a step that is not known here, texts are not cut.
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

CUT = re.compile(r"[^\W_] ")

#: What the patterns of GPT-2, Llama 3, Qwen, Mistral's Tekken and others are made of. None of these takes a space after
#: anything but white space, and only the one with ``(?!\S)``, which ends in white space, looks at what comes after it.
ALTERNATIVES = frozenset(
    [
        "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "(?i:'s", "'d)",
        r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r"\p{N}{1,3}", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    ]
)  # fmt: skip

_known: WeakKeyDictionary[PreTrainedTokenizerBase, bool] = WeakKeyDictionary()


def cut_after(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> int:
    """Where a text can be cut without changing the ids before: the first place after so many characters, or its end."""
    if length >= len(text):
        return len(text)
    if (allowed := _known.get(tokenizer)) is None:
        allowed = _known[tokenizer] = may_cut(tokenizer)
    found = CUT.search(text, length - 1) if allowed else None
    return len(text) if found is None else found.start() + 1


def may_cut(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's ids begin with those of what stands before a space that follows a letter or a digit."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    if any(re.search(r"[^\s▁][\s▁]", content) for content in added):  # it could be found across the cut
        return False
    if hasattr(tokenizer, "sp_model"):
        return _sentencepiece_may_cut(tokenizer.sp_model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and _described_may_cut(json.loads(backend.to_str()))


def _sentencepiece_may_cut(processor: Any) -> bool:
    described = import_module("sentencepiece.sentencepiece_model_pb2")  # which has no types
    model = described.ModelProto.FromString(processor.serialized_model_proto())
    bpe_or_unigram = model.trainer_spec.model_type in (model.trainer_spec.BPE, model.trainer_spec.UNIGRAM)
    return bool(
        bpe_or_unigram
        and not model.normalizer_spec.precompiled_charsmap
        and model.normalizer_spec.escape_whitespaces
        and not model.trainer_spec.treat_whitespace_as_suffix
        and _none_across("▁", [piece.piece for piece in model.pieces])
    )


def _described_may_cut(described: dict[str, Any]) -> bool:
    """Whether it holds for a tokenizer as ``tokenizer.json`` describes it."""
    normalizers = _parts(described["normalizer"], "normalizers")
    splits = _parts(described["pre_tokenizer"], "pretokenizers")
    model = described["model"]
    spaces = set(filter(None, map(_space_of, [*normalizers, *splits])))
    if not all(map(_is_local, normalizers)) or model["type"] not in ("BPE", "Unigram") or len(spaces) != 1:
        return False
    (space,) = spaces
    if not all(_splits_alike(part, space) for part in splits):
        return False
    if space == "Ġ" and any(
        part["type"] == "Split" or part.get("use_regex", part["type"] == "ByteLevel") for part in splits
    ):
        return not model.get("dropout")  # no token reaches beyond what a pattern has split
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    vocabulary = model["vocab"] if model["type"] == "BPE" else [piece for piece, _ in model["vocab"]]
    return not any(map(model.get, odd)) and _none_across(space, vocabulary)


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the only one; none of None."""
    if step is None:
        return []
    return [part for inner in step[name] for part in _parts(inner, name)] if step["type"] == "Sequence" else [step]


def _space_of(part: dict[str, Any]) -> str | None:
    """What a step makes of a space; None where it leaves it."""
    if part["type"] == "ByteLevel":
        return "Ġ"
    return "▁" if part["type"] in ("Replace", "Metaspace") else None


def _is_local(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer does the same before a space that follows a letter or digit, whatever comes after."""
    if normalizer["type"] == "Replace":
        return (normalizer["pattern"], normalizer["content"]) == ({"String": " "}, "▁")
    if normalizer["type"] == "Prepend":
        return bool(normalizer["prepend"] == "▁")
    return normalizer["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")


def _splits_alike(split: dict[str, Any], space: str) -> bool:
    """Whether a pre-tokenizer splits alike before such a space, whatever comes after."""
    if split["type"] == "Metaspace":
        return bool(split["replacement"] == "▁")
    if split["type"] == "Split" and space == "▁":  # Gemma's, which has no spaces left to find
        return bool(split["pattern"] == {"String": " "})
    if split["type"] == "Split":
        kept = (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
        return kept and set(str(split["pattern"].get("Regex", "?")).split("|")) <= ALTERNATIVES
    return split["type"] in ("ByteLevel", "Digits")


def _none_across(space: str, vocabulary: Iterable[str]) -> bool:
    """Whether a space is a token, and none has one after something else."""
    vocabulary = list(vocabulary)
    return space in vocabulary and not re.search(rf"[^{space}\n]{space}", "\n".join(vocabulary))
