"""Turn query and passage texts into token ids.

Both rerankers read ``prefix + body + suffix``: the prefix depends on the query alone, the body is the passage, and the
suffix is constant. Inference and training share this module, so a model reads the same inputs in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoints.description import MAX_LENGTH
from ..checkpoints.input_format import TEVATRON_2023, TEVATRON_2024, InputFormat
from .text_cuts import cut_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Characters of a long text to tokenise at first for each id wanted; more are seldom needed.
CHARACTERS_AN_ID = 8

#: The most characters in one call of the tokenizer; a longer text gets a call of its own.
CHARACTERS_A_CALL = 2**20

#: Matroyshka's prompt.
PROMPT = "Predict whether passage B contains an answer to query A."


class Ids(NamedTuple):
    """Holds the token ids of one (query, passage) pair in three parts.

    Args:
        prefix: ids of the query.
        body: ids of the passage.
        suffix: ids of the prompt.
        query_truncated: whether the end of the query is cut off.
        passage_truncated: whether the end of the passage is cut off.
    """

    prefix: list[int]
    body: list[int]
    suffix: list[int]
    query_truncated: bool = False
    passage_truncated: bool = False

    @property
    def length(self) -> int:
        """Tokens in all three parts together."""
        return len(self.prefix) + len(self.body) + len(self.suffix)

    def flat(self) -> list[int]:
        """Return all ids in reading order."""
        return self.prefix + self.body + self.suffix


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
    """Return the first ``limit`` ids of each text (all by default), without special tokens.

    Equal texts are tokenised once. To save time and memory, long texts are cut before they are tokenised, and few of
    them go into one call of the tokenizer, which takes a few hundred bytes for each id.
    """
    ids: dict[str, list[int]] = {}
    length = None if limit is None else CHARACTERS_AN_ID * limit
    waiting = list(dict.fromkeys(texts))
    while waiting:
        ends = [len(text) if length is None else cut_after(tokenizer, text, length) for text in waiting]
        for part in _calls(ends):
            begun = [waiting[number][: ends[number]] for number in part]
            encoded = tokenizer(begun, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for number, found in zip(part, encoded["input_ids"], strict=True):
                ids[waiting[number]] = found[:limit]
        waiting = [
            text
            for text, end in zip(waiting, ends, strict=True)
            if limit is not None and end < len(text) and len(ids[text]) < limit
        ]
        length = None if length is None else 4 * length
    return [ids[text] for text in texts]


def _calls(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of the texts to tokenise in each call."""
    part: list[int] = []
    characters = 0
    for number, length in enumerate(lengths):
        if part and characters + length > CHARACTERS_A_CALL:
            yield part
            part, characters = [], 0
        part.append(number)
        characters += length
    if part:
        yield part


