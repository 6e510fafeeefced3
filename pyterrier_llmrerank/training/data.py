"""Training data: JSON lines files, folders of them, or a dataset on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.locate import HUB_ID
from ..runs.text_files import malformed, objects
from .records import read_example

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

#: Columns of the table that holds the data of both forms; a column that a line lacks is None.
COLUMNS = ("query_id", "query", "positive_passages", "negative_passages", "pos", "neg", "pos_scores", "neg_scores")

#: Name endings of the files that are read from a folder.
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def read_lines(path: Path, teacher: bool = False) -> Iterator[dict[str, Any]]:
    """Read and check the records of a JSON lines file; empty lines are skipped.

    Args:
        path: the file, compressed if its name ends in ``.gz``.
        teacher: whether every line must have teacher scores.

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


def open_data(argument: str, sources: Sequence[str], split: str = "train", teacher: bool = False) -> Dataset:
    """Check all records and open them as a table on disk, which is mapped into memory.

    Args:
        argument: the caller's name for the sources, used in errors.
        sources: JSON lines files (``.json``, ``.jsonl``, also with ``.gz``), folders of them, or one hub id.
        split: split of the hub dataset.
        teacher: whether every record must have teacher scores.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a record is malformed; names the file and line, or the dataset and row.
        ImportError: the package datasets is not installed.
    """
    if find_spec("datasets") is None:
        raise ImportError(f"{argument}: training data in files need datasets: pip install 'pyterrier-llmrerank[train]'")
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))
        elif path.is_file():
            files.append(path)
        elif len(sources) == 1 and HUB_ID.fullmatch(source) and source.count("/") == 1 and not source.endswith(ENDINGS):
            return _from_hub(source, split, teacher)
        else:
            raise FileNotFoundError(f"{argument}={source!r}: no such file or folder; allowed: JSON lines, or a hub id.")
    if not files:
        raise FileNotFoundError(f"{argument}={list(sources)!r}: no .json or .jsonl file there.")
    return _from_files(files, teacher)


def check_scores(argument: str, data: Dataset) -> None:
    """Raise ValueError if some records have teacher scores and others have none.

    The loss of a record would depend on the others in its batch, since a batch has scores for all groups or for none.
    """
    table: Any = data.data
    without = table.column("pos_scores").null_count if "pos_scores" in data.column_names else 0
    if 0 < without < len(data):
        raise ValueError(
            f"{argument}: {without} of {len(data)} records have no pos_scores and neg_scores; allowed: teacher scores "
            "in all records, or in none."
        )


def _from_hub(name: str, split: str, teacher: bool) -> Dataset:
    from datasets.load import load_dataset

    hub = load_dataset(name, split=split)
    for number, record in enumerate(hub):
        try:
            _check(record, teacher)
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: {error}.") from error
    return hub


def _from_files(files: Sequence[Path], teacher: bool) -> Dataset:
    from datasets.arrow_dataset import Dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.features import Features, List, Value

    string, passages = Value("string"), List({"title": Value("string"), "text": Value("string")})
    kinds = (string, string, passages, passages, List(string), List(string), *[List(Value("float64"))] * 2)
    columns: Any = dict(zip((*COLUMNS, "prompt"), (*kinds, string), strict=True))
    features = Features(columns)  # type: ignore[no-untyped-call]
    # datasets derives the cache's key from these, so that a changed file is read again.
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        return Dataset.from_generator(_rows, features=features, gen_kwargs={"files": states, "teacher": teacher})
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _rows(files: list[tuple[str, int, int]], teacher: bool) -> Iterator[dict[str, Any]]:
    for path, _, _ in files:
        for record in read_lines(Path(path), teacher):
            row = {name: record.get(name) for name in (*COLUMNS, "prompt")}
            for key in ("positive_passages", "negative_passages"):
                if row[key] is not None:
                    row[key] = [{"title": passage.get("title"), "text": passage["text"]} for passage in record[key]]
            yield row | {"query_id": None if row["query_id"] is None else str(row["query_id"])}
