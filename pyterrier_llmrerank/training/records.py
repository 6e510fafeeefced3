"""Training records: a query with its positives and negatives, read from either form of training data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import short
from ..values import is_finite, problem_of

#: Formats a passage, given its text and its title or None, as a model reads it.
Body = Callable[[str, str | None], str]


@dataclass(frozen=True)
class Group:
    """Holds a query with the passages that compete for it in one step.

    Args:
        name: the query's id, or its place in the data.
        query: the query's text.
        passages: the passages as the model reads them, the positive first.
        teacher: the teacher's score of each passage, or None.
        prompt: the query's own prompt, or None for the recipe's.
    """

    name: str
    query: str
    passages: list[str]
    teacher: list[float] | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Example:
    """Holds a query with all its positives and negatives: one record of the training data.

    Args:
        query: the query's text.
        positives: relevant passages, at least one.
        negatives: other passages, at least one.
        teacher: the teacher's scores of the positives and of the negatives, or None.
        prompt: the query's own prompt, or None for the recipe's.
    """

    query: str
    positives: list[str]
    negatives: list[str]
    teacher: tuple[list[float], list[float]] | None = None
    prompt: str | None = None

    def draw(self, size: int, generator: random.Random, name: str = "") -> Group:
        """Draw one positive and ``size - 1`` negatives; negatives repeat only if there are too few of them."""
        positive = generator.randrange(len(self.positives))
        repeats = -(-(size - 1) // len(self.negatives))
        negatives = generator.sample(list(range(len(self.negatives))) * repeats, size - 1)
        passages = [self.positives[positive], *(self.negatives[index] for index in negatives)]
        teacher = None
        if self.teacher is not None:
            teacher = [self.teacher[0][positive], *(self.teacher[1][index] for index in negatives)]
        return Group(name, self.query, passages, teacher, self.prompt)


def read_example(record: Any, body: Body) -> Example:
    """Read a record of either form.

    Args:
        record: in Tevatron's form, ``query``, ``positive_passages`` and ``negative_passages``, objects with ``text``
            and optionally ``title``; in Matroyshka's, ``query``, ``pos``, ``neg`` and optionally ``prompt``. Both may
            have a teacher's ``pos_scores`` and ``neg_scores``.
        body: formats the passages.

    Raises:
        ValueError: the record has neither form; names the key, its value and the allowed values.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}; expected a JSON object")
    query = record.get("query")
    if not isinstance(query, str):
        raise ValueError(f"query is {short(query)}; expected a string")
    _check_unicode("query", [query])
    _check_unicode("query_id", [str(record.get("query_id"))])
    prompt = None
    if record.get("positive_passages") is not None:
        positives, negatives = (_documents(record, key, body) for key in ("positive_passages", "negative_passages"))
    elif record.get("pos") is not None:
        positives, negatives = ([body(text, None) for text in _texts(record, key)] for key in ("pos", "neg"))
        prompt = record.get("prompt")
        if not isinstance(prompt, str | None):
            raise ValueError(f"prompt is {short(prompt)}; expected a string")
        _check_unicode("prompt", [prompt or ""])
    else:
        raise ValueError(
            "neither positive_passages nor pos; expected positive_passages and negative_passages, lists of passages "
            "with text and optionally title, or pos and neg, lists of strings"
        )
    return Example(query, positives, negatives, _teacher(record, len(positives), len(negatives)), prompt)


def _teacher(record: dict[str, Any], positives: int, negatives: int) -> tuple[list[float], list[float]] | None:
    if record.get("pos_scores") is None and record.get("neg_scores") is None:
        return None
    return _scores(record, "pos_scores", positives), _scores(record, "neg_scores", negatives)


def _check_unicode(key: str, texts: Sequence[str]) -> None:
    for text in texts:
        if problem := problem_of(text):
            raise ValueError(f"{key}: {short(text)} is {problem}")


def _texts(record: dict[str, Any], key: str) -> list[str]:
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{key} is {short(value)}; expected a list of strings, at least one")
    _check_unicode(key, value)
    return value


def _documents(record: dict[str, Any], key: str, body: Body) -> list[str]:
    value = record.get(key)
    wanted = f"{key} is {short(value)}; expected a list of passages with text and optionally title, at least one"
    if not isinstance(value, list) or not value:
        raise ValueError(wanted)
    for passage in value:
        has_text = isinstance(passage, dict) and isinstance(passage.get("text"), str)
        if not has_text or not isinstance(passage.get("title"), str | None):
            raise ValueError(wanted)
        _check_unicode(key, [passage["text"], passage.get("title") or ""])
    return [body(passage["text"], passage.get("title")) for passage in value]


def _scores(record: dict[str, Any], key: str, count: int) -> list[float]:
    value = record.get(key)
    if not isinstance(value, list) or len(value) != count or not all(map(is_finite, value)):
        raise ValueError(f"{key} is {short(value)}; expected {count} finite numbers, one for each passage")
    return [float(score) for score in value]
