"""Rerankers are trained on the results of the stages before them; their adapters are saved and opened."""

import dataclasses
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from conftest import MODELS, RECORDS
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.input_format import InputFormat
from pyterrier_llmrerank.checkpoints.json_files import read_json
from pyterrier_llmrerank.training import CompensateTraining, DistillTraining, RankLLaMATraining
from pyterrier_llmrerank.training.validation import Validation

RANKLLAMA_BASE, MISTRAL = str(MODELS / "rankllama_base"), str(MODELS / "mistral_base")
SHORT: dict[str, Any] = {
    "group_size": 4, "query_max_length": 8, "passage_max_length": 40, "lora_rank": 4, "lora_alpha": 8,
    "learning_rate": 1e-2, "max_steps": 12, "gradient_accumulation_steps": 1, "logging_steps": 5,
    "gradient_checkpointing": False,
}  # fmt: skip


def candidates() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Topics, results with texts, and judgements: the relevant text is last."""
    rows, qrels = [], []
    for number, record in enumerate(RECORDS):
        for place, text in enumerate(record["neg"] + record["pos"]):
            docno = f"d{number}-{place}"
            rows.append((f"q{number}", record["query"], docno, text, -float(place), place))
        qrels.append((f"q{number}", docno, 1))
    results = pd.DataFrame(rows, columns=["qid", "query", "docno", "text", "score", "rank"])
    return (
        results[["qid", "query"]].drop_duplicates(ignore_index=True),
        results,
        pd.DataFrame(qrels, columns=["qid", "docno", "label"]),
    )


def ndcg(system: pt.Transformer, topics: pd.DataFrame, qrels: pd.DataFrame) -> float:
    return float(pt.Experiment([system], topics, qrels, ["ndcg_cut_10"])["ndcg_cut_10"][0])


def untrained(kind: str, folder: Path, **settings: Any) -> LLMReranker:
    given = SHORT | {"output_dir": str(folder)} | settings
    if kind == "rankllama":
        training = RankLLaMATraining(**given)
        return RankLLaMAReranker.untrained(RANKLLAMA_BASE, training=training, dtype="float32")
    distill = DistillTraining(**given, compress_layers=(4,), compress_ratios=(1, 2))
    return MatroyshkaReranker.untrained(MISTRAL, start_layer=5, training=distill, dtype="float32")


@pytest.mark.parametrize("kind", ["rankllama", "matroyshka"])
def test_a_pipeline_learns(kind: str, tmp_path: Path) -> None:
    topics, results, qrels = candidates()
    first = pt.Transformer.from_df(results)
    reranker = untrained(kind, tmp_path / "run")
    (first >> reranker).fit(topics, qrels)
    assert ndcg(first >> reranker, topics, qrels) > ndcg(first, topics, qrels) + 0.2

    reranker.save(tmp_path / "saved")
    if kind == "rankllama":
        again: LLMReranker = RankLLaMAReranker(tmp_path / "saved", dtype="float32")
        assert again.model != reranker.model
    else:
        assert reranker.start_layer == 5
        again = MatroyshkaReranker(MISTRAL, adapters=[tmp_path / "saved"], start_layer=5, dtype="float32")
    wanted = reranker.transform(results)
    pd.testing.assert_frame_equal(again.transform(results), wanted)
    assert not list((tmp_path / "saved").glob("checkpoint*"))
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(reranker)).transform(results), wanted)


def test_fit_keeps_the_adapter_alone_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In PyTerrier's home, unless the recipe names a folder for the run."""
    monkeypatch.setattr(pt.io, "pyterrier_home", lambda: str(tmp_path))
    _, results, qrels = candidates()
    reranker = untrained("matroyshka", tmp_path, max_steps=2, save_steps=1, output_dir=None)
    reranker.set_parameter("training", dataclasses.replace(reranker.training, train_method="distill_fix_layer_teacher"))
    with caplog.at_level(logging.INFO, "pyterrier_llmrerank"):
        reranker.fit(results, qrels)
    (folder,) = (tmp_path / "llmrerank" / "trained").iterdir()
    assert reranker.adapters == (str(folder),)
    kept = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "reranker.json"} <= kept
    assert not any(name.startswith(("checkpoint-", "trainer_state", "training_args")) for name in kept)
    ours = [record for record in caplog.records if record.name.startswith("pyterrier_llmrerank.training.fit")]
    assert {record.levelname for record in ours} == {"INFO"}
    assert [record.getMessage() for record in ours] == [
        "The results have no column 'teacher': train_method='distill_fix_layer' learns from their labels.",
        f"Training on 8 queries with 40 passages; result in {folder}",
    ]
    before = reranker.transform(results)
    pickle.loads(pickle.dumps(reranker)).save(tmp_path / "saved")
    shutil.rmtree(folder)
    saved = MatroyshkaReranker(tmp_path / "saved", dtype="float32")
    pd.testing.assert_frame_equal(saved.transform(results), before)

    kept = untrained("matroyshka", tmp_path / "run", max_steps=2, save_steps=1)
    kept.fit(results, qrels)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("step", [0, 1])
