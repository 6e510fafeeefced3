"""Input formats: the strings that a query and a passage become before they are tokenised."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..values import refuse

#: RankLLaMA's first format: query and passage apart, each after a first token of its own.
TEVATRON_2023 = "tevatron-2023"

#: RankLLaMA's format since 2024: one string.
TEVATRON_2024 = "tevatron-2024"

#: The formats with a name; each is a template, or None for Tevatron's.
NAMED = {
    TEVATRON_2023: None,
    TEVATRON_2024: None,
    "qwen3-reranker": (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a '
        "web search query, retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {text}"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
}

#: The fields of a template, in order.
FIELDS = (["query", "text"], ["query", "title", "text"])

#: The texts before query and passage in Tevatron's formats.
PREFIXES = {"query_prefix": "query: ", "passage_prefix": "document: "}


def check_name(name: str, value: object) -> str:
    """Return the name of a format, or a template.

    Raises:
        ValueError: the value is neither; names the argument.
    """
    if isinstance(value, str) and (value in NAMED or _split(value)[0] in FIELDS):
        return value
    fields = "{query}, perhaps {title}, and {text}, once each and in this order"
    refuse(name, value, f"{', '.join(NAMED)}, or a template with {fields}")


def _split(template: str) -> tuple[list[str], list[str]]:
    """Return the fields of a template, and the texts before, between and after them; no fields if it is malformed."""
    fields, texts = [], [""]
    try:
        for text, field, spec, conversion in string.Formatter().parse(template):
            texts[-1] += text
            if field is not None:
                fields.append(f"{field}{spec and ':'}{spec}{conversion or ''}")
                texts.append("")
    except ValueError:  # a lone brace
        return [], [""]
    return fields, texts


@dataclass(frozen=True)
class InputFormat:
    """Formats queries and passages as a model reads them.

    Args:
        name: the name of a format, or a template.
        query_prefix: text before the query, in Tevatron's formats.
        passage_prefix: text before the passage, in Tevatron's formats.
        append_eos: whether the end token follows; not in ``tevatron-2023``.

    Raises:
        ValueError: the format has no prefixes or no end token; names the argument.

    >>> form = InputFormat("tevatron-2024")
    >>> form.head("what is tea") + form.body("Leaves.", "Tea")
    'query:  what is tea document:  Tea Leaves.'
    """

    name: str = TEVATRON_2023
    query_prefix: str | None = None
    passage_prefix: str | None = None
    append_eos: bool = False

    def __post_init__(self) -> None:
        for name, usual in PREFIXES.items():
            if self.template is None and getattr(self, name) is None:
                object.__setattr__(self, name, usual)
            elif self.template is not None and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value!r}: input_format is a template, which has its own texts; allowed: None."
                )
        if self.append_eos and self.name == TEVATRON_2023:
            raise ValueError(f"append_eos=True: input_format {TEVATRON_2023!r} has no end token; allowed: False.")

    @classmethod
    def chosen(cls, given: Mapping[str, Any], own: InputFormat | None = None) -> InputFormat:
        """Return the format that follows from a user's arguments and the model's description.

        Args:
            given: ``input_format``, ``query_prefix``, ``passage_prefix`` and ``append_eos``; each None for the model's
                own or, in a format other than the model's, for that format's default.
            own: the format that the model was trained with; None if that is not known.

        Raises:
            ValueError: the arguments contradict each other.
        """
        start = own or cls()
        if given["input_format"] not in (None, start.name):
            start = cls(given["input_format"])
        values = start.settings() | {name: value for name, value in given.items() if value is not None}
        return cls(values.pop("input_format"), **values)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this format."""
        return {
            "input_format": self.name,
            "query_prefix": self.query_prefix,
            "passage_prefix": self.passage_prefix,
            "append_eos": self.append_eos,
        }

    @property
    def template(self) -> str | None:
        """The template; None for Tevatron's formats."""
        return NAMED.get(self.name, self.name)

    @property
    def tail(self) -> str:
        """The text after the passage."""
        return "" if self.template is None else _split(self.template)[1][-1]

    def head(self, query: str) -> str:
        """Format the query, with all that precedes it."""
        if self.template is not None:
            return _split(self.template)[1][0] + query
        return f"{self.query_prefix}{query}" if self.name == TEVATRON_2023 else f"{self.query_prefix} {query} "

    def body(self, text: str, title: str | None = None, url: str | None = None) -> str:
        """Format the passage, with all that precedes it after the query.

        Args:
            text: the passage.
            title: its title; None if it has none. A template without ``{title}`` ignores it.
            url: its URL, which ``tevatron-2023`` alone reads; None if it has none.

        >>> InputFormat().body("A bear.", "Panda")
        'document: Panda A bear.'
        >>> InputFormat().body("A bear.", "")  # an empty title keeps its separator, as in the released code
        'document:  A bear.'
        """
        if self.name == TEVATRON_2023:
            return f"{self.passage_prefix}{' '.join(part for part in (url, title, text) if part is not None)}"
        if self.name == TEVATRON_2024:
            return f"{self.passage_prefix} {(title or '').replace('-', ' ').strip()} {text}"
        fields, texts = _split(str(self.template))
        values = {"title": title or "", "text": text}
        return "".join(before + values[field] for before, field in zip(texts[1:], fields[1:], strict=False))
