"""Random input gives right results or a clear error. Nothing is executed, and no input is changed.

``LLMRERANK_FUZZ`` sets the number of random inputs per test, 40 by default.
"""

import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyterrier as pt
import pytest
import torch
from conftest import MODELS
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker, ScoringError
from pyterrier_llmrerank.runs import collection, formats
from pyterrier_llmrerank.training.data import read_lines

FULL = str(MODELS / "costwise_full")
RERANKERS: dict[str, LLMReranker] = {
    "rankllama": RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32"),
    "matroyshka": MatroyshkaReranker(FULL, dtype="float32", cutoff=2),
    "several cutoffs": MatroyshkaReranker(FULL, dtype="float32", cutoff=[2, 3], normalize=True),
    "cascade": MatroyshkaReranker(FULL, dtype="float32", cutoff=3, prune={2: 1}),
}
#: Columns that they add besides score and rank.
ADDED = {"several cutoffs": ["score_2", "score_3"], "cascade": ["score_2", "exit_layer"]}
INPUTS = int(os.environ.get("LLMRERANK_FUZZ", "40"))
FUZZED = settings(
    max_examples=INPUTS, derandomize=INPUTS == 40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

# -- frames

#: Difficult strings: empty, in other scripts and directions, emoji of several characters, NULs, line ends, special
#: tokens, and texts long enough to be truncated.
ODD_TEXTS = (
    "", " ", "\0", "a\0b", "\r\n\u2028\x85", "\ufeffbom", "e\u0301\u0301\u0301", "\u202eright to left", "大熊猫",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0010ffff", "\uffff", "<s></s><unk>", "query: document: A: B: \n",
    "nan", "None", "1e400", "%s {0}", "panda " * 300, "\u0600" * 500,
)  # fmt: skip
#: Values that are not texts.
NO_TEXTS = ("\ud83d", "ok \udfff", None, np.nan, pd.NA, pd.NaT, 3, -0.5, True, b"bytes", ("a",), ["a"], {"a": 1})
TEXTS = st.text(max_size=12) | st.sampled_from(ODD_TEXTS)
IDS = st.sampled_from(["q1", "q2", "1", "", "\0", "大", " q1"])
ODD_IDS = st.sampled_from([1, 2, 1.0, 2**70, -(2**63), np.inf, True, "1", ("t", 1), pd.Timestamp(0), b"b", frozenset()])
NO_IDS = st.sampled_from([None, np.nan, pd.NA, pd.NaT, ["unhashable"], {}, "\ud83d"])
DTYPES: tuple[Any, ...] = (
    object, "str", "string[python]", "string[pyarrow]", pd.ArrowDtype(pa.string()), "category",
)  # fmt: skip
OTHERS = st.sampled_from([None, 0, -1.5, np.nan, np.inf, "text", "\ud83d", np.zeros(2), [1], pd.NA, b"", True, 2**80])
NAMES = (
    "score",
    "rank",
    "exit_layer",
    "score_2",
    "score_3",
    "title",
    "url",
    "features",
    "_body",
    "level_0",
    "",
    0,
    None,
)


def column(values: list[Any], dtype: Any) -> pd.Series:
    """A column of a dtype, if the dtype can hold the values."""
    series = pd.Series(values, dtype=object)
    try:
        return series.astype(dtype)
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        return series


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    """A frame that may or may not be a result frame."""
    count = draw(st.integers(0, 4))

    def drawn(values: st.SearchStrategy[Any]) -> list[Any]:
        return [draw(values) for _ in range(count)]

    odd = draw(st.sampled_from(["", "", "", "", "ids", "no ids", "texts"]))
    ids = {"ids": IDS | ODD_IDS, "no ids": IDS | NO_IDS}.get(
        odd, IDS | st.integers(0, 2) if draw(st.booleans()) else IDS
    )
    texts = TEXTS | st.sampled_from(NO_TEXTS) if odd == "texts" else TEXTS
    columns = {
        name: column(drawn(values), draw(st.sampled_from(DTYPES)))
        for name, values in (("qid", ids), ("docno", ids), ("query", texts), ("text", texts))
    }
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True)):
        columns[name] = pd.Series(drawn(texts if name in ("title", "url") else OTHERS), dtype=object)
    for name in draw(st.sampled_from([(), (), (), (), (), (), ("text",), ("qid", "query"), ("docno",)])):
        del columns[name]
    frame = pd.DataFrame({name: columns[name] for name in draw(st.permutations(list(columns)))})
    index = draw(st.sampled_from(["", "", "repeated", "words", "several", "missing"]))
    if index == "repeated":
        frame.index = pd.Index(drawn(st.integers(-1, 1)))
    elif index == "words":
        frame.index = pd.Index(drawn(st.sampled_from(["qid", "a", "b"])), name="qid")
    elif index == "several":
        frame.index = pd.MultiIndex.from_arrays([drawn(st.integers(0, 1)), range(count)], names=["score", "rank"])
    elif index == "missing":
        frame.index = pd.Index(drawn(st.sampled_from([np.nan, 1.5])), dtype=float)
    if draw(st.sampled_from([False] * 15 + [True])):
        frame = pd.concat([frame, frame[[draw(st.sampled_from(list(frame.columns)))]]], axis=1)
    return frame


