"""Training files to groups: a query, one positive, some negatives, drawn the same way wherever they are drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.locate import HUB_ID
from ..engine.inputs import Ids
from ..engine.packing import PackedPairs
from ..errors import short
from ..runs.formats import malformed, objects
from ..values import problem_of

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset
    from transformers import PreTrainedTokenizerBase

#: From a passage's text and its title, or None, to what the model reads of it.
Body = Callable[[str, str | None], str]

#: What encodes pairs.
Inputs = Callable[["PreTrainedTokenizerBase", Sequence[tuple[str, str]]], list[Ids]]


@dataclass(frozen=True)
class Group:
    """What one query trains on at one time.

    Args:
        name: what its user knows the query by: its id in the data, or its place there.
        query: its text.
        passages: as the model reads them, the positive first.
        teacher: a teacher's score for each passage, or None.
        prompt: the prompt that goes with this query, or None for the usual one.
    """

    name: str
    query: str
    passages: list[str]
    teacher: list[float] | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Example:
    """A line of a training file: a query with all its positives and negatives.

    Args:
        query: its text.
        positives: passages, at least one.
        negatives: passages, at least one.
        teacher: a teacher's scores of the positives and of the negatives, or None.
        prompt: as :class:`Group`.
    """

    query: str
    positives: list[str]
    negatives: list[str]
    teacher: tuple[list[float], list[float]] | None = None
    prompt: str | None = None

    def draw(self, size: int, generator: random.Random, name: str = "") -> Group:
        """A group of this name: one positive and ``size - 1`` negatives; some of these again where there are fewer."""
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
        body: makes of text and title, or None, what the model reads.
        record: ``query``, ``positive_passages`` and ``negative_passages`` of ``text`` and perhaps ``title``
            (Tevatron's form); or ``query``, ``pos``, ``neg`` and perhaps ``prompt`` (Matroyshka's). Both may have
            ``pos_scores`` and ``neg_scores``, a teacher's.

    Raises:
        ValueError: it is of neither form; the message says what is wrong with which key.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is wanted, not {type(record).__name__}")
    query = record.get("query")
    if not isinstance(query, str):
        raise ValueError(f"query is {short(query)}; wanted a string")
    _check_unicode("query", [query])
    _check_unicode("query_id", [str(record.get("query_id"))])
    if record.get("positive_passages") is not None:
        positives, negatives = (_documents(record, key, body) for key in ("positive_passages", "negative_passages"))
        return Example(query, positives, negatives, _teacher(record, len(positives), len(negatives)))
    if record.get("pos") is None:
        raise ValueError(
            "neither positive_passages nor pos; wanted positive_passages and negative_passages, lists of passages "
            "with text and perhaps title, or pos and neg, lists of strings"
        )
    positives, negatives = ([body(text, None) for text in _texts(record, key)] for key in ("pos", "neg"))
    prompt = record.get("prompt")
    if not isinstance(prompt, str | None):
        raise ValueError(f"prompt is {short(prompt)}; wanted a string")
    _check_unicode("prompt", [prompt or ""])
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
        raise ValueError(f"{key} is {short(value)}; wanted a list of strings, at least one")
    _check_unicode(key, value)
    return value


def _documents(record: dict[str, Any], key: str, body: Body) -> list[str]:
    value = record.get(key)
    wanted = f"{key} is {short(value)}; wanted a list of passages with text and perhaps title, at least one"
    if not isinstance(value, list) or not value:
        raise ValueError(wanted)
    for passage in value:
        texts = isinstance(passage, dict) and isinstance(passage.get("text"), str)
        if not texts or not isinstance(passage.get("title"), str | None):
            raise ValueError(wanted)
        _check_unicode(key, [passage["text"], passage.get("title") or ""])
    return [body(passage["text"], passage.get("title")) for passage in value]


def _scores(record: dict[str, Any], key: str, count: int) -> list[float]:
    value = record.get(key)
    if not isinstance(value, list) or len(value) != count or not all(map(_is_finite, value)):
        raise ValueError(f"{key} is {short(value)}; wanted {count} finite numbers, one a passage")
    return [float(score) for score in value]


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int of hundreds of digits
        return False


def read_lines(path: Path, teacher: bool = False) -> Iterator[dict[str, Any]]:
    """The records of a JSON lines file, each checked.

    Args:
        path: the file; compressed where its name ends in ``.gz``; empty lines are passed over.
        teacher: whether every line must have a teacher's scores.

    Raises:
        ValueError: a line is malformed; names the file and the line.
    """
    empty = True
    for line, record in objects(path):
        try:
            _check(record, teacher)
        except ValueError as error:
            raise malformed(path, line, str(error)) from error
        empty = False
        yield record
    if empty:
        raise ValueError(f"{path}: no training data in it.")


def _check(record: Any, teacher: bool) -> None:
    if read_example(record, lambda text, title: text).teacher is None and teacher:
        raise ValueError("no pos_scores and neg_scores, which training with a teacher needs")


#: The columns of the table that files become: both forms' together, None where a line lacks one.
COLUMNS = ("query_id", "query", "positive_passages", "negative_passages", "pos", "neg", "pos_scores", "neg_scores")


def _rows(files: list[tuple[str, int, int]], teacher: bool) -> Iterator[dict[str, Any]]:
    for path, _, _ in files:
        for record in read_lines(Path(path), teacher):
            row = {name: record.get(name) for name in (*COLUMNS, "prompt")}
            for key in ("positive_passages", "negative_passages"):
                if row[key] is not None:
                    row[key] = [{"title": passage.get("title"), "text": passage["text"]} for passage in record[key]]
            yield row | {"query_id": None if row["query_id"] is None else str(row["query_id"])}


#: Files that are training data in a folder of them.
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def open_data(argument: str, sources: Sequence[str], split: str = "train", teacher: bool = False) -> Dataset:
    """Training data as a table on disk, mapped into memory rather than loaded; every record is checked before.

    Args:
        argument: what the caller names the sources, for messages.
        sources: JSON lines files (``.json``, ``.jsonl``, also with ``.gz``), folders of them, or one hub id.
        split: which part of the hub's dataset.
        teacher: as :func:`read_lines`.

    Raises:
        FileNotFoundError: nothing of that name is here.
        ValueError: a line is malformed; names file and line.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
        elif path.is_file():
            files.append(path)
        elif len(sources) == 1 and HUB_ID.fullmatch(source) and source.count("/") == 1 and not source.endswith(ENDINGS):
            return _of_hub(source, split, teacher)
        else:
            raise FileNotFoundError(f"{argument}={source!r}: no such file or folder; allowed: JSON lines, or a hub id.")
    if not files:
        raise FileNotFoundError(f"{argument}={list(sources)!r}: no .json or .jsonl file there.")
    return _of_files(files, teacher)


