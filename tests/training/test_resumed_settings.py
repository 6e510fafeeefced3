"""A run resumes with the settings and data that it began with, and with no others."""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, RECORDS, checkpointing
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from pyterrier_llmrerank.__main__ import main
from pyterrier_llmrerank.training import DistillTraining, RankLLaMATraining, resumed_settings
from pyterrier_llmrerank.training.batches import Groups
from pyterrier_llmrerank.training.commands import parse
from pyterrier_llmrerank.training.data import open_data
from pyterrier_llmrerank.training.recipes import Recipe
from pyterrier_llmrerank.training.resumed_settings import LENGTH, MAY_CHANGE, SameSettings, digest, fixed_settings
from pyterrier_llmrerank.training.validation import Validation

BASE = str(MODELS / "mistral_base")
DISTILL = DistillTraining(group_size=4, lora_rank=4, compress_layers=(4, 6), train_method="normal", start_layer=2)


def settings(
    recipe: Recipe = DISTILL,
    base: str = BASE,
    adapters: tuple[str, ...] = (),
    records: Any = RECORDS,
    validation: Validation | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The settings of a run."""
    arguments = TrainingArguments(**{"output_dir": "run", "use_cpu": True, "max_steps": 6, **options})
    groups = Groups(records, recipe.group_size, 0, recipe.body)
    return fixed_settings(recipe, recipe.open(base, adapters), groups, arguments, validation)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The checkpoint of a run with the settings above."""
    return recorded(tmp_path / "checkpoint-1", settings())


def recorded(folder: Path, begun_with: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "begun_with.json").write_text(json.dumps(begun_with))
    return folder


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"learning_rate": 0.5}, "learning_rate=5e-05, not 0.5"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='linear', not 'cosine'"),
        ({"optim": "adafactor"}, "optim='adamw_torch_fused', not 'adafactor'"),
        ({"weight_decay": 0.1}, "weight_decay=0.0, not 0.1"),
        ({"warmup_steps": 3}, "warmup_steps=0, not 3; resume with the same"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size=8, not 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1, not 2"),
        ({"bf16": True}, "bf16=False, not True; resume with the same"),
        ({"seed": 7}, "seed=42, not 7"),
        ({"data_seed": 7}, "data_seed=None, not 7"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=False, not True"),
        ({"max_steps": 9}, "max_steps=6, not 9; .* allowed where .* lr_scheduler_type='constant'"),
        ({"num_train_epochs": 9}, "num_train_epochs=3.0, not 9"),
        ({"recipe": dataclasses.replace(DISTILL, compress_ratios=(1, 4))}, r"\[1, 2, 4, 8\], not \[1, 4\]"),
        ({"recipe": dataclasses.replace(DISTILL, lora_rank=8)}, "lora_rank=4, not 8"),
        ({"recipe": dataclasses.replace(DISTILL, group_size=8)}, "group_size=4, not 8"),
        ({"recipe": RankLLaMATraining()}, "recipe='DistillTraining', not 'RankLLaMATraining'"),
        ({"adapters": (str(MODELS / "adapter_sd"),)}, "the contents of .*, not of .*adapter_sd"),
        ({"records": RECORDS[1:]}, r"train_data='8 records with SHA-256 \w{16}', not '7 records"),
        ({"records": [{**RECORDS[0], "query": "other"}, *RECORDS[1:]]}, "train_data='8 records .*', not '8 records"),
        ({"validation": Validation.of_records(RECORDS, DISTILL.body)}, "eval_data=None, not '.* records"),
    ],
)
def test_a_changed_setting_is_named(change: dict[str, Any], difference: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=f"resume_from_checkpoint='{checkpoint}': the run began with .*{difference}"):
        SameSettings(settings(**change), checkpoint)


def test_another_number_of_processes_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="the run began with processes=1, not 2; resume with the same"):
        SameSettings(settings(), checkpoint)


