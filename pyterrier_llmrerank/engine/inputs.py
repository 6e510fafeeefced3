"""Query and passage texts to token ids.

Both rerankers read ``prefix + body + suffix``: the prefix depends on the query alone, the body is the
passage, the suffix is constant. Inference and training build their inputs here and nowhere else, so a
model is served with exactly what it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .boundaries import cut_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How much of a long text is tokenised at first; seldom is more needed.
CHARACTERS_AN_ID = 8

#: How much text is tokenised at once, a longer one apart.
CHARACTERS_A_CALL = 2**20

PROMPT = "Predict whether passage B contains an answer to query A."


class Ids(NamedTuple):
    """The token ids of one (query, passage) pair, in the three parts that the model treats apart.

    Args:
        prefix, body, suffix: the three parts.
        query_truncated, passage_truncated: whether the end of the text is not among them.
    """

    prefix: list[int]
    body: list[int]
    suffix: list[int]
    query_truncated: bool = False
    passage_truncated: bool = False

    @property
    def length(self) -> int:
        """Tokens in all three parts."""
        return len(self.prefix) + len(self.body) + len(self.suffix)

    def flat(self) -> list[int]:
        """All ids in reading order."""
        return self.prefix + self.body + self.suffix


def document(text: str, title: str | None = None, url: str | None = None) -> str:
    """The passage as RankLLaMA reads it: ``document: {url} {title} {text}``, without the parts that are None.

    An empty title is not a missing one: it keeps its separator, as in the released code.

    >>> document("A bear.", "Panda")
    'document: Panda A bear.'
    >>> document("A bear.", "")
    'document:  A bear.'
    """
    return "document: " + " ".join(part for part in (url, title, text) if part is not None)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
    """The first ``limit`` ids of each text (all by default), without special tokens; a text is tokenised once.

    Of a long text only so much is tokenised as its first ids need, and few long texts together: each id takes a few
    hundred bytes on the way.
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
    """Numbers of texts that are tokenised together: of so many characters, or one."""
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
    """``<s> query: {query}`` + ``<s> {document}``, at most ``query_max_length + passage_max_length - 2`` ids.

    What is over that is taken from the end of the query, never from the document. There is no suffix.

    Args:
        query_max_length: ids kept of ``query: {query}``, ``<s>`` not counted.
        passage_max_length: ids kept of the document, ``<s>`` not counted.
        margin: by how much documents are cut shorter than that; 3 in training, as released.
    """

    query_max_length: int = 32
    passage_max_length: int = 164
    margin: int = 0

    def __call__(self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """Encode ``(query, document)`` pairs, where the document comes from :func:`document`."""
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        cap = self.query_max_length + self.passage_max_length - 2
        limit = self.passage_max_length - self.margin
        # One more each than is kept: it tells what is truncated.
        queries = token_ids(tokenizer, ["query: " + query for query, _ in pairs], self.query_max_length + 1)
        bodies = token_ids(tokenizer, [body for _, body in pairs], limit + 1)
        encoded = []
        for query_ids, body_ids in zip(queries, bodies, strict=True):
            body = bos + body_ids[:limit]
            whole = bos + query_ids
            prefix = whole[: min(len(bos) + self.query_max_length, max(len(bos), cap - len(body)))]
            encoded.append(Ids(prefix, body, [], len(prefix) < len(whole), len(body_ids) > limit))
        return encoded


@dataclass(frozen=True)
class MatroyshkaInputs:
    r"""``<s> A: {query} \n`` + ``B: {passage}`` + ``\n {prompt}``, the parts tokenised one by one.

    Args:
        prompt: the question put to the model after the passage; never truncated.
        query_max_length: ids kept of ``A: {query}``; None for three quarters of ``max_length``.
        max_length: ids kept of ``B: {passage}``, and the room for ``<s>``, query and passage together.
        query_instruction: what stands before the query.
        passage_instruction: what stands before the passage.
        total: hold the whole input, suffix included, to so many ids and the passage to what room that leaves,
            instead of by ``max_length``; the training program does so with query and passage length together.
    """

    prompt: str = PROMPT
    query_max_length: int | None = None
    max_length: int = 512
    query_instruction: str = "A: "
    passage_instruction: str = "B: "
    total: int | None = None

    def __call__(self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """Encode ``(query, passage)`` pairs."""
        bos_id = tokenizer.bos_token_id
        bos = [] if bos_id is None or bos_id == tokenizer.pad_token_id else [bos_id]
        separator, prompt = token_ids(tokenizer, ["\n", self.prompt])
        suffix = separator + prompt
        passage_limit = self.max_length if self.total is None else self.total
        cap = self.max_length + len(suffix) if self.total is None else self.total - len(suffix)
        query_limit = self.max_length * 3 // 4 if self.query_max_length is None else self.query_max_length
        # One more each than is kept: it tells what is truncated.
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
