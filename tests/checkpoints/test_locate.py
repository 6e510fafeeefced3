"""Models are found in folders, in the hub's cache and at revisions, and refused by name if they are nowhere."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from conftest import MODELS, Cache, frame

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.json_files import read_json
from pyterrier_llmrerank.checkpoints.locate import adapter_folder, folder_of, without_revision
from pyterrier_llmrerank.training import DistillTraining, RankLLaMATraining


def test_folders() -> None:
    assert folder_of(str(MODELS / "costwise_full"), "model") == MODELS / "costwise_full"
    assert adapter_folder("adapter_sd", str(MODELS)) == MODELS / "adapter_sd"
    assert adapter_folder(str(MODELS / "adapter_sd"), "someone/model") == MODELS / "adapter_sd"


@pytest.mark.parametrize("reference", ["./nowhere", "/no/where", "no where", "~/no/where", "./no.gguf"])
def test_a_path_that_is_no_folder(reference: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"model='.*': no such model folder\. Allowed: a folder, a \.gguf"):
        folder_of(reference, "model")


def test_a_file_is_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"model='.*test_locate\.py': a file\. Allowed: a folder, a \.gguf"):
        folder_of(__file__, "model")


def test_an_error_without_the_hub_names_the_ways_that_work_offline() -> None:
    with pytest.raises(ConnectionError, match=r"base_model='someone/no-such-model'.*be reached.*Offline, use.*gguf"):
        folder_of("someone/no-such-model", "base_model")


NOW, BEFORE = "a" * 40, "b" * 40


PAIR = ("a query", "a passage")


def test_files_that_other_programs_left_in_the_cache_are_enough(cached: Cache) -> None:
    """Other programs fetch only the files that they need."""
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
    with pytest.raises(FileNotFoundError, match=r"model='owner/part': .* names part-1\.safetensors, which is missing"):
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
    assert reranker.scorer().checkpoint.folder == before
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
    assert without_revision("model@v1") == ("model@v1", None)


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
        assert reranker.scorer().checkpoint.folder == base
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A hub with two repositories: a model with an adapter in a folder of its own, and an adapter; .bin only."""
    try:
        import httpx2
    except ImportError:  # the hub's client before 2.0
        import httpx as httpx2
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


def test_a_refusal_by_the_hub_is_explained(hub: dict) -> None:
    with pytest.raises(PermissionError, match="base_model='meta/gated': accept its terms.*hf auth login"):
        folder_of("meta/gated", "base_model")
    with pytest.raises(FileNotFoundError, match="model='no/body': .* no such model .*private"):
        folder_of("no/body", "model")
    with pytest.raises(FileNotFoundError, match="model='owner/model@v9': 'owner/model' has no revision 'v9' on the"):
        folder_of("owner/model@v9", "model")


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