@pytest.mark.parametrize("changed", ["pairs", "qrels"])
def test_other_validation_data_are_refused(changed: str, tmp_path: Path) -> None:
    validation = Validation.of_records(RECORDS, DISTILL.body)
    checkpoint = recorded(tmp_path / "checkpoint-1", settings(validation=validation))
    SameSettings(settings(validation=Validation.of_records(RECORDS, DISTILL.body)), checkpoint)
    column, value = {"pairs": ("body", "other"), "qrels": ("label", 2)}[changed]
    frame = getattr(validation, changed).copy()
    frame.loc[0, column] = value
    with pytest.raises(ValueError, match=r"eval_data='\d+ records with .*', not '\d+ records"):
        SameSettings(settings(validation=dataclasses.replace(validation, **{changed: frame})), checkpoint)


def test_settings_that_change_no_weight_may_change(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    harmless: dict[str, Any] = {
        "output_dir": "elsewhere", "logging_steps": 7, "save_steps": 3, "save_total_limit": 1, "report_to": "none",
        checkpointing(): True, "dataloader_num_workers": 2, "disable_tqdm": True, "run_name": "again",
    }  # fmt: skip
    patient = dataclasses.replace(DISTILL, patience=3, min_label=2)
    SameSettings(settings(patient, **harmless), checkpoint)
    assert caplog.messages == []
    assert not MAY_CHANGE & {*LENGTH, "optim", "lr_scheduler_type", "per_device_train_batch_size", "seed", "bf16"}


def of_command(*options: str, eval_data: bool = True) -> dict[str, Any]:
    """The settings of a run from the shell."""
    words = f"--model_name_or_path {BASE} --train_data x --output_dir run --use_cpu --compress_layers 4".split()
    recipe, _, arguments = parse("compensate", [*words, *(["--eval_data", "x"] if eval_data else []), *options])
    groups = Groups(RECORDS, 4, 0, recipe.body)
    validation = Validation.of_records(RECORDS, recipe.body) if eval_data else None
    return fixed_settings(recipe, recipe.open(BASE, ()), groups, arguments, validation)


def run(folder: Path, options: str, values: Iterable[float] = ()) -> dict[str, Any]:
    """Run a command at a constant rate, with stand-ins for its measurements; return the state at its end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = folder.parent / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    words = f"""--model_name_or_path {BASE} --train_data {data} --eval_data {data} --output_dir {folder} --use_cpu
        --lr_scheduler_type constant --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --lora_rank 4
        --train_group_size 4 --query_max_len 8 --passage_max_len 52 --report_to none --disable_tqdm True {options}"""
    left = iter(values)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Validation, "__call__", lambda *_: next(left, 0.5))
        assert main(["train", "compensate", *words.split()]) == 0
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return state


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def logged(state: dict[str, Any], name: str) -> list[int]:
    return [entry["step"] for entry in state["log_history"] if name in entry]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saves after every second step, and measures and logs after every fourth; it stops after two."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(folder, "--save_steps 2 --eval_steps 4 --logging_steps 4 --max_steps 2")
    return folder


@pytest.mark.parametrize(
    ("now", "saves", "measures", "logs"),
    [
        ("--save_steps 3 --eval_steps 2 --logging_steps 1", [2, 3, 6, 8], [2, 4, 6, 8], [3, 4, 5, 6, 7, 8]),
        ("--save_steps 3 --logging_steps 0.25", [2, 3, 6, 8], [2, 3, 6, 8], [4, 6, 8]),
        ("--save_strategy epoch --eval_strategy epoch", [2, 4, 8], [2, 4, 8], []),
        ("--save_strategy no --eval_steps 8", [2], [2, 8], []),
        ("--load_best_model_at_end False --eval_steps 5", [2, 8], [2, 5, 8], []),
    ],
)
def test_a_resumed_run_saves_measures_and_logs_at_the_new_steps(
    now: str, saves: list[int], measures: list[int], logs: list[int], begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun, tmp_path / "run")
    state = run(tmp_path / "run", f"--max_steps 8 --resume_from_checkpoint True {now}")
    assert saved(tmp_path / "run") == saves
    assert logged(state, "eval_nDCG@10") == measures
    assert logged(state, "loss") == logs


@pytest.mark.parametrize(("keeps", "saves"), [("True", [2, 5, 8]), ("False", [2, 8])])
def test_improvements_are_saved_if_the_best_weights_are_kept(
    keeps: str, saves: list[int], begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun, tmp_path / "run")
    options = f"--max_steps 8 --save_steps 8 --eval_steps 5 --load_best_model_at_end {keeps}"
    run(tmp_path / "run", f"{options} --resume_from_checkpoint True", [0.7, 0.6])
    assert saved(tmp_path / "run") == saves


@pytest.mark.parametrize("place", ["in the moved folder", "elsewhere"])
def test_a_run_that_moved_keeps_its_best_weights(place: str, tmp_path: Path) -> None:
    options = "--save_steps 1 --eval_steps 1"
    run(tmp_path / "begun", f"{options} --max_steps 4", [0.5, 0.9, 0.5, 0.5])
    moved = (tmp_path / "begun").rename(tmp_path / "moved")
    folder = moved if place == "in the moved folder" else tmp_path / "elsewhere"
    run(folder, f"{options} --max_steps 5 --resume_from_checkpoint {moved / 'checkpoint-4'}")
    state = run(folder, f"{options} --max_steps 6 --resume_from_checkpoint True")
    assert state["best_model_checkpoint"] == str(moved / "checkpoint-2")
    kept, best = (load_file(each / "adapter_model.safetensors") for each in (folder, moved / "checkpoint-2"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in best.items())
    assert "nDCG@10 0.9000 on `data.jsonl`, after 2 steps." in (folder / "README.md").read_text()


def result(folder: Path) -> dict[str, bytes]:
    """The adapter that a run wrote, its card and its description."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".bin"} | {
        "trainer_state.json": b""
    }


