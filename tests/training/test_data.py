"""Training files are read in both forms, named when malformed, and drawn from in one way everywhere."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, golden
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pyterrier_llmrerank.engine.inputs import MatroyshkaInputs
from pyterrier_llmrerank.training import DistillTraining, RankLLaMATraining
from pyterrier_llmrerank.training.batches import Collator, Groups
from pyterrier_llmrerank.training.data import COLUMNS, open_data, read_lines
from pyterrier_llmrerank.training.records import Example, read_example

MATROYSHKA = {"query": "q", "pos": ["p0", "p1"], "neg": ["n0", "n1", "n2"]}
SCORED = {**MATROYSHKA, "pos_scores": [1.0, 2], "neg_scores": [0.1, 0.2, 0.3], "prompt": "Relevant?"}
TEVATRON = {
    "query_id": "1",
    "query": "q",
    "positive_passages": [{"docid": "a", "title": "T", "text": "p"}],
    "negative_passages": [{"docid": "b", "text": "n"}, {"docid": "c", "title": "", "text": "m"}],
}


def plain(text: str, title: str | None) -> str:
    return text


def test_both_forms() -> None:
    assert read_example(MATROYSHKA, plain) == Example("q", ["p0", "p1"], ["n0", "n1", "n2"])
    assert read_example(SCORED, plain).teacher == ([1.0, 2], [0.1, 0.2, 0.3])
    assert read_example(SCORED, plain).prompt == "Relevant?"
    scored = read_example({**TEVATRON, "pos_scores": [1.0], "neg_scores": [0.5, 2]}, plain)
    assert scored == Example("q", ["p"], ["n", "m"], ([1.0], [0.5, 2.0]))
    with pytest.raises(ValueError, match=r"neg_scores is \[0.5\]; expected 2 finite numbers"):
        read_example({**TEVATRON, "pos_scores": [1.0], "neg_scores": [0.5]}, plain)


def test_passages_are_read_as_each_model_reads_them() -> None:
    read = read_example(TEVATRON, RankLLaMATraining().body)
    assert read == Example("q", ["document: T p"], ["document: n", "document:  m"])
    assert read_example(TEVATRON, DistillTraining().body) == Example("q", ["T p"], ["n", "m"])
    assert read_example(MATROYSHKA, RankLLaMATraining().body).positives == ["document: p0", "document: p1"]
    assert read_example(MATROYSHKA, DistillTraining().body).positives == ["p0", "p1"]


def test_missing_teacher_scores_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(SCORED) + "\n" + json.dumps(MATROYSHKA) + "\n")
    assert len(list(read_lines(path))) == 2
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: no pos_scores and neg_scores, which training with"):
        list(read_lines(path, teacher=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "query is None"),
        ({"pos": []}, r"pos is \[\]; expected a list of strings, at least one"),
        ({"neg": "n"}, "neg is 'n'"),
        ({"neg": ["a", 3]}, "neg is .*; expected a list of strings"),
        ({"prompt": 3}, "prompt is 3"),
        ({"pos_scores": [1.0]}, r"pos_scores is \[1.0\]; expected 2 finite numbers"),
        ({"pos_scores": [1.0, float("nan")]}, r"pos_scores is \[1.0, nan\]; expected 2 finite numbers"),
        ({"neg_scores": None}, "neg_scores is None; expected 3 finite numbers"),
        ({"positive_passages": [{"title": "x"}]}, "positive_passages is .*; expected a list of passages with text"),
        ({"positive_passages": [{"text": "x"}]}, "negative_passages is None"),
        ({"pos": None}, "neither positive_passages nor pos; expected positive_passages and negative_passages.* or pos"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(SCORED) + "\n" + json.dumps(SCORED | change) + "\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 2: {message}"):
        list(read_lines(path))


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b"\xff\xfe",
        b"\0",
        b"[" * 100_000,
        b'{"query": "\\ud83d", "pos": ["p"], "neg": ["n"]}',
        b"9" * 5000,
    ],
)
def test_a_line_without_an_object_is_refused(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "train.jsonl").write_bytes(json.dumps(SCORED).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match="line 2: "):
        list(read_lines(tmp_path / "train.jsonl"))


def test_files_and_folders(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text((json.dumps(MATROYSHKA | {"query": name}) + "\n") * 2)
    data = open_data("train_data", [str(tmp_path)])
    assert [read_example(row, plain).query for row in data] == ["a.jsonl"] * 2 + ["b.jsonl"] * 2
    assert len(open_data("train_data", [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])) == 4
    for name in ("./nothing", "data/nothing.jsonl", "a.txt"):
        with pytest.raises(FileNotFoundError, match=f"eval_data='{name}': no such file"):
            open_data("eval_data", [name])
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl: no training data"):
        open_data("train_data", [str(tmp_path)])


def test_lines_and_files_may_have_different_keys(tmp_path: Path) -> None:
    """Data that passed the check trains: both forms, both kinds of numbers, missing titles, compression."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in (MATROYSHKA, SCORED | {"pos_scores": [1, 2]}, TEVATRON | {"query_id": 7}))
    )
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as lines:
        lines.write(json.dumps(SCORED | {"pos_scores": [0.5, 2]}) + "\n" + json.dumps(TEVATRON | {"extra": 1}) + "\n")
    data = open_data("train_data", [str(tmp_path)])
    assert set(data.column_names) == {*COLUMNS, "prompt"}
    read = [read_example(row, DistillTraining().body) for row in data]
    wanted = [MATROYSHKA, SCORED | {"pos_scores": [1, 2]}, TEVATRON, SCORED | {"pos_scores": [0.5, 2]}, TEVATRON]
    assert read == [read_example(record, DistillTraining().body) for record in wanted]
    assert data[2]["query_id"] == "7"
    (tmp_path / "b.jsonl.gz").write_bytes((tmp_path / "b.jsonl.gz").read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz, line \d"):
        open_data("train_data", [str(tmp_path)])


@given(st.integers(1, 5), st.integers(1, 20), st.integers(2, 24), st.integers(0, 2**16))
def test_a_group_is_a_positive_and_different_negatives(positives: int, negatives: int, size: int, seed: int) -> None:
    pos, neg = ([f"{kind}{i}" for i in range(n)] for kind, n in (("p", positives), ("n", negatives)))
    scores = [float(i) for i in range(positives)], [float(i) for i in range(negatives)]
    group = Example("q", pos, neg, scores).draw(size, random.Random(seed))
    assert len(group.passages) == size
    assert group.passages[0] in pos
    assert set(group.passages[1:]) <= set(neg)
    if size - 1 <= negatives:
        assert len(set(group.passages)) == size
    assert group.teacher == [float(text[1:]) for text in group.passages]


def test_the_draw_is_the_same_in_every_process_and_new_every_epoch() -> None:
    groups = Groups([MATROYSHKA] * 30, 3, 5, plain)
    epochs = []
    for epoch in (0, 1):
        groups.epoch = epoch
        epochs.append([groups[index].passages for index in range(30)])
    assert epochs[0][:3] == [
        ["p1", "n0", "n2"],
        ["p1", "n1", "n0"],
        ["p1", "n1", "n2"],
    ]  # literals, since each run of the tests is another process
    assert epochs[0] != epochs[1]
    assert len({tuple(passages) for passages in epochs[0]}) > 3


def test_workers_that_outlive_an_epoch_draw_it_anew() -> None:
    groups = Groups([MATROYSHKA] * 8, 3, 5, plain)
    loader = torch.utils.data.DataLoader(
        groups, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    drawn = []
    for epoch in range(2):
        groups.epoch = epoch
        drawn.append([group.passages for group in loader])
        assert drawn[-1] == [groups[index].passages for index in range(8)]
    assert drawn[0] != drawn[1]


def test_files_need_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyterrier_llmrerank.training.data.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"train_data: .* need datasets: pip install 'pyterrier-llmrerank\[train\]'"):
        open_data("train_data", ["train.jsonl"])


def test_a_dataset_of_the_hub_is_checked_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    rows = [TEVATRON, MATROYSHKA]

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return rows

    monkeypatch.setattr("datasets.load.load_dataset", load_dataset)
    assert open_data("train_data", ["owner/name"], split="dev") is rows
    assert asked == [("owner/name", "dev")]
    rows.append({"query": "q", "pos": []})
    with pytest.raises(ValueError, match="owner/name, row 2: "):
        open_data("train_data", ["owner/name"])


def test_batches_are_the_original_ones() -> None:
    wanted = golden("matroyshka_train_self_distillation.json")["batches"]["equal"]
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "mistral_base")
    collate = Collator(tokenizer, lambda prompt: MatroyshkaInputs(query_max_length=32, total=32 + 64))
    groups = []
    for number, record in enumerate(wanted["rows"]):
        teacher = wanted["teacher_scores"][4 * number : 4 * number + 4]
        texts = dict(zip(record["pos_scores"] + record["neg_scores"], record["pos"] + record["neg"], strict=True))
        one = Example(record["query"], [texts[teacher[0]]], [texts[s] for s in teacher[1:]])
        groups.append(one.draw(4, random.Random(0)))
    batch = collate(groups)
    assert batch.size == 4
    assert batch.teacher is None
    ids = batch.packed.ids[batch.packed.places]
    assert sorted(ids.tolist()) == sorted(wanted["input_ids"])
    assert batch.packed.prefix.tolist() == wanted["query_lengths"]


def test_a_prompt_of_the_data_is_used() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "mistral_base")
    collate = Collator(tokenizer, lambda prompt: MatroyshkaInputs(prompt or "usual"))
    batch = collate([read_example(record, plain).draw(3, random.Random(0)) for record in (SCORED, SCORED)])
    assert batch.teacher is not None
    assert batch.teacher.shape == (2, 3)
    own = batch.packed.ids[batch.packed.pair_of_token == 0]
    assert tokenizer.decode(own).endswith("Relevant?")
    assert collate([read_example(MATROYSHKA, plain).draw(3, random.Random(0))]).packed.ids[0] == own[0]


def test_groups_are_named_by_id_or_place() -> None:
    groups = Groups([MATROYSHKA, TEVATRON | {"query_id": "q7"}], 3, 0, plain)
    assert [groups[0].name, groups[1].name] == ["line 1", "q7"]
