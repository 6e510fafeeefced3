"""GGUF files score as their models do, and are refused by name if they are broken."""

import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ids_of, lfs_pointer, no_file_above
from safetensors.torch import load_file

from pyterrier_llmrerank import MatroyshkaReranker
from pyterrier_llmrerank.checkpoints import gguf
from pyterrier_llmrerank.checkpoints.gguf import dequantise
from pyterrier_llmrerank.checkpoints.json_files import read_json
from pyterrier_llmrerank.checkpoints.locate import folder_of


def test_a_gguf_file_scores_as_its_model_does(
    tiny_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path))
    path, model = tiny_gguf
    reranker = MatroyshkaReranker(path, dtype="float32")
    pair = ("what", "Yes, this")
    score = reranker.compute_score(pair)
    _, _, tokenizer = reranker.scorer().weights[0].at_depth(1)
    (ids,) = ids_of(reranker, [pair])
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([ids.flat()])).logits[0, -1]
    assert score == pytest.approx(logits[tokenizer("Yes")["input_ids"][-1]].item(), abs=1e-4)
    (folder,) = (tmp_path / "llmrerank").glob("gguf-*")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert dequantise(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        folder_of(str(tmp_path / "m.gguf"), "model")


def test_a_git_lfs_pointer_of_a_gguf_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(lfs_pointer(b""))
    with pytest.raises(ValueError, match=r"m\.gguf: a Git LFS pointer"):
        folder_of(str(tmp_path / "m.gguf"), "model")


def test_a_broken_gguf_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    (tmp_path / "m.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(ValueError, match=r"base_model=.*m\.gguf.*cannot be read"):
        folder_of(str(tmp_path / "m.gguf"), "base_model")
    assert [path.name for path in (tmp_path / "home" / "llmrerank").iterdir()] == ["gguf.lock"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b"llama.block_count\x04\0\0\0\x02",
            b"llama.block_count\x04\0\0\0\x03",
            "describes a model of .* weights and holds",
        ),
        (b"llama.block_count\x04\0\0\0\x02\0", b"llama.block_count\x04\0\0\0\xff\xff", "num_hidden_layers is 65535"),
        (b"embedding_length\x04\0\0\0\x40\0\0\0", b"embedding_length\x04\0\0\0\0\0\0\x7f", "hidden_size is"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_zz.weight", "it has a tensor 'blk.1.ffn_zz.weight', which no model_t"),
        (b"blk.1.ffn_up.weight", b"rope_freqs_1.weight", "it has a tensor 'rope_freqs_1.weight', which no model_type"),
        (b"general.architecture", b"general.architectur_", "cannot be read"),
    ],
)
def test_a_gguf_that_lies_is_named_and_leaves_nothing(
    tiny_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    old: bytes, new: bytes, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    sound = tiny_gguf[0].read_bytes()
    assert old in sound
    (tmp_path / "m.gguf").write_bytes(sound.replace(old, new))
    with pytest.raises(ValueError, match=rf"m\.gguf': cannot be read as a GGUF language model: .*{message}|{message}"):
        folder_of(str(tmp_path / "m.gguf"), "model")
    assert [path.name for path in (tmp_path / "home" / "llmrerank").iterdir()] == ["gguf.lock"]


def test_a_cut_off_gguf_is_named(tiny_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    sound = tiny_gguf[0].read_bytes()
    for length in (3, 30, 300, 1500, len(sound) // 2, len(sound) - 100):
        (tmp_path / "m.gguf").write_bytes(sound[:length])
        with pytest.raises(ValueError, match=r"m\.gguf': cannot be read"):
            folder_of(str(tmp_path / "m.gguf"), "model")


def test_a_full_disk_leaves_no_model_of_a_gguf(
    tiny_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    with no_file_above(50_000), pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*too large"):
        dequantise(tiny_gguf[0])
    assert [path.name for path in (tmp_path / "home" / "llmrerank").iterdir()] == ["gguf.lock"]
    assert (dequantise(tiny_gguf[0]) / "model.safetensors").is_file()


def test_equal_files_share_a_folder(
    tiny_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each environment may have a copy of a model; a file with other contents is another model."""
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    folder = dequantise(tiny_gguf[0])
    copy = tmp_path / "other.gguf"
    copy.write_bytes(tiny_gguf[0].read_bytes())
    assert dequantise(copy) == folder
    copy.write_bytes(copy.read_bytes() + b"\0")
    assert dequantise(copy) != folder


def test_one_of_several_converts_a_file(
    tiny_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path))
    read, converted = gguf._read_gguf, []

    def slow(file: Path) -> Any:
        converted.append(file)
        time.sleep(0.3)
        return read(file)

    monkeypatch.setattr(gguf, "_read_gguf", slow)
    with ThreadPoolExecutor(3) as threads:
        folders = set(threads.map(dequantise, [tiny_gguf[0]] * 3))
    assert len(folders) == len(converted) == 1


def test_a_file_is_converted_where_nothing_can_be_locked(
    tiny_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then several processes may convert it, and the first is as good as the last."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", no_locks)
    convert = gguf._convert

    def beside_another(file: Path, folder: Path, argument: str) -> None:
        convert(file, folder, argument)
        name = f"gguf-{gguf._digest(file, gguf._state(file))}"
        shutil.copytree(folder, tmp_path / "llmrerank" / name)

    monkeypatch.setattr(gguf, "_convert", beside_another)
    folder = dequantise(tiny_gguf[0])
    assert [path.name for path in (tmp_path / "llmrerank").iterdir() if path.is_dir()] == [folder.name]


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_changes_while_it_is_read_is_refused(
    replaced: bool, tiny_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise other weights would open under the digest of equal, sound files."""
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    read, sound, file = gguf._read_gguf, tiny_gguf[0].read_bytes(), tmp_path / "m.gguf"

    def changing(path: Path) -> Any:
        written = tmp_path / "new" if replaced else file
        written.write_bytes(sound[:-4] + b"\0\0\x80\x3f")
        os.utime(written, ns=(state.st_atime_ns, state.st_mtime_ns + (not replaced)))
        written.replace(file)
        return read(path)

    file.write_bytes(sound)
    state = file.stat()
    monkeypatch.setattr(gguf, "_read_gguf", changing)
    with pytest.raises(ValueError, match=r"model=.*m\.gguf' changed while it was read"):
        dequantise(file)
    assert list((tmp_path / "home" / "llmrerank").glob("gguf-*")) == []


def test_a_gguf_is_dequantised_once(smollm2: str) -> None:
    folder = dequantise(Path(smollm2))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert dequantise(Path(smollm2)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert "quantization_config" not in read_json(folder / "config.json")