@pytest.mark.parametrize(
    ("options", "values", "end"),
    [
        ("--max_steps 3 --save_steps 1 --eval_steps 1", [0.5, 0.6, 0.5], 3),
        ("--max_steps 3 --save_steps 2 --eval_steps 1 --load_best_model_at_end False", [0.6, 0.5, 0.5], 3),
        ("--max_steps 4 --save_strategy epoch --eval_strategy epoch", [0.5], 4),
        ("--max_steps 8 --save_steps 1 --eval_steps 1 --patience 2", [0.9, 0.5, 0.5], 3),
        ("--max_steps 8 --save_steps 4 --eval_steps 1 --patience 2", [0.5, 0.9, 0.5, 0.5], 4),
        ("--max_steps 8 --save_steps 5 --eval_steps 1 --patience 2", [0.9, 0.5, 0.5], 3),
        ("--max_steps 16 --save_steps 4 --eval_strategy epoch --patience 1", [0.9, 0.5], 8),
    ],
)
def test_a_run_that_has_ended_takes_no_step(options: str, values: list[float], end: int, tmp_path: Path) -> None:
    folder, options = tmp_path / "run", f"{options} --learning_rate 5e-3"
    state = run(folder, options, values)
    before, checkpoints = result(folder), saved(folder)
    for _ in range(2):
        again = run(folder, f"{options} --resume_from_checkpoint True", [0.95])
        assert again["global_step"] == state["global_step"] == end
        assert logged(again, "eval_nDCG@10") == logged(state, "eval_nDCG@10")
        assert (result(folder), saved(folder)) == (before, checkpoints)