def _of_hub(name: str, split: str, teacher: bool) -> Dataset:
    from datasets.load import load_dataset

    hub = load_dataset(name, split=split)
    for number, record in enumerate(hub):
        try:
            _check(record, teacher)
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: {error}.") from error
    return hub


def _of_files(files: Sequence[Path], teacher: bool) -> Dataset:
    from datasets.arrow_dataset import Dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.features import Features, List, Value

    string, passages = Value("string"), List({"title": Value("string"), "text": Value("string")})
    kinds = (string, string, passages, passages, List(string), List(string), *[List(Value("float64"))] * 2)
    columns: Any = dict(zip((*COLUMNS, "prompt"), (*kinds, string), strict=True))
    features = Features(columns)  # type: ignore[no-untyped-call]
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:  # the cache goes by what the files hold now
        return Dataset.from_generator(_rows, features=features, gen_kwargs={"files": states, "teacher": teacher})
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


class Groups(torch.utils.data.Dataset[Group]):
    """A group for each line, drawn anew each epoch, as a function of seed, epoch and the line's index alone.

    So it does not matter which process or worker draws it, or whether the run was resumed.

    Args:
        records: rows in a form that :func:`read_example` reads.
        size: passages a group.
        seed: of the draw.
        body: makes of text and title, or None, what the model reads.
    """

    def __init__(self, records: Any, size: int, seed: int, body: Body) -> None:
        self.records = records
        self.body = body
        self.size = size
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call] # workers may outlive an epoch

    @property
    def epoch(self) -> int:
        """Which epoch is drawn, counted from 0, in this process and its workers."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Group:
        generator = random.Random(f"{self.seed}/{self.epoch}/{index}")  # a string's seed is the same in all processes
        record = self.records[index]
        name = str(record.get("query_id") or f"line {index + 1}")
        return read_example(record, self.body).draw(self.size, generator, name)


@dataclass(frozen=True)
class Batch:
    """Groups as the model takes them.

    Args:
        packed: all passages of all groups, ``groups * size`` pairs.
        teacher: ``[groups, size]``, or None where a group has none.
        size: passages a group.
        names: of the groups' queries.
    """

    packed: PackedPairs
    teacher: Tensor | None
    size: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Collator:
    """Groups to a batch.

    Args:
        tokenizer: the model's.
        inputs: from a prompt of the data, or None for the usual one, to what makes ids of pairs.
    """

    tokenizer: PreTrainedTokenizerBase
    inputs: Callable[[str | None], Inputs]

    def __call__(self, groups: Iterable[Group]) -> Batch:
        """Encode, pack, and stack the teacher's scores."""
        groups = list(groups)
        rows = [
            ids
            for group in groups
            for ids in self.inputs(group.prompt)(self.tokenizer, [(group.query, text) for text in group.passages])
        ]
        scores = [group.teacher for group in groups if group.teacher is not None]
        return Batch(
            PackedPairs(rows),
            torch.tensor(scores) if len(scores) == len(groups) else None,
            len(groups[0].passages),
            tuple(group.name for group in groups),
        )