@dataclass(frozen=True)
class RankLLaMAInputs:
    """Encodes ``<s> query: {query}`` + ``<s> document: {title} {text}``, RankLLaMA's first format, without a suffix.

    Query and document are each cut to their limit. The query is cut further if the pair would have more than
    ``query_max_length + passage_max_length - 2`` ids.

    Args:
        query_max_length: the most ids of ``query: {query}``, without ``<s>``.
        passage_max_length: the most ids of the document, without ``<s>``.
        margin: how many fewer ids a document keeps; 3 in training, as in the released code.
        form: the format of query and document.
    """

    query_max_length: int = 32
    passage_max_length: int = 164
    margin: int = 0
    form: InputFormat = InputFormat()  # noqa: RUF009 # it is frozen

    def __call__(self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """Encode ``(query, document)`` pairs, with documents formatted by :meth:`InputFormat.body`."""
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        cap = self.query_max_length + self.passage_max_length - 2
        limit = self.passage_max_length - self.margin
        # One id more than is kept shows whether a text is truncated.
        queries = token_ids(tokenizer, [self.form.head(query) for query, _ in pairs], self.query_max_length + 1)
        bodies = token_ids(tokenizer, [body for _, body in pairs], limit + 1)
        encoded = []
        for query_ids, body_ids in zip(queries, bodies, strict=True):
            body = bos + body_ids[:limit]
            whole = bos + query_ids
            prefix = whole[: min(len(bos) + self.query_max_length, max(len(bos), cap - len(body)))]
            encoded.append(Ids(prefix, body, [], len(prefix) < len(whole), len(body_ids) > limit))
        return encoded


@dataclass(frozen=True)
class StringInputs:
    """Encodes query and passage as one string, with the tokenizer's own special tokens.

    The string is cut at the end of the passage. The text after the passage is tokenised by itself and kept whole, and
    so are all special tokens.

    Args:
        form: the format of the string.
        query_max_length: the string has at most ``query_max_length + passage_max_length`` ids. The texts of a template
            do not count. In ``tevatron-2024``, prefixes and special tokens count, as in Tevatron.
        passage_max_length: see ``query_max_length``.
    """

    form: InputFormat
    query_max_length: int = 32
    passage_max_length: int = 164

    def __call__(self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """Encode ``(query, passage)`` pairs, with passages formatted by :meth:`InputFormat.body`.

        Raises:
            ValueError: the tokenizer has no end token to append, or as :func:`special_ids`.
        """
        if self.form.append_eos and tokenizer.eos_token_id is None:
            raise ValueError("append_eos=True: the tokenizer has no end token; allowed: False.")
        first, last = special_ids(tokenizer)
        (tail,) = token_ids(tokenizer, [self.form.tail])
        suffix = tail + last + [tokenizer.eos_token_id] * self.form.append_eos
        limit = self.query_max_length + self.passage_max_length
        if self.form.name == TEVATRON_2024:
            limit = max(0, limit - len(first) - len(suffix))
            heads = [self.form.head(query).lstrip() for query, _ in pairs]
            texts = [(self.form.head(query) + body).strip() for query, body in pairs]
        else:
            limit += sum(map(len, token_ids(tokenizer, [self.form.head(""), self.form.body("")])))
            heads = [self.form.head(query) for query, _ in pairs]
            texts = [head + body for head, (_, body) in zip(heads, pairs, strict=True)]
        encoded = []
        # One id more than is kept shows whether a text is truncated.
        for head, whole in zip(*(token_ids(tokenizer, part, limit + 1) for part in (heads, texts)), strict=True):
            shared = _common(head, whole)  # the last ids of the query may depend on the passage
            start = min(shared, limit)
            encoded.append(Ids(first + whole[:start], whole[start:limit], suffix, shared > limit, len(whole) > limit))
        return encoded


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the ids that two sequences have in common at their start."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after every text.

    Raises:
        ValueError: the tokenizer changes the ids of the text, too.
    """
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start]), list(whole[start + len(bare) :])
    raise ValueError(f"tokenizer: with special tokens, 'a' is {whole}; without, it is {bare}, which is not part of it.")


#: The encodings of RankLLaMA's formats.
Encoding = RankLLaMAInputs | StringInputs


def inputs_of(form: InputFormat, query_max_length: int, passage_max_length: int, margin: int = 0) -> Encoding:
    """Return the encoding of a format; ``margin`` as for :class:`RankLLaMAInputs`, which alone has one."""
    if form.name == TEVATRON_2023:
        return RankLLaMAInputs(query_max_length, passage_max_length, margin, form)
    return StringInputs(form, query_max_length, passage_max_length)


@dataclass(frozen=True)
class MatroyshkaInputs:
    r"""Encodes ``<s> A: {query} \n`` + ``B: {passage}`` + ``\n {prompt}``, each part tokenised on its own.

    Args:
        prompt: the question to the model after the passage; never truncated.
        query_max_length: the most ids of ``A: {query}``; None for three quarters of ``max_length``.
        max_length: the most ids of ``B: {passage}``. Up to the end of the passage, there are at most
            ``max_length`` ids plus the number of ids after it.
        query_instruction: text before the query.
        passage_instruction: text before the passage.
        total: the most ids of the whole input, suffix included; replaces ``max_length`` as the limit. The released
            training code sets it to query and passage length together.
    """

    prompt: str = PROMPT
    query_max_length: int | None = None
    max_length: int = MAX_LENGTH
    query_instruction: str = "A: "
    passage_instruction: str = "B: "
    total: int | None = None

    def pieces(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
        """Return the ids before the query, between query and passage, and after the passage."""
        bos_id = tokenizer.bos_token_id
        bos = [] if bos_id is None or bos_id == tokenizer.pad_token_id else [bos_id]
        separator, prompt = token_ids(tokenizer, ["\n", self.prompt])
        return bos, separator, separator + prompt

    @property
    def query_limit(self) -> int:
        """The most ids of ``A: {query}``."""
        return self.max_length * 3 // 4 if self.query_max_length is None else self.query_max_length

    def __call__(self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """Encode ``(query, passage)`` pairs."""
        bos, separator, suffix = self.pieces(tokenizer)
        passage_limit = self.max_length if self.total is None else self.total
        cap = self.max_length + len(suffix) if self.total is None else self.total - len(suffix)
        query_limit = self.query_limit
        # One id more than is kept shows whether a text is truncated.
        queries = token_ids(tokenizer, [self.query_instruction + query for query, _ in pairs], query_limit + 1)
        bodies = token_ids(tokenizer, [self.passage_instruction + passage for _, passage in pairs], passage_limit + 1)
        encoded = []
        for query, whole in zip(queries, bodies, strict=True):
            prefix = bos + query[:query_limit] + separator
            body = whole[:passage_limit]
            excess = len(prefix) + len(body) - cap
            # The released code cuts separator and passage as one sequence, and leaves both whole
            # when even without them the query is over the cap.
            if 0 < excess < len(separator) + len(body):
                prefix = prefix[: len(prefix) - max(0, excess - len(body))]
                body = body[: max(0, len(body) - excess)]
            encoded.append(Ids(prefix, body, suffix, len(query) > query_limit, len(body) < len(whole)))
        return encoded
