"""A teacher's scores are written into training files of both forms; an interrupted run ends as if it never was."""

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from conftest import MODELS

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.cli import main
from pyterrier_llmrerank.training import data, teacher_scores
from pyterrier_llmrerank.training.teacher_scores import join_titles, teach

LINES: list[dict[str, Any]] = [
    {"note": {"b": [1, None], "a": "大"}, "query": "panda", "pos": ["a panda"], "neg": ["tea", "tide", "tea"]},
    {
        "query_id": "q7",
        "query": "tide",
        "positive_passages": [{"docid": "d", "title": "Tides", "text": "high"}],
        "negative_passages": [{"docid": "d", "title": "", "text": "high"}, {"text": "low"}],
        "more": "\ud83d",
    },
    {"query_id": "q7", "query": "panda", "pos": ["bamboo", "a panda"], "neg": ["tea"], "prompt": "Relevant?"},
    {"query": "bread", "pos": ["flour"], "neg": ["glacier"]},
]


def score_of(query: str, text: str, title: str | None = None) -> float:
    return float(np.float32(zlib.crc32(repr((query, text, title or None)).encode()) / 1e9))


class Teacher(pt.Transformer):
    """Score by a hash, in shuffled order, and keep the queries that were asked."""

    def __init__(self, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame) -> None:
        self.change, self.asked = change, []

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        assert not inp.duplicated(["qid", "docno"]).any()
        self.asked += list(inp["qid"].unique())
        titles = inp["title"] if "title" in inp else [None] * len(inp)
        scores = [score_of(*row) for row in zip(inp["query"], inp["text"], titles, strict=True)]
        return self.change(inp.assign(score=np.float32(scores)).sample(frac=1.0, random_state=1))


def taught() -> list[dict[str, Any]]:
    """Score each line by itself."""
    expected = []
    for line in LINES:
        if "pos" in line:
            pairs = {key: [(text, None) for text in line[key]] for key in ("pos", "neg")}
        else:
            sides = (line["positive_passages"], line["negative_passages"])
            pairs = {
                k: [(p["text"], p.get("title")) for p in side] for k, side in zip(("pos", "neg"), sides, strict=True)
            }
        expected.append(line | {f"{k}_scores": [score_of(line["query"], *p) for p in pairs[k]] for k in pairs})
    return expected


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(teacher_scores, "CHUNK", 6)  # lines 1 and 2; 3 and 4
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.mark.parametrize("name", ["taught.jsonl", "taught.jsonl.gz"])
def test_scores_of_both_forms(source: Path, name: str) -> None:
    target = source.with_name(name)
    assert teach(source, target, Teacher()) == 4
    text = gzip.decompress(target.read_bytes()) if name.endswith("gz") else target.read_bytes()
    written = [json.loads(line) for line in text.splitlines()]
    assert written == taught()
    assert [list(line) for line in written] == [[*line, "pos_scores", "neg_scores"] for line in LINES]
    assert len(list(data.read_lines(target, teacher=True))) == 4


def some_of(size: int) -> list[int]:
    """The ends of a range, and some bytes in it."""
    return sorted({0, 1, size - 1, size, *range(0, size, 61)})


def test_a_run_resumes_from_any_byte(source: Path) -> None:
    whole = source.with_name("whole.jsonl")
    teach(source, whole, Teacher())
    text, journal = whole.read_bytes(), whole.with_name("whole.jsonl.journal").read_bytes()
    settings, *blocks, finished = journal.splitlines(keepends=True)
    assert (len(blocks), finished) == (2, b'"finished"\n')
    sizes = [json.loads(block)[2] for block in blocks]
    assert sum(sizes) == len(text)
    states, written, logged = [], 0, len(settings)
    for block, size in zip(blocks, sizes, strict=True):  # the journal's line is written before the block
        states += [(written, logged + end) for end in some_of(len(block))]
        logged += len(block)
        states += [(written + end, logged) for end in some_of(size)]
        written += size
    target = source.with_name("cut.jsonl")
    for end, journal_end in states:
        target.write_bytes(text[:end])
        target.with_name("cut.jsonl.journal").write_bytes(journal[:journal_end])
        teacher = Teacher()
        teach(source, target, teacher, resume=True)
        assert target.read_bytes() == text
        kept = sum(end >= size for size in (sizes[0], len(text)))
        assert teacher.asked == ["1", "2", "3", "4"][2 * kept :]
    assert teach(source, target, Teacher(), resume=True) == 0
    with source.open("a") as lines:
        lines.write(json.dumps(LINES[3]) + "\n")
    assert teach(source, target, Teacher(), resume=True) == 1  # what was added
    assert json.loads(target.read_text().splitlines()[-1]) == taught()[3]


