"""Files are found, read as data alone, and refused with their name when they are not what they say."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import MODELS
from safetensors.torch import load_file, save_file

from pyterrier_llmrerank import files
from pyterrier_llmrerank.files import TensorFiles, dequantised, folder_of, read_json

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
    with pytest.raises(ValueError, match=r"adapter_model\.bin: refused"):
        TensorFiles(tmp_path, "adapter_model", "adapters")
    assert not bomb.exists()


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


@pytest.mark.parametrize("weight_map", [None, [], {"a": "../outside.safetensors"}, {"a": 3}])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="weight_map"):
        TensorFiles(tmp_path, "model", "model")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_folders() -> None:
    assert folder_of(str(MODELS / "costwise_full"), "model") == MODELS / "costwise_full"
    assert folder_of("adapter_sd", "adapters", below=MODELS) == MODELS / "adapter_sd"


@pytest.mark.parametrize("reference", ["./nowhere", "/no/where", "no where", "~/no/where", __file__])
def test_a_path_that_is_no_folder(reference: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"model='.*': no such model folder\. Allowed: a folder, a \.gguf"):
        folder_of(reference, "model")


def test_a_hub_that_cannot_be_reached_says_what_works_offline() -> None:
    with pytest.raises(ConnectionError, match=r"base_model='someone/no-such-model'.*cannot be reached.*offline.*gguf"):
        folder_of("someone/no-such-model", "base_model")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A hub with one repository, in which an adapter has only a .bin; it records what is asked of it."""
    import huggingface_hub

    asked: dict[str, list[str]] = {"allow": [], "ids": []}

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked["ids"].append(repo_id)
        asked["allow"] += allow_patterns
        (tmp_path / "sub").mkdir(exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_folder_inside_a_hub_repository(hub: dict[str, list[str]], tmp_path: Path) -> None:
    assert folder_of("owner/name/sub", "adapters") == tmp_path / "sub"
    assert hub["ids"] == ["owner/name", "owner/name"]
    assert "sub/*.safetensors" in hub["allow"]
    assert hub["allow"][-1] == "sub/*.bin"  # only after there were no safetensors
    with pytest.raises(FileNotFoundError, match="has no folder 'other'"):
        folder_of("owner/name/other", "adapters")


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        folder_of(str(tmp_path / "m.gguf"), "model")


def test_a_broken_gguf_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    (tmp_path / "m.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(ValueError, match=r"m\.gguf.*cannot be read"):
        folder_of(str(tmp_path / "m.gguf"), "model")
    assert list((tmp_path / "home" / "llmrerank").iterdir()) == []


def test_smollm2_without_its_wheel_is_the_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    assert files.smollm2() == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_gguf_is_dequantised_once(smollm2: str) -> None:
    folder = dequantised(Path(smollm2))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert dequantised(Path(smollm2)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert "quantization_config" not in read_json(folder / "config.json")