def test_an_interrupted_fit_keeps_checkpoints_alone_and_names_their_folder(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pt.io, "pyterrier_home", lambda: str(tmp_path))
    _, results, qrels = candidates()
    reranker = untrained("matroyshka", tmp_path, max_steps=2, save_steps=1, output_dir=None, train_method="normal")
    real = Trainer.training_step

    def interrupted(self: Trainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt) as info:
        reranker.fit(results, qrels)
    folders = list((tmp_path / "llmrerank" / "trained").iterdir())
    notes = getattr(info.value, "__notes__", [])
    assert len(folders) == len(notes) == step
    assert all(str(folder) in note for folder, note in zip(folders, notes, strict=True))


@pytest.mark.parametrize(
    "intervals", [{"save_steps": 4}, {"save_steps": 3}, {"save_steps": 3, "arguments": {"save_total_limit": 1}},
                  {"save_steps": 3, "arguments": {"load_best_model_at_end": True}},
                  {"arguments": {"save_strategy": "epoch"}}],
)  # fmt: skip
def test_fit_keeps_the_best_weights_at_any_intervals(
    intervals: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.9, 0.5])
    monkeypatch.setattr(Validation, "__call__", lambda *_: next(values))
    _, results, qrels = candidates()
    reranker = untrained("rankllama", tmp_path / "run", max_steps=4, eval_steps=2, **intervals)
    reranker.fit(results, qrels, results, qrels)
    kept, best = (load_file(tmp_path / "run" / folder / "adapter_model.safetensors") for folder in ("", "checkpoint-2"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in best.items())


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("matroyshka", {"train_method": "distill_final_layer_teacher"}, "train_method='distill_final_layer_teacher'"),
        ("matroyshka", {"teacher_temperature": 2.0}, "teacher_temperature=2.0"),
        ("matroyshka", {"train_method": "distill_last_layer", "teacher_temperature": 2.0}, "teacher_temperature=2.0"),
        ("matroyshka", {"absolute_margin": 1.5}, "absolute_margin=1.5"),  # with the default method, which is replaced
        (
            "matroyshka",
            {"train_method": "distill_last_layer_teacher", "absolute_margin": 1.5},
            "train_method='distill_last_layer_teacher', absolute_margin=1.5",
        ),
        ("rankllama", {"absolute_margin": 1.5}, "absolute_margin=1.5"),
        ("rankllama", {"teacher_weight": 2.0}, "teacher_weight=2.0"),
        ("rankllama", {"teacher_weight": 2.0, "absolute_margin": 1.5}, "teacher_weight=2.0, absolute_margin=1.5"),
    ],
)
def test_a_setting_that_needs_a_teacher_is_refused_without_one(
    kind: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    _, results, qrels = candidates()
    method = {"train_method": "distill_fix_layer_teacher"} if kind == "matroyshka" else {}
    reranker = untrained(kind, tmp_path / "run", max_steps=1, **method | settings)
    with pytest.raises(ValueError, match=f"^{named}: the results have no column 'teacher', which it needs"):
        reranker.fit(results, qrels)
    assert not (tmp_path / "run").exists()


def test_rankllama_learns_from_a_teacher(tmp_path: Path) -> None:
    """The model follows a teacher that ranks the relevant text last if its weight is high."""
    topics, results, qrels = candidates()
    reranker = untrained("rankllama", tmp_path / "run", teacher_weight=50.0, teacher_temperature=0.5)
    relevant = results["docno"].isin(qrels["docno"])
    reranker.fit(results.assign(teacher=np.where(relevant, -2.0, 2.0)), qrels)
    ranked = ndcg(pt.Transformer.from_df(results) >> reranker, topics, qrels)
    assert ranked <= ndcg(pt.Transformer.from_df(results), topics, qrels) + 1e-9  # which has them last


@pytest.mark.parametrize("kind", ["rankllama", "matroyshka"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_scores_the_same(kind: str, dtype: str, tmp_path: Path) -> None:
    _, results, qrels = candidates()
    reranker = untrained(kind, tmp_path / "run", max_steps=2)
    reranker.fit(results, qrels)
    reranker.set_parameter("dtype", dtype)
    reranker.save(tmp_path / "merged", merged=True)
    again = type(reranker)(tmp_path / "merged", dtype=dtype)
    np.testing.assert_allclose(again.transform(results)["score"], reranker.transform(results)["score"], atol=1e-6)
    if kind == "matroyshka":
        assert again.at(cutoff=5).scorer().checkpoint.start_layer == 5
    elif dtype == "float32":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert model.score.weight.shape == (1, 64)


def test_validation_keeps_the_best_and_stops_early(tmp_path: Path) -> None:
    topics, results, qrels = candidates()
    reranker = untrained("matroyshka", tmp_path, learning_rate=1e-9, save_steps=1, patience=2, max_steps=15)
    reranker.fit(results, qrels, results, qrels)
    # Nothing gets better at that rate: one measurement, and two more without an improvement.
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))[-1] == "checkpoint-3"
    assert 0 < ndcg(pt.Transformer.from_df(results) >> reranker, topics, qrels) < 1


def test_compensation_is_one_more_adapter(tmp_path: Path) -> None:
    _, results, qrels = candidates()
    reranker = untrained("matroyshka", tmp_path / "distilled", max_steps=2)
    reranker.fit(results, qrels)
    compensation = CompensateTraining(
        **SHORT | {"max_steps": 2}, finetune_type="token", compress_ratios=(2,), compress_layers=(4,),
        output_dir=str(tmp_path / "token"),
    )  # fmt: skip
    reranker.set_parameter("training", compensation)
    reranker.fit(results, qrels)
    assert [Path(folder).name for folder in reranker.adapters] == ["distilled", "token"]
    saved = reranker.save(tmp_path / "both")
    assert saved == [tmp_path / "both" / "1", tmp_path / "both" / "2"]
    again = MatroyshkaReranker(MISTRAL, adapters=saved, start_layer=5, dtype="float32")
    pd.testing.assert_frame_equal(again.transform(results), reranker.transform(results))


def test_arguments_are_checked_before_training(tmp_path: Path) -> None:
    _, results, qrels = candidates()
    reranker = untrained("matroyshka", tmp_path)
    with pytest.raises(ValueError, match="topics_or_res_va is given without qrels_va"):
        reranker.fit(results, qrels, results)
    with pytest.raises(ValueError, match="topics_or_res_tr has columns .* missing: text"):
        reranker.fit(results.drop(columns="text"), qrels)
    with pytest.raises(ValueError, match="'text' is None.*docno 'd0-0'"):
        reranker.fit(results.assign(text=[None, *results["text"][1:]]), qrels)
    with pytest.raises(ValueError, match="nothing to train on"):
        reranker.fit(results, qrels.assign(label=0))
    with pytest.raises(ValueError, match="patience=2 needs validation"):
        untrained("matroyshka", tmp_path, patience=2).fit(results, qrels)
    with pytest.raises(ValueError, match="eval_steps=2 needs validation results to measure"):
        untrained("matroyshka", tmp_path, eval_steps=2).fit(results, qrels)
    for settings, message in (
        ({"eval_steps": 0}, "eval_steps=0; allowed: a number above 0"),
        ({"arguments": {"metric_for_best_model": "loss"}}, "metric_for_best_model='loss': nDCG@10 alone"),
        ({"arguments": {"eval_strategy": "no"}}, "eval_strategy='no' measures nothing on validation results; allowed"),
        (
            {"patience": 2, "arguments": {"save_strategy": "no"}},
            "patience=2 needs saved weights, but save_strategy='no'",
        ),
        (
            {"arguments": {"save_strategy": "no", "load_best_model_at_end": True}},
            "load_best_model_at_end=True needs saved",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            untrained("matroyshka", tmp_path, **settings).fit(results, qrels, results, qrels)
    with pytest.raises(ValueError, match=r"training=.*allowed: RankLLaMATraining"):
        RankLLaMAReranker(RANKLLAMA_BASE, training=DistillTraining())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"training=.*allowed: DistillTraining"):
        MatroyshkaReranker(MISTRAL, training=RankLLaMATraining())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_untrained_reranker_refuses_to_score_and_to_save() -> None:
    with pytest.raises(ValueError, match=r"no score head .* or fit\(\) first"):
        RankLLaMAReranker.untrained(RANKLLAMA_BASE).compute_score(("a", "b"))
    with pytest.raises(ValueError, match="an adapter, which is trained already"):
        RankLLaMAReranker.untrained(str(MODELS / "rankllama_adapter"))
    with pytest.raises(ValueError, match=r"adapters=\(\): there is no adapter to write"):
        MatroyshkaReranker(MISTRAL).save("anywhere")
    with pytest.raises(ValueError, match="no score head"):
        RankLLaMAReranker.untrained(RANKLLAMA_BASE).save("anywhere")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    reranker = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=RANKLLAMA_BASE)
    with pytest.raises(FileExistsError, match="allowed: a new or an empty folder"):
        reranker.save(tmp_path)
    assert (tmp_path / "note").read_text() == "mine"


@pytest.mark.parametrize("kind", ["rankllama", "matroyshka"])
def test_losses_are_logged_not_printed(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    _, results, qrels = candidates()
    with caplog.at_level(logging.INFO, "pyterrier_llmrerank"):
        untrained(kind, tmp_path / "run", max_steps=2, logging_steps=1).fit(results, qrels)
    assert capsys.readouterr().out == ""
    ours = [record for record in caplog.records if record.levelno == logging.INFO and "'loss': " in record.getMessage()]
    assert [record.getMessage()[:12] for record in ours] == ["step 1 of 2:", "step 2 of 2:"]
    assert {record.name.partition(".")[0] for record in ours} == {"pyterrier_llmrerank"}


@pytest.mark.parametrize("kind", ["rankllama", "matroyshka"])
def test_a_second_fit_continues_from_the_first(kind: str, tmp_path: Path) -> None:
    _, results, qrels = candidates()
    reranker = untrained(kind, tmp_path / "first", max_steps=3)
    reranker.fit(results, qrels)
    with pytest.raises(FileExistsError, match="output_dir="):
        reranker.fit(results, qrels)
    before = reranker.transform(results)
    still = dataclasses.replace(reranker.training, output_dir=str(tmp_path / "second"), learning_rate=0.0)
    reranker.set_parameter("training", still)
    reranker.fit(results, qrels)
    np.testing.assert_allclose(reranker.transform(results)["score"], before["score"], atol=1e-5)
    if kind == "rankllama":
        assert (Path(reranker.model).name, reranker.base_model) == ("second", RANKLLAMA_BASE)
    else:
        assert [Path(folder).name for folder in reranker.adapters] == ["first", "second"]


@pytest.mark.usefixtures("devices")
def test_several_devices_are_not_trained_on(tmp_path: Path) -> None:
    _, results, qrels = candidates()
    for kind in ("rankllama", "matroyshka"):
        reranker = untrained(kind, tmp_path / kind)
        reranker.set_parameter("device", ["cuda:0", "cuda:1"])
        with pytest.raises(ValueError, match=r"device=\('cuda:0', 'cuda:1'\): fit trains on one device; .* torchrun"):
            reranker.fit(results, qrels)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_names_the_base_it_was_trained_on(tmp_path: Path) -> None:
    other = tmp_path / "other_base"
    shutil.copytree(RANKLLAMA_BASE, other)
    reranker = RankLLaMAReranker(MODELS / "rankllama_adapter", base_model=other, dtype="float32")
    reranker.save(tmp_path / "saved")
    assert RankLLaMAReranker(tmp_path / "saved", dtype="float32").scorer().checkpoint.folder == other


def test_a_recipe_and_its_reranker_agree() -> None:
    recipe = DistillTraining(start_layer=2)
    assert MatroyshkaReranker.untrained(MISTRAL, training=recipe).start_layer == 2
    for arguments, training in (
        ({"start_layer": 5}, recipe),
        ({}, DistillTraining(prompt="Relevant?")),
        ({"layer_sep": 2}, DistillTraining(layer_sep=3)),
    ):
        with pytest.raises(ValueError, match="the two must agree"):
            MatroyshkaReranker(MISTRAL, training=training, **arguments)


def test_a_rankllama_learns_and_keeps_another_input_format(tmp_path: Path) -> None:
    _, results, qrels = candidates()
    given = {"input_format": "tevatron-2024", "query_prefix": "", "append_eos": True}
    training = RankLLaMATraining(**SHORT | {"output_dir": str(tmp_path / "run"), "max_steps": 1} | given)
    reranker = RankLLaMAReranker.untrained(RANKLLAMA_BASE, training=training, dtype="float32")
    assert reranker.input_format == "tevatron-2024"
    reranker.fit(results, qrels)
    assert read_json(tmp_path / "run" / "reranker.json")["append_eos"] is True
    opened = RankLLaMAReranker(reranker.model, dtype="float32")
    assert opened.named_format == InputFormat("tevatron-2024", "", "document: ", True)
    again = {**SHORT, "max_steps": 1, "output_dir": str(tmp_path / "again")}
    opened.set_parameter("training", RankLLaMATraining(**again))
    opened.fit(results, qrels)  # goes on in the adapter's own format
    assert RankLLaMAReranker(tmp_path / "again").named_format == InputFormat("tevatron-2024", "", "document: ", True)
    opened.set_parameter("training", RankLLaMATraining(**again, input_format="tevatron-2023"))
    with pytest.raises(
        ValueError, match="input_format='tevatron-2024', but training has 'tevatron-2023'; the two must"
    ):
        opened.fit(results, qrels)