def test_a_lost_best_checkpoint_does_not_outdo_later_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, options = tmp_path / "run", "--save_steps 2 --eval_steps 2 --max_steps"
    run(folder, f"{options} 6", [0.9, 0.6, 0.5])
    shutil.rmtree(folder / "checkpoint-2")
    state = run(folder, f"{options} 6 --resume_from_checkpoint True")  # which takes no step
    warning = "checkpoint-2, with the best nDCG@10 so far (0.9000), does not exist; the run continues with "
    assert f"{warning}checkpoint-4 as the best." in caplog.messages
    assert (state["best_global_step"], state["best_metric"]) == (4, 0.6)
    assert "nDCG@10 0.6000 on `data.jsonl`, after 4 steps." in (folder / "README.md").read_text()
    state = run(folder, f"{options} 10 --resume_from_checkpoint True", [0.7, 0.65])
    assert (state["best_model_checkpoint"], state["best_metric"]) == (str(folder / "checkpoint-8"), 0.7)
    kept, best = (load_file(each / "adapter_model.safetensors") for each in (folder, folder / "checkpoint-8"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in best.items())


def test_a_best_measurement_that_was_not_saved_does_not_outdo_later_ones(tmp_path: Path) -> None:
    folder, options = tmp_path / "run", "--save_steps 2 --eval_steps 1"
    run(folder, f"{options} --max_steps 2 --load_best_model_at_end False", [0.9, 0.5])
    state = run(folder, f"{options} --max_steps 6 --resume_from_checkpoint True", [0.6, 0.8, 0.6, 0.5])
    assert (state["best_model_checkpoint"], state["best_metric"]) == (str(folder / "checkpoint-4"), 0.8)
    assert saved(folder) == [2, 3, 4, 6]
    assert "nDCG@10 0.8000 on `data.jsonl`, after 4 steps." in (folder / "README.md").read_text()


def test_processes_continue_with_the_best_checkpoint_of_the_first(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their disks may differ, and they must save at the same steps."""
    first: tuple[Any, ...] = (2, 0.9, "run/checkpoint-2")
    monkeypatch.setattr(resumed_settings, "broadcast_object_list", lambda found: found.__setitem__(0, first))
    history = [{"step": 2, "eval_nDCG@10": 0.9}, {"step": 4, "eval_nDCG@10": 0.5}]
    state = TrainerState(global_step=4, max_steps=6, log_history=history, best_global_step=2)
    arguments = TrainingArguments("run", use_cpu=True)
    SameSettings(settings(), checkpoint).on_train_begin(arguments, state, TrainerControl())
    assert (state.best_global_step, state.best_metric, state.best_model_checkpoint) == first


@pytest.mark.parametrize("end", [8, 10])
def test_a_checkpoint_at_an_epochs_end_records_the_measurement_of_the_epoch(end: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = "--save_steps 2 --eval_strategy epoch --lr_scheduler_type constant"
    run(folder, f"{options} --max_steps {end}", [0.9, 0.5, 0.5])
    assert saved(folder) == list(range(2, end + 1, 2))
    for step in saved(folder):
        state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert logged(state, "eval_nDCG@10") == [each for each in (4, 8, 10) if each <= step]
    state = run(folder, f"{options} --max_steps 16 --patience 2 --resume_from_checkpoint True", [0.5, 0.5])
    assert logged(state, "eval_nDCG@10") == ([4, 8, 12] if end == 8 else [4, 8, 10])


def failing() -> Iterator[float]:
    """Measurements of which the first fails."""
    raise OverflowError
    yield 0.5


def test_a_failed_measurement_of_an_epoch_loses_no_checkpoint(tmp_path: Path) -> None:
    folder, options = tmp_path / "run", "--save_steps 4 --eval_strategy epoch --max_steps"
    with pytest.raises(OverflowError):
        run(folder, f"{options} 8", failing())
    assert saved(folder) == [4]
    state = run(folder, f"{options} 8 --resume_from_checkpoint True")
    assert (state["global_step"], logged(state, "eval_nDCG@10")) == (8, [8])


def test_a_checkpoint_that_is_saved_again_is_complete_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, complete = Trainer._save_optimizer_and_scheduler, []

    def save_optimizer(trainer: Trainer, output_dir: str) -> None:
        complete.append((Path(output_dir) / "trainer_state.json").exists())
        save(trainer, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save_optimizer)
    run(tmp_path / "run", "--save_steps 4 --eval_strategy epoch --max_steps 4")
    assert complete == [False, False]


@pytest.mark.parametrize("patience", [2, 3, 4])
def test_patience_counts_measurements_before_an_interruption(patience: int, tmp_path: Path) -> None:
    options = "--save_steps 1 --eval_steps 1"
    run(tmp_path / "run", f"{options} --max_steps 3", [0.5, 0.9, 0.5])
    run(tmp_path / "run", f"{options} --max_steps 8 --resume_from_checkpoint True --patience {patience}")
    assert saved(tmp_path / "run")[-1] == 2 + patience


@pytest.mark.parametrize(("lost", "end"), [(False, 8), (True, 14)])
def test_patience_does_not_count_from_lost_weights(lost: bool, end: int, tmp_path: Path) -> None:
    folder, options = tmp_path / "run", "--save_steps 2 --eval_steps 2 --max_steps"
    run(folder, f"{options} 6", [0.9, 0.6, 0.5])
    if lost:
        shutil.rmtree(folder / "checkpoint-2")
    state = run(folder, f"{options} 16 --resume_from_checkpoint True --patience 3", [0.7, 0.5, 0.5, 0.5])
    assert state["global_step"] == end


def test_patience_does_not_count_from_weights_that_were_not_saved(tmp_path: Path) -> None:
    folder, options = tmp_path / "run", "--save_steps 3 --eval_steps 2 --max_steps"
    run(folder, f"{options} 3 --load_best_model_at_end False", [0.9])
    state = run(folder, f"{options} 8 --resume_from_checkpoint True --patience 1", [0.6, 0.5])
    assert (state["global_step"], state["best_global_step"]) == (6, 4)


def test_measured_steps_stay_if_the_learning_rate_depends_on_them(tmp_path: Path) -> None:
    plateau = ("--lr_scheduler_type", "reduce_lr_on_plateau", "--save_steps", "100")
    checkpoint = recorded(tmp_path / "checkpoint-1", of_command(*plateau))
    SameSettings(of_command(*plateau, "--eval_steps", "100", "--save_strategy", "epoch"), checkpoint)
    for change, difference in {
        "--eval_steps 50": "eval_steps=100, not 50",
        "--save_steps 120": "eval_steps=100, not 120; it follows save_steps if",
        "--eval_delay 5": "eval_delay=0, not 5",
        "--eval_strategy epoch": "eval_strategy='steps', not 'epoch'",
    }.items():
        with pytest.raises(ValueError, match=difference):
            SameSettings(of_command(*plateau, *change.split()), checkpoint)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_a_run_at_a_constant_rate_may_become_longer(schedule: str, tmp_path: Path) -> None:
    run: dict[str, Any] = {"lr_scheduler_type": schedule, "warmup_steps": 5}
    checkpoint = recorded(tmp_path / "checkpoint-1", settings(**run))
    SameSettings(settings(**run, max_steps=20), checkpoint)
    share = recorded(tmp_path / "checkpoint-2", settings(**run | {"warmup_steps": 0.5}))
    if schedule == "constant_with_warmup":  # whose first steps are a share of all
        with pytest.raises(ValueError, match="max_steps=6, not 20"):
            SameSettings(settings(**run | {"warmup_steps": 0.5}, max_steps=20), share)


def test_models_and_data_are_compared_by_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in ("begun", "moved", "other"):
        shutil.copytree(BASE, tmp_path / place / "base")
    weights = tmp_path / "other" / "base" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, weights, metadata={"format": "pt"})
    files = [tmp_path / name for name in ("first.jsonl", "second.jsonl")]
    for file in files:
        file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    data = [open_data("train_data", [str(file)]) for file in files]
    begun, moved, other = (str(tmp_path / place / "base") for place in ("begun", "moved", "other"))
    checkpoint = recorded(tmp_path / "checkpoint-1", settings(base=begun, records=data[0]))
    SameSettings(settings(base=moved, records=data[1]), checkpoint)
    assert caplog.messages == []
    with pytest.raises(ValueError, match=rf"contents of \['{begun}'\] \(fingerprints .*\), not of \['{other}'\]"):
        SameSettings(settings(base=other, records=data[0]), checkpoint)


def test_the_digest_of_a_table_depends_on_its_rows_alone() -> None:
    datasets = pytest.importorskip("datasets")
    passages = [{"title": None, "text": "tea"}, {"title": "Pandas", "text": "bamboo"}]
    forms: list[dict[str, Any]] = [{"query": "q", "pos": passages, "scores": None}]
    forms += [{"query": None, "pos": passages[:1], "scores": [0.5]}, {"query": "tide", "pos": None, "scores": []}]
    rows = [forms[number * number % 7 % 3] for number in range(1500)]
    first = datasets.Dataset.from_list(rows)
    table = first.features
    tables = [
        datasets.concatenate_datasets([datasets.Dataset.from_list(part, table) for part in (rows[:700], rows[700:])]),
        datasets.Dataset.from_list(rows[-3:] + rows, table).select(range(3, 1503)),
    ]
    assert [digest(each) for each in tables] == [digest(first)] * 2
    others = [rows[:-1], rows[1:] + rows[:1], [*rows[:-1], {**rows[-1], "query": "other"}]]
    others += [[{**row, "pos": [passages[0] | {"title": ""}]} if row["query"] is None else row for row in rows]]
    others += [[{**row, "scores": row["scores"] or None} for row in rows]]
    assert len({digest(datasets.Dataset.from_list(other, table)) for other in [rows, *others]}) == 6


def test_settings_without_a_record_are_named(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun_with = settings()
    del begun_with["optim"]
    SameSettings(settings(optim="adafactor"), recorded(tmp_path / "checkpoint-2", begun_with))
    assert ["so these settings are not compared: optim." in message for message in caplog.messages] == [True]
    caplog.clear()
    (checkpoint / "begun_with.json").unlink()
    SameSettings(settings(), checkpoint)
    assert ["has no begun_with.json: it cannot be checked" in message for message in caplog.messages] == [True]


def test_a_complete_checkpoint_has_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted while it saves leaves a checkpoint that is refused, or one that can be compared."""
    save, seen = TrainerState.save_to_json, []

    def save_to_json(state: TrainerState, path: str) -> None:
        seen.append((Path(path).parent / "begun_with.json").is_file())
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", save_to_json)
    run(tmp_path / "run", "--save_steps 1 --max_steps 2 --eval_steps 2")
    assert seen == [True, True, False]  # both checkpoints, and the state beside the result
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "begun_with.json").read_text())["max_steps"] == 2


def test_settings_are_recorded_with_a_sharded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP writes shards of the weights with the optimiser, and ``save_model`` nothing."""
    save = Trainer.save_model

    def save_model(trainer: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir is None:
            save(trainer, output_dir, _internal_call)

    monkeypatch.setattr(Trainer, "save_model", save_model)
    run(tmp_path / "run", "--save_steps 1 --max_steps 1 --eval_steps 1 --load_best_model_at_end False")
    assert (tmp_path / "run" / "checkpoint-1" / "begun_with.json").is_file()


def test_the_contents_of_a_deepspeed_file_are_recorded(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    recipe, arguments = RankLLaMATraining(), TrainingArguments(output_dir="run", use_cpu=True)
    arguments.deepspeed = str(tmp_path / "zero.json")
    (tmp_path / "zero.json").write_text('{"gradient_clipping": 1.0}')
    groups = Groups(RECORDS, 4, 0, recipe.body)
    recorded = fixed_settings(recipe, recipe.open(str(MODELS / "rankllama_base")), groups, arguments)
    assert recorded["deepspeed"] == {"gradient_clipping": 1.0}
