"""JSON files are read as data, and refused by name if they are something else."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import MODELS, lfs_pointer

from pyterrier_llmrerank import MatroyshkaReranker
from pyterrier_llmrerank.checkpoints import json_files
from pyterrier_llmrerank.checkpoints.json_files import read_json

PAIR = ("a query", "a passage")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"\0", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_json_of_any_length_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}" + " " * 100)
    assert read_json(tmp_path / "config.json") == {}
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 100)
    with pytest.raises(ValueError, match=r"config\.json: 102 bytes; .* at most 100"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, file: str) -> None:
    shutil.copytree(MODELS / "costwise_full", tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_bytes(lfs_pointer(path.read_bytes()))
    with pytest.raises(
        ValueError, match=rf"{re.escape(file)}: a Git LFS pointer, not the file itself; run 'git lfs pull'"
    ):
        MatroyshkaReranker(tmp_path / "model").compute_score(PAIR)
