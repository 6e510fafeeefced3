"""Tensors are read by name from every layout of files, as data alone, or refused with the name of their file."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, lfs_pointer
from safetensors.torch import load_file, save_file

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints import tensors
from pyterrier_llmrerank.checkpoints.tensors import TensorFiles

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4)}


def sharded(folder: Path, suffix: str) -> None:
    names = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        file = f"shard-{number}{suffix}"
        save_file({name: tensor}, folder / file) if suffix == ".safetensors" else torch.save(
            {name: tensor}, folder / file
        )
        names[name] = file
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": names}))


def test_shapes_are_read_once_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path, ".safetensors")
    opened: list[Path] = []
    original = tensors.safe_open

    def noted(path: Path, **options: str) -> Any:
        opened.append(path)
        return original(path, **options)

    monkeypatch.setattr(tensors, "safe_open", noted)
    files = TensorFiles(tmp_path, "model", "model='m'")
    assert {name: files.shape(name) for name in files} == {"a.weight": (2, 3), "b.weight": (4,)}
    assert len(opened) == 2


@pytest.mark.parametrize("layout", ["safetensors", "bin", "old bin", "sharded safetensors", "sharded bin"])
def test_tensors_of_every_layout(tmp_path: Path, layout: str) -> None:
    if layout == "safetensors":
        save_file(TENSORS, tmp_path / "model.safetensors")
    elif layout == "bin":
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    elif layout == "old bin":
        torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        sharded(tmp_path, ".safetensors" if "safe" in layout else ".bin")
    opened = TensorFiles(tmp_path, "model", "model='x'")
    assert set(opened) == set(TENSORS)
    assert "a.weight" in opened
    assert "c.weight" not in opened
    for name, tensor in TENSORS.items():
        assert opened.shape(name) == tuple(tensor.shape)
        assert torch.equal(opened.read(name), tensor)
        opened.release()
        assert torch.equal(opened.read(name), tensor)


def is_mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_bin_is_mapped_until_it_is_released(tmp_path: Path) -> None:
    sharded(tmp_path, ".bin")
    files = TensorFiles(tmp_path, "model", "model='m'")
    assert not is_mapped(tmp_path)
    kept = files.read("a.weight")
    assert is_mapped(tmp_path)
    files.release()
    assert torch.equal(kept, TENSORS["a.weight"])
    del kept
    assert not is_mapped(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_an_open_model_maps_no_bin(tmp_path: Path) -> None:
    shutil.copytree(MODELS / "mistral_base", tmp_path / "model")
    stored = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(stored), tmp_path / "model" / "pytorch_model.bin")
    stored.unlink()
    reranker = MatroyshkaReranker(tmp_path / "model", dtype="float32")
    wanted = MatroyshkaReranker(MODELS / "mistral_base", dtype="float32")
    pair = ("what is panda", "a bear")
    assert reranker.compute_score(pair) == wanted.compute_score(pair)
    assert not is_mapped(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model='x': no weights in .*model.safetensors"):
        TensorFiles(tmp_path, "model", "model='x'")


class Bomb:
    """A pickle of it would create a file when opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("old", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, old: bool) -> None:
    bomb, file = tmp_path / "went-off", tmp_path / "adapter_model.bin"
    if old:
        file.write_bytes(pickle.dumps(Bomb(bomb)))
    else:
        torch.save({"a": Bomb(bomb)}, file)
    with pytest.raises(
        ValueError, match=r"adapter_model\.bin: refused, it is not a plain file of tensors: \w+"
    ) as info:
        TensorFiles(tmp_path, "adapter_model", "adapters")
    assert not bomb.exists()
    assert "weights_only" not in str(info.value)  # torch's advice is to open it all the same
    assert "trust" not in str(info.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": "text"}])
def test_a_bin_without_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused"):
        TensorFiles(tmp_path, "model", "model")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"])
def test_a_broken_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable"):
        TensorFiles(tmp_path, "model", "model")


def lying(header: object, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    said = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(said) if length is None else length) + said + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        lying({"a": ONE}, b"1234", length=10),
        lying({"a": ONE}, b"1234", length=2**62),
        lying({"a": ONE}, b"12"),
        lying({"a": ONE}, b"12345678"),
        lying({"a": ONE | {"data_offsets": [4, 0]}}, b"1234"),
        lying({"a": ONE | {"data_offsets": [0, 2**62]}}, b"1234"),
        lying({"a": ONE | {"dtype": "F64"}}, b"1234"),
        lying({"a": ONE | {"dtype": "F99"}}, b"1234"),
        lying({"a": ONE | {"shape": [2]}}, b"1234"),
        lying({"a": ONE | {"shape": [-1]}}, b"1234"),
        lying({"a": ONE | {"shape": [2**62, 2**62]}}, b"1234"),
        lying({"a": ONE, "b": ONE}, b"1234"),
        lying(b"[" * 100_000, b""),
        lying(b'{"a": \xff}', b""),
    ],
)
def test_a_safetensors_header_that_lies_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable") as info:
        TensorFiles(tmp_path, "model", "model")
    assert len(str(info.value)) < 600


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "C64", "F4", "F8_E8M0"])
def test_numbers_that_are_no_weights_are_named(tmp_path: Path, dtype: str) -> None:
    size = {"I64": 8, "C64": 8}.get(dtype, 1)
    shape = [2] if dtype == "F4" else [1]
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    (tmp_path / "model.safetensors").write_bytes(lying(header, bytes(size)))
    opened = TensorFiles(tmp_path, "model", "model='x'")
    with pytest.raises(ValueError, match=r"model='x': tensor 'a' is torch\..*; allowed: torch.float32"):
        opened.read("a")


