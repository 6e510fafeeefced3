"""A RankLLaMA is opened from its adapter and base, or from one merged model."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MODELS, heads
from safetensors.torch import load_file, save_file

from pyterrier_llmrerank import RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.locate import absolute
from pyterrier_llmrerank.checkpoints.rankllama_checkpoint import RankLLaMACheckpoint
from pyterrier_llmrerank.engine.weights import build_decoder

RAW, FULL, SD = (str(MODELS / name) for name in ("mistral_base", "costwise_full", "adapter_sd"))
BASE, ADAPTER = str(MODELS / "rankllama_base"), str(MODELS / "rankllama_adapter")


def test_rankllama_adapter_names_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MODELS)  # the adapter says "rankllama_base"
    named, given = RankLLaMACheckpoint(ADAPTER, None), RankLLaMACheckpoint(ADAPTER, BASE)
    assert torch.equal(heads(named), heads(given))
    assert list(given.head_layers) == [4]


def test_rankllama_adapter_as_bin_and_merged(tmp_path: Path, changed: Callable[..., str]) -> None:
    safe = RankLLaMACheckpoint(ADAPTER, BASE)
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(load_file(Path(ADAPTER) / "adapter_model.safetensors"), tmp_path / "adapter" / "adapter_model.bin")
    in_bin = RankLLaMACheckpoint(str(tmp_path / "adapter"), BASE)
    name = "layers.0.self_attn.q_proj.weight"
    merged = RankLLaMACheckpoint(
        changed(BASE, **{"score.weight": heads(safe), f"model.{name}": safe.tensor(name)}), None
    )
    for other in (in_bin, merged):
        assert torch.equal(heads(other), heads(safe))
        assert torch.equal(other.tensor(name), safe.tensor(name))


def test_the_adapters_own_tokenizer_is_preferred(tmp_path: Path) -> None:
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(BASE) / name, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "tokenizer_config.json").read_text())
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))
    assert RankLLaMACheckpoint(str(tmp_path / "adapter"), BASE).tokenizer().pad_token == "</s>"
    assert RankLLaMACheckpoint(ADAPTER, BASE).tokenizer().pad_token is None


def test_a_rankllama_adapter_with_more_whole_tensors(tmp_path: Path) -> None:
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.embed_tokens.weight": torch.ones(704, 64)}, file)
    checkpoint = RankLLaMACheckpoint(str(tmp_path / "adapter"), BASE)
    assert torch.equal(checkpoint.tensor("embed_tokens.weight"), torch.ones(704, 64))
    assert build_decoder(checkpoint).embed_tokens.weight.shape == (704, 64)


def test_a_head_of_two_labels(changed: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"'score\.weight' is \[2, 64\]; expected \[1, 64\]"):
        heads(RankLLaMACheckpoint(changed(BASE, **{"score.weight": torch.ones(2, 64)}), None))


def test_base_model_without_an_adapter() -> None:
    with pytest.raises(ValueError, match="base_model='.*' is given, but model='.*' is not an adapter"):
        RankLLaMACheckpoint(BASE, BASE)


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model .*; write one there"):
        RankLLaMACheckpoint(str(tmp_path / "adapter"), None)


def test_a_base_out_of_reach_is_named() -> None:
    with pytest.raises(ConnectionError, match="the base model that model='.*' names='rankllama_base'"):
        RankLLaMACheckpoint(ADAPTER, None)


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Copy a RankLLaMA adapter, and let it name another base."""

    def naming(base: str) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(ADAPTER, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        return folder

    return naming


@pytest.mark.parametrize("base", ["../../../../../etc", "/etc", "/dev/zero", "/etc/passwd", "~/nowhere/at/all", "a\0b"])
def test_an_adapter_that_names_a_path_outside_gets_nothing_of_it(adapter: Callable[..., Path], base: str) -> None:
    """A base may be anywhere, because PEFT writes absolute paths; its files are only read as a model."""
    folder = adapter(base)
    with pytest.raises(FileNotFoundError, match=r"no config\.json|a file\. Allowed|no such model folder") as info:
        RankLLaMAReranker(folder).compute_score(("a", "b"))
    assert repr(absolute(base))[1:-1] in str(info.value)


class Command:
    """The shell command that a pickle of it would run when opened."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return (os.system, (self.command,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_command_in_an_adapter_is_not_run(adapter: Callable[..., Path], tmp_path: Path, zipped: bool) -> None:
    folder = adapter(BASE)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    command = Command(f"echo owned > {tmp_path / 'owned'}")
    torch.save({**tensors, "evil": command}, folder / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: refused, it is not a plain file of tensors"):
        RankLLaMAReranker(folder).compute_score(("a", "b"))
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(command))  # which would have
    assert (tmp_path / "owned").exists()
