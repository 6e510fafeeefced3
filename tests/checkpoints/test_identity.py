"""Files that a model is read from are told apart by their content, and no other files count."""

import shutil
from pathlib import Path

from conftest import MODELS

from pyterrier_llmrerank.checkpoints.identity import fingerprint


def test_a_fingerprint_covers_the_files_that_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(MODELS / "rankllama_base", folder)
    before = fingerprint(folder)
    for unread in ("consolidated.safetensors", "pytorch_model.bin", "tokenizer.model", "README.md"):
        (folder / unread).write_bytes(b"x")
        assert fingerprint(folder) == before, unread
    for read in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        content = (folder / read).read_text()
        (folder / read).write_text(content + " ")
        assert fingerprint(folder) != before, read
        (folder / read).write_text(content)
    assert fingerprint(folder.rename(tmp_path / "moved")) == before
