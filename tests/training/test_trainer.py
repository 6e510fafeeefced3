"""The loop learns, and saves adapters that open with the scores of the trained model."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, RECORDS, checkpointing, ids_of, words
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainingArguments

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.engine.packing import PackedPairs
from pyterrier_llmrerank.training import CompensateTraining, DistillTraining, RankLLaMATraining
from pyterrier_llmrerank.training.batches import Groups
from pyterrier_llmrerank.training.lora import with_lora
from pyterrier_llmrerank.training.output_folder import find_resumed
from pyterrier_llmrerank.training.recipes import Recipe
from pyterrier_llmrerank.training.trainer import GroupTrainer, train
from pyterrier_llmrerank.training.validation import Validation
from pyterrier_llmrerank.training.widths import Widths

BASE = str(MODELS / "mistral_base")
DISTILL = DistillTraining(
    group_size=4, query_max_length=8, passage_max_length=52, lora_rank=4, lora_alpha=8, compress_layers=(4, 6),
    compress_ratios=(1, 2), train_method="normal",
)  # fmt: skip
RANKLLAMA = RankLLaMATraining(
    group_size=4, query_max_length=8, passage_max_length=40, lora_rank=4, lora_alpha=8, lora_dropout=0.0
)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
        checkpointing(): False,
    }  # fmt: skip
    return TrainingArguments(**(settings | options))


def trainer(folder: Path, recipe: Recipe = DISTILL, validation: Validation | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    checkpoint = recipe.open(BASE, [])
    tokenizer = checkpoint.tokenizer()
    model = with_lora(checkpoint, recipe.heads(checkpoint, tokenizer, 0), recipe, torch.float32)
    groups = Groups(RECORDS, 4, 3, recipe.body)
    return GroupTrainer(model, arguments(folder, **options), recipe, checkpoint, groups, validation)


def losses(run: GroupTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["normal", "distill_fix_layer"])
def test_training_lowers_the_loss_and_the_saved_adapter_scores_the_same(tmp_path: Path, method: str) -> None:
    recipe = dataclasses.replace(DISTILL, train_method=method)
    run = trainer(tmp_path, recipe, max_steps=15, learning_rate=1e-2, **{checkpointing(): method == "normal"})
    run.train()
    assert np.mean(losses(run)[-3:]) < 0.7 * np.mean(losses(run)[:3])
    run.save_model(str(tmp_path / "adapter"))
    reranker = MatroyshkaReranker(BASE, adapters=[tmp_path / "adapter"], start_layer=4, cutoff=[4, 8], dtype="float32")
    pair = ("panda", words(5, 9))
    (ids,) = ids_of(reranker, [pair])
    run.model.eval()
    with torch.inference_mode():
        wanted = run.model(PackedPairs([ids]))
    np.testing.assert_allclose(reranker.compute_score(pair), wanted[[0, -1], 0].numpy(), atol=1e-4)


def test_memory_is_in_the_log(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    (logged,) = [entry["peak_memory_gb"] for entry in run.state.log_history if "loss" in entry]
    assert 0.05 < logged < 100


def test_rankllama_is_the_same_loop_and_peft_opens_it(tmp_path: Path) -> None:
    base = str(MODELS / "rankllama_base")
    checkpoint = RANKLLAMA.open(base)
    groups = Groups(RECORDS, 4, 0, RANKLLAMA.body)
    folder = train(RANKLLAMA, checkpoint, groups, arguments(tmp_path, max_steps=30, learning_rate=1e-2))
    ours = RankLLaMAReranker(folder, dtype="float32", query_max_length=8, passage_max_length=40)
    better = [ours.compute_score([(r["query"], r["pos"][0]), (r["query"], r["neg"][0])]) for r in RECORDS]
    assert np.mean([positive > negative for positive, negative in better]) >= 0.75
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    opened = PeftModel.from_pretrained(classifier, folder).eval()
    assert opened.peft_config["default"].base_model_name_or_path == base
    assert opened.peft_config["default"].task_type == "SEQ_CLS"
    pair = ("panda", words(5, 9))
    (ids,) = ids_of(ours, [pair])
    with torch.inference_mode():
        theirs = opened(input_ids=torch.tensor([ids.flat()])).logits.item()
    assert ours.compute_score(pair) == pytest.approx(theirs, abs=1e-4)


def test_saving_asks_no_hub_about_the_base(tmp_path: Path) -> None:
    checkpoint = RANKLLAMA.open(str(MODELS / "rankllama_base"))
    checkpoint.base = "someone/model"
    groups = Groups(RECORDS, 4, 0, RANKLLAMA.body)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(RANKLLAMA, checkpoint, groups, arguments(tmp_path, max_steps=1))


def test_a_rankllama_adapter_is_trained_further(tmp_path: Path) -> None:
    adapter, base = str(MODELS / "rankllama_adapter"), str(MODELS / "rankllama_base")
    checkpoint = RANKLLAMA.open(adapter, base_model=base)
    groups = Groups(RECORDS, 4, 0, RANKLLAMA.body)
    folder = train(RANKLLAMA, checkpoint, groups, arguments(tmp_path, max_steps=1, learning_rate=0.0))
    pairs = [("panda", words(5, 9)), ("tide", words(6, 20))]
    lengths = {"query_max_length": 8, "passage_max_length": 40}  # of the recipe, which the new folder names
    before = RankLLaMAReranker(adapter, base_model=base, dtype="float32", **lengths)
    after = RankLLaMAReranker(folder, base_model=base, dtype="float32")
    np.testing.assert_allclose(after.compute_score(pairs), before.compute_score(pairs), atol=1e-5)


@pytest.mark.parametrize("key", ["init_lora_weights", "base_model_name_or_path"])
def test_an_adapters_configuration_changes_no_base(key: str, tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", str(MODELS / "rankllama_base")
    shutil.copytree(MODELS / "rankllama_adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {key: "gaussian"}))
    checkpoint = RANKLLAMA.open(str(adapter), base_model=base)
    folder = train(
        RANKLLAMA, checkpoint, Groups(RECORDS, 4, 0, RANKLLAMA.body),
        arguments(tmp_path / "run", max_steps=1, learning_rate=0.0),
    )  # fmt: skip
    pair = ("panda", words(5, 9))
    before, after = (
        RankLLaMAReranker(adapter, base_model=base, dtype="float32"),
        RankLLaMAReranker(folder, dtype="float32"),
    )
    assert after.compute_score(pair) == pytest.approx(before.compute_score(pair), abs=1e-5)


def test_a_layer_wise_adapter_above_others_is_trained_further(tmp_path: Path) -> None:
    pairs = [("panda", words(5, 9)), ("tide", words(6, 20))]
    folders: list[str] = []
    for name, on in (("first", []), ("second", ["first"])):
        checkpoint = DISTILL.open(BASE, [str(tmp_path / folder) for folder in on])
        groups = Groups(RECORDS, 4, 0, DISTILL.body)
        train(DISTILL, checkpoint, groups, arguments(tmp_path / name, max_steps=1, learning_rate=1e-2))
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    for name, rate in (("same", 0.0), ("third", 1e-2)):
        again = DISTILL.open(second, [first])
        assert again.base == BASE
        groups = Groups(RECORDS, 4, 0, DISTILL.body)
        folders.append(str(train(DISTILL, again, groups, arguments(tmp_path / name, max_steps=1, learning_rate=rate))))
    before, same, after = (
        MatroyshkaReranker(BASE, adapters=[first, last], start_layer=4, cutoff=[4, 6], dtype="float32")
        for last in (second, *folders)
    )
    np.testing.assert_allclose(same.compute_score(pairs), before.compute_score(pairs), atol=1e-5)
    assert np.abs(after.compute_score(pairs) - before.compute_score(pairs)).max() > 1e-3


def test_missing_target_modules_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target_modules: the model has no 'nonsense'"):
        trainer(tmp_path, dataclasses.replace(DISTILL, target_modules=("q_proj", "nonsense")))


def test_compensation_trains_an_adapter_on_top_of_the_distilled_one(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "distilled"))
    recipe = CompensateTraining(
        finetune_type="token", compress_ratios=(2,), group_size=4, query_max_length=8, passage_max_length=52,
        lora_rank=2, compress_layers=(4,),
    )  # fmt: skip
    checkpoint = recipe.open(BASE, [str(tmp_path / "distilled")])
    groups = Groups(RECORDS, 4, 0, recipe.body)
    folder = train(recipe, checkpoint, groups, arguments(tmp_path / "compensation", max_steps=2))
    both = MatroyshkaReranker(BASE, adapters=[tmp_path / "distilled", folder], start_layer=4, dtype="float32")
    one = MatroyshkaReranker(BASE, adapters=[tmp_path / "distilled"], start_layer=4, dtype="float32")
    pair = ("panda", words(5, 9))
    assert both.compute_score(pair) != pytest.approx(one.compute_score(pair), abs=1e-4)


def run(folder: Path, recipe: Recipe = DISTILL, overwrite: bool = False, base: str = BASE, **options: Any) -> Path:
    """Train for two steps, with a checkpoint after each."""
    checkpoint = recipe.open(base, [])
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **options}
    groups = Groups(RECORDS, 4, 0, recipe.body)
    return train(recipe, checkpoint, groups, arguments(folder, **settings), overwrite=overwrite)


@pytest.mark.parametrize(
    "left",
    [
        "checkpoint-3/note",
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "trainer_state.json",
    ],
)
def test_another_run_is_not_written_over(tmp_path: Path, left: str) -> None:
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("before")
    name = left.partition("/")[0]
    with pytest.raises(
        FileExistsError, match=rf"output_dir='{tmp_path}': another run is there \({name}\); .*overwrite_out"
    ):
        run(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(left).name]
    assert find_resumed(arguments(tmp_path), overwrite=True) is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "some.gguf"])
def test_no_run_is_written_into_a_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError, match=rf"output_dir='{tmp_path}': a model is there \({name}\)"):
        run(tmp_path, overwrite=True)


def test_a_model_that_is_trained_on_is_not_removed(tmp_path: Path) -> None:
    first = run(tmp_path / "first", RANKLLAMA, base=str(MODELS / "rankllama_base"), save_strategy="no")
    before = (first / "adapter_model.safetensors").read_bytes()
    with pytest.raises(
        FileExistsError, match=f"overwrite_output_dir would remove '{first}', from which the run starts"
    ):
        run(first, RANKLLAMA, overwrite=True, base=str(first))
    assert (first / "adapter_model.safetensors").read_bytes() == before
    second = run(tmp_path / "second", RANKLLAMA, overwrite=True, base=str(first))
    assert (second / "adapter_model.safetensors").read_bytes() != before


def test_overwriting_removes_the_earlier_run_alone(tmp_path: Path) -> None:
    run(tmp_path / "again")
    for name in ("tokenizer.model", "notes.txt"):
        (tmp_path / "again" / name).write_text("before")
    run(tmp_path / "again", overwrite=True, seed=4, max_steps=1)
    run(tmp_path / "new", seed=4, max_steps=1)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        ["notes.txt", *(path.name for path in (tmp_path / "new").iterdir())]
    )
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("again", "new")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_that_goes_back_replaces_its_later_checkpoints(tmp_path: Path) -> None:
    back = {"lr_scheduler_type": "constant", "resume_from_checkpoint": str(tmp_path / "checkpoint-1"), "save_steps": 2}
    run(tmp_path, max_steps=4, lr_scheduler_type="constant")
    (tmp_path / "checkpoint-5").mkdir()  # whose writing was interrupted
    run(tmp_path, overwrite=True, max_steps=3, **back)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3, 5)}
    run(tmp_path, max_steps=3, **back | {"resume_from_checkpoint": True})
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3


def test_a_refused_run_removes_no_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3, lr_scheduler_type="constant")
    back = {"lr_scheduler_type": "constant", "resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with pytest.raises(ValueError, match="step 2 is beyond max_steps=1"):
        run(tmp_path, overwrite=True, max_steps=1, **back)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3)}


def test_a_run_continues_with_the_same_settings_only(tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant"}
    run(tmp_path, **constant)
    last = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match=f"resume_from_checkpoint='{last}': the run began with seed=3, not 4; resume"):
        run(tmp_path, resume_from_checkpoint=str(last), seed=4, **constant)
    with pytest.raises(
        ValueError, match="step 2 is beyond max_steps=1; raise max_steps, or .* .of step 1 at most.,.* removed"
    ):
        run(tmp_path, max_steps=1, resume_from_checkpoint=str(last), **constant)
    (tmp_path / "other" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="another run is there"):  # it would continue elsewhere, over another
        run(tmp_path / "other", resume_from_checkpoint=str(last), **constant)
    (tmp_path / "other" / "checkpoint-of-mine").mkdir()
    run(tmp_path / "other", overwrite=True, max_steps=3, resume_from_checkpoint=str(last), **constant)
    assert {path.name for path in (tmp_path / "other").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-of-mine"}
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2
    with pytest.raises(FileExistsError, match="a later checkpoint than '.*/checkpoint-1' is there .checkpoint-2"):
        run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"), **constant)
    assert find_resumed(arguments(tmp_path, resume_from_checkpoint=str(last))) == last
    (last / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=f"resume_from_checkpoint='{last}': the optimiser's state is missing"):
        run(tmp_path, resume_from_checkpoint=str(last), **constant)


def test_a_run_goes_back_once_the_named_checkpoints_are_removed(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3, lr_scheduler_type="constant")
    back = arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(FileExistsError, match="or remove the later checkpoints: checkpoint-2, checkpoint-3 "):
        find_resumed(back)
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(tmp_path / name)
    assert find_resumed(back) == tmp_path / "checkpoint-1"
    with pytest.raises(FileExistsError, match="another run is there .*, or remove it "):
        find_resumed(arguments(tmp_path))


def test_the_last_complete_checkpoint_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = arguments(tmp_path, resume_from_checkpoint="True")
    with pytest.raises(ValueError, match=f"resume_from_checkpoint=True: no checkpoint in output_dir='{tmp_path}'"):
        find_resumed(asked)
    with pytest.raises(ValueError, match="resume_from_checkpoint='.*none': no checkpoint there"):
        find_resumed(arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "none")))
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").touch()
        if name != "checkpoint-11":  # whose writing ends with the state
            step = int(name.removeprefix("checkpoint-").replace("old", "12"))
            (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert find_resumed(asked) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "optimizer.pt").rename(tmp_path / "checkpoint-10" / "global_step10")  # DeepSpeed's
    assert find_resumed(asked) == tmp_path / "checkpoint-10"
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["best", "checkpoint-9"])
def test_a_renamed_copy_of_a_checkpoint_has_its_step(name: str, tmp_path: Path) -> None:
    run(tmp_path, max_steps=3, lr_scheduler_type="constant")
    copy = shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    with pytest.raises(FileExistsError, match=f"a later checkpoint than '{copy}' is there .checkpoint-3"):
        find_resumed(arguments(tmp_path, resume_from_checkpoint=str(copy)))
    assert find_resumed(arguments(tmp_path, resume_from_checkpoint=True)) == tmp_path / "checkpoint-3"


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    validation = Validation.of_records(RECORDS, DISTILL.body)
    measured = iter([0.2, 0.9, 0.5])
    run = trainer(
        tmp_path, validation=validation, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_nDCG@10", greater_is_better=True,
    )  # fmt: skip
    real = run.evaluate()["eval_nDCG@10"]
    assert 0 < real < 1
    run.eval_dataset = lambda score: next(measured)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-4")
    run.save_model(str(tmp_path / "best"))
    kept, at_four = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("best", "checkpoint-4"))
    assert kept.keys() == at_four.keys()
    assert all(torch.equal(tensor, at_four[name]) for name, tensor in kept.items())


def test_validation_scores_are_those_of_inference(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    pairs = [("panda", words(n, 3 + n)) for n in range(8)]
    reranker = MatroyshkaReranker(BASE, start_layer=4, dtype="float32")
    np.testing.assert_allclose(
        run.score_pairs([(*pair, None) for pair in pairs]), reranker.compute_score(pairs), atol=1e-4
    )
    assert run.model.training
    other = MatroyshkaReranker(BASE, start_layer=4, dtype="float32", prompt="Relevant?").compute_score(pairs)
    np.testing.assert_allclose(run.score_pairs([(*pair, "Relevant?") for pair in pairs]), other, atol=1e-4)


def test_a_sharded_model_that_runs_out_of_memory_stops_at_once(tmp_path: Path) -> None:
    """The other processes wait in the middle of the batch, so a smaller one would wait for them forever."""
    run, batches = trainer(tmp_path), []
    forward = run.model.forward

    def short_of_memory(pairs: PackedPairs) -> Any:
        batches.append(len(pairs))
        if len(batches) == 1:
            raise MemoryError
        return forward(pairs)

    run.model.forward = short_of_memory
    pairs = [("panda", words(n, 3 + n), None) for n in range(8)]
    assert len(run.score_pairs(pairs)) == 8
    assert batches == [8, 4, 4]
    batches.clear()
    run.is_fsdp_enabled = True
    with pytest.raises(RuntimeError, match="a batch of 8 pairs does not fit in memory, and the processes of a sharded"):
        run.score_pairs(pairs)
    assert batches == [8]
    assert run.model.training


def test_accumulation_is_averaging(tmp_path: Path) -> None:
    at_once = trainer(tmp_path, max_steps=2, per_device_train_batch_size=4)
    in_parts = trainer(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for run in (at_once, in_parts):
        run.widths = Widths()
        run.train()
    np.testing.assert_allclose(losses(in_parts), losses(at_once), rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, learning_rate=1e30)
    with pytest.raises(
        FloatingPointError,
        match=r"the loss is nan at step \d+ \(learning rate .*compress_ratio \d, queries line \d, line \d\)",
    ):
        run.train()


def test_on_cuda_a_loss_is_checked_after_the_next_or_before_saving(tmp_path: Path) -> None:
    """So the host does not wait for it, and no checkpoint is written after a loss that is not finite."""
    run = trainer(tmp_path)
    run.unchecked_losses += [(lambda: np.array(0.5), "at step 2"), (lambda: np.array(np.nan), "at step 3")]
    run.check_losses(leave=1)
    assert len(run.unchecked_losses) == 1
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3; earlier checkpoints are in"):
        run.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    next(p for p in run.model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"no longer finite at step 0 \(learning rate .* are not saved"):
        run.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_progress_bar_shows_loss_and_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validation = Validation.of_records(RECORDS[:2], DISTILL.body)
    run = trainer(tmp_path, validation=validation, disable_tqdm=False, max_steps=2, eval_strategy="steps", eval_steps=1)
    run.train()
    shown = capsys.readouterr().err
    assert "loss=" in shown
    assert "nDCG@10=" in shown