def test_another_source_or_teacher_is_not_resumed(source: Path) -> None:
    target = source.with_name("taught.jsonl")

    def stop(frame: pd.DataFrame) -> pd.DataFrame:
        if "3" in set(frame["qid"]):
            raise KeyboardInterrupt
        return frame

    with pytest.raises(KeyboardInterrupt) as stopped:
        teach(source, target, Teacher(stop))
    assert stopped.value.__notes__ == [f"{target} holds 2 lines, all complete; to continue, set resume=True."]
    before = target.read_bytes()
    with pytest.raises(FileExistsError, match="already exists and is not overwritten"):
        teach(source, target, Teacher())
    with pytest.raises(ValueError, match=r"teacher='<.*Teacher object>', not 'pt.apply.generic\(\)'"):
        teach(source, target, pt.apply.generic(lambda frame: frame), resume=True)
    with pytest.raises(ValueError, match="overwrite=False, not True"):
        teach(source, target, Teacher(), resume=True, overwrite=True)
    source.write_text(source.read_text().replace("a panda", "a whale"))
    with pytest.raises(ValueError, match=r"train\.jsonl, from line 1: the lines have changed since .* was written"):
        teach(source, target, Teacher(), resume=True)
    assert target.read_bytes() == before


def test_earlier_scores_are_replaced_only_with_overwrite(source: Path) -> None:
    source.write_text(json.dumps(LINES[3]) + "\n" + json.dumps({"neg_scores": ["old"], **LINES[3]}) + "\n")
    target, teacher = source.with_name("taught.jsonl"), Teacher()
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: neg_scores is already present; allowed with"):
        teach(source, target, teacher)
    assert teacher.asked == []
    assert not target.exists()
    teach(source, target, teacher, overwrite=True)
    first, second = map(json.loads, target.read_text().splitlines())
    assert first == second == taught()[3]
    assert next(iter(second)) == "neg_scores"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.assign(score=[float("nan"), *f["score"][1:]]),
            r"line \d: the teacher's score of \w+\[\d\] is nan",
        ),
        (
            lambda f: f.assign(score=float("inf")),
            r"line 1: the teacher's score of pos\[0\] is inf; expected one finite",
        ),
        (lambda f: f.assign(score="high"), r"line 1: the teacher's score of pos\[0\] is 'high'"),
        (lambda f: f[f["text"] != "low"], r"line 2: the teacher's score of negative_passages\[1\] is missing"),
        (lambda f: pd.concat([f, f]), r"line 1: the teacher's score of pos\[0\] is \[.*\]; expected one finite number"),
        (lambda f: f.drop(columns="score"), r"the teacher returns columns \[.*\]; missing: score"),
    ],
)
def test_invalid_scores_are_refused(source: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    target = source.with_name("taught.jsonl")
    with pytest.raises(ValueError, match=message):
        teach(source, target, Teacher(change))
    assert not target.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"query": "q", "pos": []}', "line 5: pos is "), ("[]", "line 5: "), ("{", "line 5: not JSON")],
)
def test_malformed_lines_are_named_before_scoring(source: Path, line: str, message: str) -> None:
    with source.open("a") as lines:
        lines.write(line + "\n")
    teacher = Teacher()
    with pytest.raises(ValueError, match=message):
        teach(source, source.with_name("taught.jsonl"), teacher)
    source.write_text("\n")
    with pytest.raises(ValueError, match="no training data"):
        teach(source, source.with_name("taught.jsonl"), teacher)
    with pytest.raises(FileNotFoundError, match="source='none': no such file"):
        teach("none", source.with_name("taught.jsonl"), teacher)
    assert teacher.asked == []


def test_titles_join_texts(source: Path) -> None:
    seen: list[str] = []
    spy = pt.apply.generic(lambda frame: frame.assign(score=[float(seen.append(t) is None) for t in frame["text"]]))
    teach(source, source.with_name("taught.jsonl"), join_titles() >> spy)
    assert {"Tides high", "high", "low"} < set(seen)


@pytest.mark.parametrize("kind", ["rankllama", "matroyshka"])
def test_the_command_teaches_by_a_reranker(kind: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("taught.jsonl")
    given = {
        "rankllama": ["--model", str(MODELS / "rankllama_adapter"), "--base-model", str(MODELS / "rankllama_base")],
        "matroyshka": ["--reranker", "matroyshka", "--model", str(MODELS / "costwise_full"), "--cutoff", "6"],
    }[kind]
    command = ["teach", str(source), str(target), *given, "--dtype", "float32"]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0
    written = [json.loads(line) for line in target.read_text().splitlines()]
    if kind == "rankllama":
        reranker = RankLLaMAReranker(
            MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32"
        )
        frame = pd.DataFrame({"qid": "1", "docno": "d", "query": "tide", "text": ["high"], "title": ["Tides"]})
        wanted = reranker.transform(frame)["score"].iloc[0]
    else:
        wanted = MatroyshkaReranker(MODELS / "costwise_full", cutoff=6, dtype="float32").compute_score(
            ("tide", "Tides high")
        )
    assert written[1]["pos_scores"] == [pytest.approx(wanted, abs=1e-5)]
    assert [len(line["neg_scores"]) for line in written] == [3, 2, 1, 1]
    assert main(command) == 1
    assert "already exists and is not overwritten" in capsys.readouterr().err
    assert main(["teach", str(source), "x.jsonl", "--compress-ratio", "2"]) == 1
    assert "error: --compress-ratio is not an option of --reranker=rankllama" in capsys.readouterr().err
