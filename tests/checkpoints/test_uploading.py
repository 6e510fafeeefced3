"""A pushed reranker opens by its id, with a model card."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS, Cache
from huggingface_hub import HfApi, ModelCard, RepoUrl

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker

PAIR = ("a query", "a passage")
RANKLLAMA = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32")


@pytest.fixture
def hub(cached: Cache, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub that keeps what is uploaded, and has two bases."""
    kept: dict[str, Any] = {}

    def create_repo(api: HfApi, repo_id: str, **options: Any) -> RepoUrl:
        kept.update(repo_id=repo_id, **options)
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def upload_folder(api: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        files = {str(f.relative_to(folder_path)) for f in folder_path.rglob("*") if f.is_file()}
        stay = kept.get("files", set()) if options.get("delete_patterns") != "*" else set()
        kept["files"] = stay | files
        kept["card"] = ModelCard.load(folder_path / "README.md", ignore_metadata_errors=False)
        cached.add(repo_id, folder_path, "c" * 40, "main")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    for name in ("rankllama_base", "mistral_base"):
        cached.add(f"someone/{name}", MODELS / name, "a" * 40, "main")
    return kept


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", [RankLLaMAReranker, MatroyshkaReranker])
def test_a_pushed_model_opens_by_its_id(kind: Any, merged: bool, hub: dict[str, Any], tmp_path: Path) -> None:
    if kind is RankLLaMAReranker:
        base = "someone/rankllama_base"
        reranker = kind(MODELS / "rankllama_adapter", base_model=base, dtype="float32", input_format="tevatron-2024")
    else:
        base = "someone/mistral_base"
        reranker = kind(base, adapters=[str(MODELS / "adapter_sd")], start_layer=2, prompt="Is it?", dtype="float32")
    reranker.push_to_hub("owner/earlier", merged=not merged)  # to the same stand-in: no file of it stays
    pushed = {"private": True, "merged": merged, "datasets": ["owner/data"], "license": "apache-2.0"}
    assert reranker.push_to_hub("owner/model", **pushed) == "https://huggingface.co/owner/model"
    assert (hub["repo_id"], hub["private"], hub["exist_ok"]) == ("owner/model", True, True)
    reranker.save(tmp_path / "saved", merged=merged)
    saved = {str(f.relative_to(tmp_path / "saved")) for f in (tmp_path / "saved").rglob("*") if f.is_file()}
    assert hub["files"] == saved | {"README.md"}
    data = hub["card"].data
    named = None if merged and kind is MatroyshkaReranker else base
    assert (data.base_model, data.datasets, data.license) == (named, ["owner/data"], "apache-2.0")
    paper = "article{rankllama" if kind is RankLLaMAReranker else "inproceedings{matroyshka"
    data_page = "https://huggingface.co/datasets/owner/data"
    for said in (f'{kind.__name__}("owner/model")', data_page, "## Licence\n\napache-2.0", paper):
        assert said in hub["card"].text
    opened = kind("owner/model", dtype="float32")
    np.testing.assert_allclose(opened.compute_score([PAIR]), reranker.compute_score([PAIR]), atol=1e-4)


def test_a_repository_of_ones_own_is_named_with_its_owner(hub: dict[str, Any]) -> None:
    assert RANKLLAMA.push_to_hub("model", merged=True) == "https://huggingface.co/me/model"
    assert 'RankLLaMAReranker("me/model")' in hub["card"].text
    opened = RankLLaMAReranker("me/model", dtype="float32")
    np.testing.assert_allclose(opened.compute_score(PAIR), RANKLLAMA.compute_score(PAIR), atol=1e-4)


def test_an_adapter_of_a_local_base_is_not_pushed(hub: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="repo_id='owner/model': the base '.*' exists only on this machine; allowed"):
        RANKLLAMA.push_to_hub("owner/model")
    assert hub == {}