def is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def is_sound(frame: pd.DataFrame, reranker: LLMReranker) -> bool:
    """Whether a frame is a result frame, according to the documentation of ``transform``."""
    if not {"qid", "docno", "query", "text"} <= set(frame.columns) or frame.columns.has_duplicates:
        return False
    titles = [v for v in frame.get("title", ()) if not (pd.api.types.is_scalar(v) and pd.isna(v))]
    texts = [*frame["query"], *frame["text"], *(titles if isinstance(reranker, RankLLaMAReranker) else ())]
    ids = [*frame["qid"], *frame["docno"]]
    hashable = not any(isinstance(value, list | dict) for value in ids)
    there = not any(pd.isna(value) for value in ids if pd.api.types.is_scalar(value))
    return hashable and there and all(map(is_text, [*texts, *(value for value in ids if isinstance(value, str))]))


@pytest.mark.parametrize("name", RERANKERS)
@FUZZED
@given(frames())
def test_any_frame_is_ranked_or_refused(name: str, rows: pd.DataFrame) -> None:
    reranker, before = RERANKERS[name], rows.copy()
    try:
        got = reranker.transform(rows)
    except (ValueError, pt.validate.InputValidationError):
        if is_sound(before, reranker):
            raise
        event("refused")
        return
    finally:
        pd.testing.assert_frame_equal(rows, before)
    assert is_sound(before, reranker) or before.empty
    event("ranked")
    added = ["score", "rank", *ADDED.get(name, ())]
    assert set(got.columns) == {*before.columns, *added}
    kept = [column for column in before.columns if column not in added]
    pd.testing.assert_frame_equal(got[kept], before[kept])
    assert got["score"].dtype == np.float64
    assert np.isfinite(got["score"]).all()
    of_query: dict[Any, list[tuple[int, float]]] = {}
    for qid, rank, score in zip(got["qid"], got["rank"], got["score"], strict=True):
        of_query.setdefault(qid, []).append((rank, score))
    for ranked in of_query.values():
        ranks, scores = zip(*sorted(ranked), strict=True)
        assert ranks == tuple(range(len(ranked)))
        assert list(scores) == sorted(scores, reverse=True)


# -- files

#: Values to put in place of a key's in a JSON object.
VALUES = st.sampled_from(
    [None, True, False, 0, -1, 1, 2, 3, 64, 10**12, -(10**12), 2**70, 0.5, -1.5, 1e308, float("nan"), float("inf"), "",
     "x", "64", "../../etc", "/etc/passwd", "\0", "\ud83d", "y" * 100_000, [], [1], {}, {"a": 1}, [[[[]]]],
     {"rope_type": "yarn"}]
)  # fmt: skip
KEYS = st.sampled_from(
    ["rope_parameters", "rope_scaling", "sliding_window", "head_dim", "layer_types", "num_labels", "dtype", "id2label",
     "attn_implementation", "_attn_implementation", "is_encoder_decoder", "quantization_config", "to_dict", "layer_sep",
     "start_layer", "alpha_pattern", "use_dora", "use_rslora", "pad_token", "added_tokens_decoder", "weight_map",
     "tokenizer_class", "chat_template", "model_type", "pre_tokenizer", "model", "prompt", "pos_scores"]
)  # fmt: skip


@st.composite
def broken(draw: st.DrawFn, sound: bytes) -> bytes:
    """A file's bytes after a change: another value for a key, or some other bytes anywhere."""
    how = draw(st.sampled_from(["key", "key", "key", "cut", "flip", "flip", "insert", "repeat", "all"]))
    try:
        said = json.loads(sound)
    except ValueError:
        said = None
    if how == "key" and isinstance(said, dict):
        place = said
        while nested := [key for key, value in place.items() if isinstance(value, dict) and value]:
            if not draw(st.booleans()):
                break
            place = place[draw(st.sampled_from(nested))]
        place[draw(st.sampled_from([*place]) | KEYS)] = draw(VALUES)
        return json.dumps(said).encode()
    ends = [8, 200, len(sound)]  # up to the header, in it, and anywhere
    at = draw(st.integers(0, draw(st.sampled_from(ends))))
    some = draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b"\0", b"\xff" * 8, b"[" * 5000, b"9" * 5000]))
    if how == "cut":
        return sound[:at]
    if how == "insert":
        return sound[:at] + some + sound[at:]
    if how == "repeat":
        return sound[:at] + sound[: draw(st.integers(0, 300))] + sound[at:]
    if how == "all":
        return some
    return sound[:at] + some + sound[at + len(some) :]