def test_a_truncated_safetensors_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for end in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a readable"):
            TensorFiles(tmp_path, "model", "model")


def records(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """Change the records of a file that torch saved, and fix their checksums."""
    into = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as saved, zipfile.ZipFile(into, "w") as other:
        for name in saved.namelist():
            other.writestr(name, change(name, saved.read(name)))
    return into.getvalue()


def test_a_bin_with_a_record_that_lies_is_refused(tmp_path: Path) -> None:
    saved = io.BytesIO()
    torch.save(TENSORS, saved)

    def larger(name: str, record: bytes) -> bytes:
        return record.replace(b"K\x02K\x03", b"K\x7fK\x7f") if name.endswith("data.pkl") else record

    def shorter(name: str, record: bytes) -> bytes:
        return record[:3] if "/data/" in name else record

    for change in (larger, shorter):
        (tmp_path / "pytorch_model.bin").write_bytes(records(saved.getvalue(), change))
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: refused"):
            TensorFiles(tmp_path, "model", "model")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(2**20, 2**20),  # a shape with a single number behind it
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_bin_of_other_than_plain_tensors_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: refused"):
        TensorFiles(tmp_path, "model", "model")


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, ".safetensors")
    save_file(TENSORS, tmp_path / "shard-1.safetensors")
    with pytest.raises(ValueError, match=r"model='x': tensor 'a.weight' is in .*shard-1\.safetensors and in another"):
        TensorFiles(tmp_path, "model", "model='x'")


def test_links_are_followed_to_data_and_loops_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    save_file(TENSORS, tmp_path / "elsewhere" / "weights")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "weights")  # as the hub's cache does
    assert set(TensorFiles(tmp_path / "model", "model", "model")) == set(TENSORS)
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "model" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights in"):
        TensorFiles(tmp_path / "model", "model", "model")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match=r"model='.*loop': no such model folder"):
        RankLLaMAReranker(tmp_path / "loop")
    (tmp_path / "model" / "config.json").symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        MatroyshkaReranker(tmp_path / "model")


@pytest.mark.parametrize("weight_map", [None, [], {"a": "../outside.safetensors"}, {"a": 3}, {"a": "x" * 10**6}])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="weight_map"):
        TensorFiles(tmp_path, "model", "model")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, ".bin")
    (tmp_path / "shard-1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names shard-1\.bin, which is missing"):
        TensorFiles(tmp_path, "model", "model")


@pytest.mark.parametrize("whole", ["sharded", "single"])
def test_an_index_without_its_files_is_passed_over_where_another_form_is_whole(tmp_path: Path, whole: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "gone.safetensors"}}')
    if whole == "sharded":
        sharded(tmp_path, ".bin")
    else:
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    opened = TensorFiles(tmp_path, "model", "model")
    assert set(opened) == set(TENSORS)
    assert not opened.safetensors
    for file in tmp_path.glob("*.bin"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors\.index\.json names gone\.safetensors, which is missing"):
        TensorFiles(tmp_path, "model", "model")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_git_lfs_pointer_of_a_bin_is_named(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(lfs_pointer(b""))
    with pytest.raises(ValueError, match=rf"{file}: a Git LFS pointer"):
        TensorFiles(tmp_path, "model" if file.startswith("py") else "adapter_model", "model")
