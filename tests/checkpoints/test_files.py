"""Files are found, read as data alone, and refused with their name when they are not what they say."""

import errno
import io
import json
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, frame, no_file_above
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints import files
from pyterrier_llmrerank.checkpoints.files import (
    TensorFiles,
    adapter_folder,
    dequantised,
    folder_of,
    read_json,
    shipped,
)
from pyterrier_llmrerank.training import DistillTraining, RankLLaMATraining

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
    """A safetensors file whose header says so."""
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
    with pytest.raises(ValueError, match=r"model='x': tensor 'a' is torch\..*; wanted one of torch.float32"):
        opened.read("a")


def test_a_truncated_safetensors_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for end in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a readable"):
            TensorFiles(tmp_path, "model", "model")


def records(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """What torch saved, with its records changed, and checksums that agree."""
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


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"\0", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_json_of_any_length_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}" + " " * 100)
    assert read_json(tmp_path / "config.json") == {}
    monkeypatch.setattr(files, "LARGEST_JSON", 100)
    with pytest.raises(ValueError, match=r"config\.json: 102 bytes; .* at most 100"):
        read_json(tmp_path / "config.json")


def test_folders() -> None:
    assert folder_of(str(MODELS / "costwise_full"), "model") == MODELS / "costwise_full"
    assert adapter_folder("adapter_sd", str(MODELS)) == MODELS / "adapter_sd"
    assert adapter_folder(str(MODELS / "adapter_sd"), "someone/model") == MODELS / "adapter_sd"


@pytest.mark.parametrize("reference", ["./nowhere", "/no/where", "no where", "~/no/where", "./no.gguf"])
def test_a_path_that_is_no_folder(reference: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"model='.*': no such model folder\. Allowed: a folder, a \.gguf"):
        folder_of(reference, "model")


def test_a_file_is_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"model='.*test_files\.py': a file\. Allowed: a folder, a \.gguf"):
        folder_of(__file__, "model")


def test_a_hub_that_cannot_be_reached_says_what_works_offline() -> None:
    with pytest.raises(ConnectionError, match=r"base_model='someone/no-such-model'.*cannot be reached.*offline.*gguf"):
        folder_of("someone/no-such-model", "base_model")