def binned(folder: Path) -> bytes:
    """An adapter's tensors in torch's format."""
    into = io.BytesIO()
    torch.save(load_file(folder / "adapter_model.safetensors"), into)
    return into.getvalue()


ADAPTER, BASE = MODELS / "rankllama_adapter", MODELS / "rankllama_base"
#: By kind of checkpoint: its folder, and how to open a copy with a broken file.
OPENED: dict[str, tuple[Path, Callable[[Path], LLMReranker]]] = {
    "model": (Path(FULL), lambda folder: MatroyshkaReranker(folder, dtype="float32", cutoff=2)),
    "adapter": (ADAPTER, lambda folder: RankLLaMAReranker(folder, base_model=BASE, dtype="float32")),
    "base": (BASE, lambda folder: RankLLaMAReranker(ADAPTER, base_model=folder, dtype="float32")),
    "adapters": (
        MODELS / "adapter_sd",
        lambda folder: MatroyshkaReranker(
            MODELS / "mistral_base", adapters=folder, start_layer=2, cutoff=2, dtype="float32"
        ),
    ),
}
BROKEN = [
    *(("model", file) for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")),
    *(("adapter", file) for file in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")),
    ("base", "config.json"),
    ("adapters", "adapter_config.json"),
]


def refused(message: str, named: bool) -> None:
    """An error has to name its place, and be short."""
    event("refused")
    assert named, message
    assert len(message) < 2000


@pytest.mark.parametrize(("kind", "file"), BROKEN)
@FUZZED
@given(st.data())
def test_a_broken_checkpoint_scores_or_is_named(kind: str, file: str, data: st.DataObject) -> None:
    folder, opened = OPENED[kind]
    content = binned(folder) if file.endswith(".bin") else (folder / file).read_bytes()
    with tempfile.TemporaryDirectory() as temporary:
        for other in folder.iterdir():
            if other.name != file and not (file.endswith(".bin") and other.name == "adapter_model.safetensors"):
                (Path(temporary) / other.name).symlink_to(other)
        (Path(temporary) / file).write_bytes(data.draw(broken(content)))
        try:
            score = opened(Path(temporary)).compute_score(("a query", "a passage"))
        except (ValueError, OSError) as error:
            refused(str(error), temporary in str(error) or "the tokenizer makes" in str(error))
        except ScoringError as error:  # weights of random numbers
            refused(str(error), "the checkpoint may be damaged" in str(error))
        else:
            event("scored")
            assert np.isfinite(score)


LINES = {
    "train.jsonl": b'{"query_id": "1", "query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [1], "neg_scores": '
    b'[0, 0.5], "prompt": "Relevant?"}\n{"query": "q", "positive_passages": [{"text": "p", "title": "t"}], '
    b'"negative_passages": [{"text": "n"}]}\n',
    "run.txt": b"1 d1 0.5\n1 d2 0.25\n2 d1 -1e3\n",
    "run.trec": b"1 Q0 d1 1 0.5 tag\n1 Q0 d2 2 0.25 tag\n",
    "qrels.txt": b"1 0 d1 1\n1 0 d2 0\n2 0 d1 3\n",
    "topics.tsv": b"1\ta query\n2\tanother query\n",
    "topics.jsonl": b'{"qid": "1", "query": "a query"}\n{"_id": "2", "text": "another"}\n',
    "texts.tsv": b"d1\ta title\ta text\nd2\t\tanother\n",
    "texts.jsonl": b'{"docno": "d1", "text": "a text", "title": "t", "url": "u"}\n{"_id": "d2", "text": ""}\n',
    "rerank.jsonl": b'{"query_id": "1", "query": "q", "docid": "d1", "text": "a text", "title": "", "score": 0.5}\n'
    b'{"query_id": "1", "query": "q", "docid": "d2", "text": "a text", "url": "u"}\n',
}
READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "train": read_lines, "run": formats.read_run, "qrels": collection.read_qrels, "topics": collection.read_topics,
    "texts": collection.read_texts, "rerank": formats.read_rerank,
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", LINES)
@FUZZED
@given(st.data())
def test_broken_lines_are_read_or_named(name: str, zipped: bool, data: st.DataObject) -> None:
    sound = LINES[name]
    if zipped:
        sound = gzip.compress(data.draw(broken(sound)), mtime=0) if data.draw(st.booleans()) else gzip.compress(sound)
    content = data.draw(broken(sound))
    if name.endswith(".jsonl") and not zipped and data.draw(st.booleans()):  # the keys and values of one line
        first, second, _ = sound.split(b"\n")
        content = first + b"\n" + data.draw(broken(second))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / (name + ".gz" * zipped)
        path.write_bytes(content)
        try:
            rows = list(READERS[name.partition(".")[0]](path))
        except ValueError as error:
            named = str(error).startswith(f"{path}, line ") or str(error) == f"{path}: no training data in it."
            refused(str(error), named)
        else:
            event("read")
            assert all(isinstance(row, dict | tuple) for row in rows)