def lfs_pointer(content: bytes) -> bytes:
    """What Git leaves in place of a file that it has not fetched."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize %d\n" % (7, len(content))


class Cache:
    """A folder laid out as the hub's client lays out its cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, repository: str, model: Path, commit: str, *refs: str, listed: tuple[str, ...] = ()) -> Path:
        """Put a model there at a commit that has these names; the listing of its files may have more."""
        from huggingface_hub import _tree_cache as trees  # which newer clients keep beside the files

        place = self.folder / f"models--{repository.replace('/', '--')}"
        snapshot = place / "snapshots" / commit
        shutil.copytree(model, snapshot)
        for ref in refs:
            (place / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (place / "refs" / ref).write_text(commit)
        names = [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]
        entry = trees.TreeCacheEntry(size=1, blob_id="0" * 40)
        trees.write_tree_cache(str(place), commit, dict.fromkeys([*names, *listed], entry))
        return snapshot


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """An empty cache, and no hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return Cache(tmp_path / "cache")


NOW, BEFORE = "a" * 40, "b" * 40
PAIR = ("a query", "a passage")


def test_what_other_programs_left_in_the_cache_is_enough(cached: Cache) -> None:
    """They fetch what they need, not all files of the kinds that may be needed."""
    listed = ("LICENSE.txt", "added_tokens.json", "model-00001-of-00002.safetensors", "sub/adapter_model.safetensors")
    cached.add("owner/model", MODELS / "costwise_full", NOW, "main", listed=listed)
    cached.add("owner/adapter", MODELS / "adapter_sd", NOW, "main", listed=("vocab.txt",))
    wanted = MatroyshkaReranker(MODELS / "costwise_full", adapters=[MODELS / "adapter_sd"], dtype="float32")
    got = MatroyshkaReranker("owner/model", adapters=["owner/adapter"], dtype="float32")
    assert got.compute_score(PAIR) == wanted.compute_score(PAIR)


def test_a_weight_that_is_not_in_the_cache_is_named(cached: Cache, tmp_path: Path) -> None:
    shutil.copytree(MODELS / "costwise_full", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    cached.add("owner/none", tmp_path / "model", NOW, "main", listed=("model.safetensors",))
    with pytest.raises(
        FileNotFoundError, match=r"model='owner/none': no weights in .*copy of a hub model may be incom"
    ):
        MatroyshkaReranker("owner/none").compute_score(PAIR)
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    cached.add("owner/part", tmp_path / "model", NOW, "main", listed=("part-1.safetensors",))
    with pytest.raises(
        FileNotFoundError, match=r"model='owner/part': .* names part-1\.safetensors, which is not there"
    ):
        MatroyshkaReranker("owner/part").compute_score(PAIR)


def test_a_revision_is_a_branch_a_tag_or_a_commit(cached: Cache, tmp_path: Path) -> None:
    shutil.copytree(MODELS / "costwise_full", tmp_path / "model")
    shutil.copytree(MODELS / "adapter_sd", tmp_path / "model" / "compensate" / "layer")
    now = cached.add("owner/model", tmp_path / "model", NOW, "main")
    before = cached.add("owner/model", tmp_path / "model", BEFORE, "v1.0", "refs/pr/3")
    assert folder_of("owner/model", "model") == now
    for revision in ("v1.0", "refs/pr/3", BEFORE):
        assert folder_of(f"owner/model@{revision}", "model") == before
        assert folder_of(f"owner/model/compensate/layer@{revision}", "model") == before / "compensate" / "layer"
        assert adapter_folder("compensate/layer", f"owner/model@{revision}") == before / "compensate" / "layer"
    assert adapter_folder("owner/model/compensate/layer@main", f"owner/model@{BEFORE}").parent.parent == now
    reranker = MatroyshkaReranker("owner/model@v1.0", adapters="compensate/layer", dtype="float32")
    assert reranker._weights().checkpoint.folder == before
    assert repr(reranker).startswith("MatroyshkaReranker('owner/model@v1.0', adapters=('compensate/layer',)")
    with pytest.raises(ConnectionError, match="model='owner/model@v2': .*not in the local cache"):
        folder_of("owner/model@v2", "model")


@pytest.mark.parametrize("revision", ["", "..", "a/../b", "/v1", "v1/", "a b", "a@b"])
def test_a_revision_that_can_be_none(revision: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        RankLLaMAReranker(f"owner/model@{revision}")


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(MODELS / "costwise_full", tmp_path / "model@v1")
    monkeypatch.chdir(tmp_path)
    assert folder_of("model@v1", "model") == Path("model@v1")
    assert files.without_revision("model@v1") == ("model@v1", None)


def test_the_base_is_opened_at_the_revision_that_the_adapter_names(cached: Cache, tmp_path: Path) -> None:
    cached.add("owner/base", MODELS / "mistral_base", NOW, "main")
    base = cached.add("owner/base", MODELS / "rankllama_base", BEFORE, "v1")
    adapter = tmp_path / "adapter"
    shutil.copytree(MODELS / "rankllama_adapter", adapter)
    config = read_json(adapter / "adapter_config.json")
    named = {"base_model_name_or_path": "owner/base", "revision": "v1"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | named))
    wanted = RankLLaMAReranker(adapter, base_model=MODELS / "rankllama_base", dtype="float32").compute_score(PAIR)
    settings = RankLLaMATraining(group_size=2, max_steps=1, learning_rate=0.0, output_dir=str(tmp_path / "run"))
    rows = frame(1, 3)
    for reranker in (
        RankLLaMAReranker(adapter, dtype="float32", training=settings),
        RankLLaMAReranker(adapter, base_model="owner/base@v1", dtype="float32"),
    ):
        assert reranker._weights().checkpoint.folder == base
        assert reranker.compute_score(PAIR) == wanted
        reranker.save(tmp_path / f"saved-{reranker.base_model is None}")
    reranker = RankLLaMAReranker(adapter, dtype="float32", training=settings)
    reranker.fit(rows, rows.assign(label=[1, 0, 0])[["qid", "docno", "label"]])
    assert reranker.base_model == "owner/base@v1"
    for written in ("saved-True", "saved-False", "run"):  # as PEFT reads it
        config = read_json(tmp_path / written / "adapter_config.json")
        assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "v1")


@pytest.mark.parametrize("base", ["someone/base", "./nowhere"])
def test_a_base_that_is_not_there_can_be_given(tmp_path: Path, base: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(MODELS / "rankllama_adapter", adapter)
    config = read_json(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with pytest.raises((FileNotFoundError, ConnectionError), match=f"{base}.* give a RankLLaMA base_model") as info:
        RankLLaMAReranker(adapter).compute_score(PAIR)
    assert f"the base model that model={str(adapter)!r} names={base!r}" in str(info.value)
    with pytest.raises((FileNotFoundError, ConnectionError), match=f"the base model that model=.* names={base!r}"):
        DistillTraining().open(str(adapter))
    with pytest.raises((FileNotFoundError, ConnectionError)) as info:
        RankLLaMAReranker(adapter, base_model="someone/other").compute_score(PAIR)
    assert "give a RankLLaMA base_model" not in str(info.value)


@pytest.mark.parametrize("adapter", ["rankllama-smollm2-135m", "matroyshka-smollm2-135m/distilled"])
def test_a_shipped_adapters_base_is_the_one_beside_it(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyterrier_llmrerank.checkpoints.adapters import Adapter

    folder = Path(shipped(adapter))
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert Adapter(folder, "model").base == "smollm2-135m"
    monkeypatch.chdir(folder.parent)
    assert Adapter(Path(folder.name), "model").base == "smollm2-135m"


def test_training_goes_on_from_a_shipped_adapters_folder(smollm2: str) -> None:
    rankllama = RankLLaMATraining().open(shipped("rankllama-smollm2-135m"))
    distilled = DistillTraining().open(shipped("matroyshka-smollm2-135m/distilled"))
    for checkpoint in (rankllama, distilled):
        assert checkpoint.folder == dequantised(Path(smollm2))
        assert checkpoint.base == "smollm2-135m"
        assert checkpoint.adapter is not None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A hub with two repositories: a model with an adapter in a folder of its own, and an adapter; .bin only."""
    import httpx2
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    asked: dict[str, list[str]] = {"allow": [], "ids": []}
    response = httpx2.Response(404, request=httpx2.Request("GET", "https://hub"))

    def snapshot_download(
        repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked["ids"].append(repo_id)
        asked["allow"] += allow_patterns
        if repo_id == "meta/gated":
            raise GatedRepoError("gated", response=response)
        if revision is not None:
            raise RevisionNotFoundError("no such revision", response=response)
        if repo_id not in ("owner/model", "owner/adapter"):
            raise RepositoryNotFoundError("no such", response=response)
        folder = tmp_path / repo_id.replace("/", "--")
        (folder / "compensate" / "layer").mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_folder_inside_a_hub_repository(hub: dict[str, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "owner--model" / "compensate" / "layer"
    assert folder_of("owner/model/compensate/layer", "adapters") == folder
    assert hub["ids"] == ["owner/model", "owner/model"]
    assert "compensate/layer/*.safetensors" in hub["allow"]
    assert hub["allow"][-1] == "compensate/layer/*.bin"  # only after there were no safetensors
    with pytest.raises(FileNotFoundError, match="no folder 'other' in 'owner/model'"):
        folder_of("owner/model/other", "adapters")


def test_a_hub_models_adapters_are_looked_up_in_its_repository_first(hub: dict, tmp_path: Path) -> None:
    below = adapter_folder("compensate/layer", "owner/model")
    assert below == tmp_path / "owner--model" / "compensate" / "layer"
    assert adapter_folder("owner/adapter", "owner/model") == tmp_path / "owner--adapter"


def test_what_the_hub_refuses(hub: dict) -> None:
    with pytest.raises(PermissionError, match="base_model='meta/gated': accept its terms.*hf auth login"):
        folder_of("meta/gated", "base_model")
    with pytest.raises(FileNotFoundError, match="model='no/body': .* no such model .*private"):
        folder_of("no/body", "model")
    with pytest.raises(FileNotFoundError, match="model='owner/model@v9': 'owner/model' has no revision 'v9' on the"):
        folder_of("owner/model@v9", "model")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A random Llama with the smallest of vocabularies, as a GGUF file and as transformers has it."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    tokens = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(33, 127)), "\u0120", "\u010a", "Y", "e"]
    tokens = [*dict.fromkeys(tokens), "es", "Yes"]
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges(["e s", "Y es"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, weight in model.named_parameters():
        steps = name.removesuffix(".weight").split(".")
        if steps[0] == "lm_head":
            stored = "output"
        else:
            stored = f"blk.{steps[2]}.{parts[steps[-1]]}" if steps[1] == "layers" else names[steps[1]]
        values = weight.detach()
        if steps[-1] in ("q_proj", "k_proj"):  # GGUF pairs the rotated halves' dimensions one by one
            heads = 4 if steps[-1] == "q_proj" else 2
            values = values.view(heads, 2, 8, 64).transpose(1, 2).reshape(values.shape)
        writer.add_tensor(f"{stored}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_gguf_file_scores_what_its_model_does(
    tiny_gguf: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path))
    path, model = tiny_gguf
    reranker = MatroyshkaReranker(path, dtype="float32")
    pair = ("what", "Yes, this")
    score = reranker.compute_score(pair)
    _, _, tokenizer = reranker._weights().at_depth(1)
    (ids,) = reranker._encode(tokenizer, [pair])
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([ids.flat()])).logits[0, -1]
    assert score == pytest.approx(logits[tokenizer("Yes")["input_ids"][-1]].item(), abs=1e-4)
    (folder,) = (tmp_path / "llmrerank").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert dequantised(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_what_is_trained_on_the_small_model_opens_wherever_its_file_lies(
    tiny_gguf: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        shutil.copy(tiny_gguf[0], tmp_path / place)
    monkeypatch.setattr(files, "smollm2", lambda: str(tmp_path / "here" / "tiny.gguf"))
    settings = {"group_size": 2, "max_steps": 2, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run")}
    reranker = RankLLaMAReranker.untrained("smollm2-135m", training=RankLLaMATraining(**settings), dtype="float32")
    rows = frame(1, 3)
    reranker.fit(rows, rows.assign(label=[1, 0, 0])[["qid", "docno", "label"]])
    assert read_json(tmp_path / "run" / "adapter_config.json")["base_model_name_or_path"] == "smollm2-135m"
    wanted = reranker.transform(rows)["score"].tolist()
    (tmp_path / "here" / "tiny.gguf").unlink()
    monkeypatch.setattr(files, "smollm2", lambda: str(tmp_path / "there" / "tiny.gguf"))
    again = RankLLaMAReranker(tmp_path / "run", dtype="float32")
    assert again.transform(rows)["score"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        folder_of(str(tmp_path / "m.gguf"), "model")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, ".bin")
    (tmp_path / "shard-1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names shard-1\.bin, which is not there"):
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
    with pytest.raises(
        FileNotFoundError, match=r"safetensors\.index\.json names gone\.safetensors, which is not there"
    ):
        TensorFiles(tmp_path, "model", "model")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, file: str) -> None:
    shutil.copytree(MODELS / "costwise_full", tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_bytes(lfs_pointer(path.read_bytes()))
    with pytest.raises(
        ValueError, match=rf"{re.escape(file)}: a Git LFS pointer, not the file itself; run 'git lfs pull'"
    ):
        MatroyshkaReranker(tmp_path / "model").compute_score(PAIR)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_git_lfs_pointer_of_a_bin_is_named(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(lfs_pointer(b""))
    with pytest.raises(ValueError, match=rf"{file}: a Git LFS pointer"):
        TensorFiles(tmp_path, "model" if file.startswith("py") else "adapter_model", "model")


def test_a_git_lfs_pointer_of_a_gguf_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(lfs_pointer(b""))
    with pytest.raises(ValueError, match=r"m\.gguf: a Git LFS pointer"):
        folder_of(str(tmp_path / "m.gguf"), "model")


def test_a_full_disk_is_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        folder_of("someone/model", "model")


def test_the_models_own_folder_is_looked_in_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "comp").mkdir(parents=True)
    (tmp_path / "comp").mkdir()
    monkeypatch.chdir(tmp_path)
    assert adapter_folder("comp", str(tmp_path / "model")) == tmp_path / "model" / "comp"


def test_a_broken_gguf_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    (tmp_path / "m.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(ValueError, match=r"base_model=.*m\.gguf.*cannot be read"):
        folder_of(str(tmp_path / "m.gguf"), "base_model")
    assert list((tmp_path / "home" / "llmrerank").iterdir()) == []


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
    tiny_gguf: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    old: bytes, new: bytes, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    sound = tiny_gguf[0].read_bytes()
    assert old in sound
    (tmp_path / "m.gguf").write_bytes(sound.replace(old, new))
    with pytest.raises(ValueError, match=rf"m\.gguf': cannot be read as a GGUF language model: .*{message}|{message}"):
        folder_of(str(tmp_path / "m.gguf"), "model")
    assert list((tmp_path / "home" / "llmrerank").iterdir()) == []


def test_a_cut_off_gguf_is_named(
    tiny_gguf: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    sound = tiny_gguf[0].read_bytes()
    for length in (3, 30, 300, 1500, len(sound) // 2, len(sound) - 100):
        (tmp_path / "m.gguf").write_bytes(sound[:length])
        with pytest.raises(ValueError, match=r"m\.gguf': cannot be read"):
            folder_of(str(tmp_path / "m.gguf"), "model")


def test_a_full_disk_leaves_no_model_of_a_gguf(
    tiny_gguf: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    with no_file_above(50_000), pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*too large"):
        dequantised(tiny_gguf[0])
    assert list((tmp_path / "home" / "llmrerank").iterdir()) == []
    assert (dequantised(tiny_gguf[0]) / "model.safetensors").is_file()


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


def test_what_is_shipped_fits_the_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def roles(**shape: Any) -> list[str]:
        reranker = MatroyshkaReranker("smollm2-135m", **shape)
        _, adapters, start_layer, _ = reranker._opened()
        assert start_layer == 4
        names = [Path(folder).name for folder in (*adapters, *reranker._token_adapter())]
        assert repr(reranker).endswith(f") over {', '.join(names)}") or "adapters" in shape
        return names

    merged = ["distilled", "distilled-2", "layer"]
    assert roles() == merged
    assert roles(compress_ratio=2) == merged  # no layer at which to compress
    assert roles(cutoff=10, compress_layers=8) == merged
    for ratio, fitting in ((2, 2), (4, 4), (8, 4)):
        assert roles(compress_layers=8, compress_ratio=ratio) == [*merged, f"token-{fitting}"]
        assert roles(compress_layers=8, compress_ratio=ratio, cutoff=6) == [*merged, f"token-{fitting}"]
    assert roles(adapters=[shipped("matroyshka-smollm2-135m/distilled")]) == ["distilled"]
    model, base = RankLLaMAReranker("smollm2-135m")._opened()
    assert (Path(model).name, base) == ("rankllama-smollm2-135m", files.smollm2())
    with pytest.raises(FileNotFoundError, match="adapter='other': none of that name"):
        shipped("other")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").write_text("{}")
    assert not files.is_shipped("smollm2-135m")  # a folder of one's own comes first


@pytest.mark.parametrize("reranker", [RankLLaMAReranker, MatroyshkaReranker])
def test_an_untrained_shipped_model_is_its_base(reranker: Any) -> None:
    untrained = reranker.untrained("smollm2-135m", verbose=True)
    assert untrained.model == files.smollm2()
    assert untrained._opened()[0] == files.smollm2()
    assert MatroyshkaReranker.untrained("smollm2-135m", start_layer=8).adapters == ()


def test_an_adapter_calls_the_small_model_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wheel.gguf").write_bytes(b"")
    monkeypatch.setattr(files, "smollm2", lambda: str(tmp_path / "wheel.gguf"))
    assert files.portable(str(tmp_path / "wheel.gguf")) == "smollm2-135m"
    assert files.portable("some/model") == "some/model"
    monkeypatch.setattr(files, "smollm2", lambda: str(MODELS / "mistral_base"))
    assert folder_of("smollm2-135m", "base_model") == MODELS / "mistral_base"
    assert adapter_folder(str(MODELS / "adapter_sd"), "smollm2-135m") == MODELS / "adapter_sd"
    monkeypatch.setattr(files, "smollm2", lambda: "some/model")
    assert files.portable("some/model") == "some/model"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"cutoff": 99}, "cutoff=99: model='smollm2-135m' has heads at layers 4 to 30"),
        ({"cutoff": [2, 10]}, "cutoff=2: model='smollm2-135m' has heads at layers 4 to 30"),
        ({"compress_layers": [8, 40]}, "layer index 40 is beyond model='smollm2-135m'; allowed: 0 to 29"),
        ({"start_layer": 8}, "start_layer=8, layer_sep=1: model='smollm2-135m' was trained with 4 and 1"),
        ({"start_layer": 31, "adapters": ["a/b"]}, "start_layer=31: model='smollm2-135m' has 30 layers"),
    ],
)
def test_what_the_shipped_model_does_not_allow_is_said_at_once(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatroyshkaReranker("smollm2-135m", **shape)
    assert MatroyshkaReranker("smollm2-135m", cutoff=[4, 30], compress_layers=[29]).deepest() == 30


def test_what_is_shipped_is_small_and_described() -> None:
    models = Path(files.__file__).parent / "models"
    weights = list(models.rglob("*.safetensors"))
    assert len(weights) == 6
    assert sum(file.stat().st_size for file in weights) <= 24e6
    for folder in ("rankllama-smollm2-135m", "matroyshka-smollm2-135m"):
        card = (models / folder / "README.md").read_text(encoding="utf-8")
        assert all(word in card for word in ("Data", "Licence", "Command", "nDCG@10"))


def test_all_but_the_name_of_the_shipped_model() -> None:
    for name in ("smollm2-135M", "SmolLM2-135m", "smollm-135m"):
        with pytest.raises(FileNotFoundError, match=f"model='{name}': no such model; did you mean 'smollm2-135m'"):
            files.require(name, "model")
    for name in ("me/smollm2-135m", "org/SmolLM2-135M", "gpt2", "smollm2-135m"):  # may be on the hub
        files.require(name, "model")
