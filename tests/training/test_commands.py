"""The original command lines run under another program name."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODELS, RECORDS, Cache, checkpointing, ids_of
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.__main__ import main
from pyterrier_llmrerank.checkpoints.description import LENGTHS
from pyterrier_llmrerank.checkpoints.input_format import InputFormat
from pyterrier_llmrerank.checkpoints.json_files import read_json
from pyterrier_llmrerank.engine.inputs import inputs_of
from pyterrier_llmrerank.training import DistillTraining, RankLLaMATraining
from pyterrier_llmrerank.training.commands import parse
from pyterrier_llmrerank.training.trainer import GroupTrainer
from pyterrier_llmrerank.training.validation import Validation

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MISTRAL = str(MODELS / "mistral_base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def distill(data: Path, output: Path, *more: str) -> list[str]:
    return [
        "distill", "--model_name_or_path", MISTRAL, "--train_data", str(data), "--output_dir", str(output),
        "--train_method", "distill_fix_layer", "--train_group_size", "4", "--query_max_len", "8",
        "--passage_max_len", "52", "--lora_rank", "4", "--max_steps", "4", "--logging_steps", "1", "--use_cpu",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--compress_layers", "4",
        "--compress_ratios", "1", "2", "--report_to", "none", "--learning_rate", "5e-3", *more,
    ]  # fmt: skip


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def commands(script: str, tmp_path: Path, *arguments: str) -> list[tuple[str, list[str]]]:
    """The train commands of an example script: recipe and options, as torchrun would get them."""
    said = tmp_path / "said"
    stub = tmp_path / "bin" / "torchrun"
    stub.parent.mkdir()
    stub.write_text(
        f"#!{sys.executable}\nimport sys, json\nopen({str(said)!r}, 'a').write(json.dumps(sys.argv) + '\\n')\n"
    )
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    subprocess.run(["bash", str(EXAMPLES / script), *arguments], check=True, env={**os.environ, "PATH": path})
    found = []
    for line in said.read_text().splitlines():
        words = json.loads(line)
        at = words.index("pyterrier_llmrerank")
        assert words[at - 1 : at + 2] == ["-m", "pyterrier_llmrerank", "train"]
        options = words[at + 3 :]
        config = options.index("--deepspeed")  # which is not among the tests' needs
        stage = json.loads((EXAMPLES / options[config + 1]).read_text())["zero_optimization"]["stage"]
        assert stage in (1, 3)
        found.append((words[at + 2], [*options[:config], *options[config + 2 :], "--use_cpu"]))
    return found


def test_the_original_command_of_rankllama_keeps_its_meaning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ((name, options),) = commands("train_rankllama.sh", tmp_path)
    with caplog.at_level(logging.WARNING):
        recipe, sources, arguments = parse(name, options)
    assert sources.train_data == ["Tevatron/msmarco-passage"]
    assert (recipe.group_size, recipe.query_max_length, recipe.passage_max_length) == (16, 32, 196)
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.num_train_epochs) == (1e-4, 0.1, 1)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 8)
    assert arguments.bf16
    assert getattr(arguments, checkpointing())
    assert any("--dataset_proc_num has no effect" in message for message in caplog.messages)


def test_the_original_commands_of_matroyshka_keep_their_meaning(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("")
    parsed = []
    for name, options in commands("train_matroyshka.sh", tmp_path, str(tmp_path / "data.jsonl")):
        recipe, sources, arguments = parse(name, options)
        parsed.append((name, getattr(recipe, "finetune_type", None), recipe.compress_ratios, arguments.learning_rate))
        assert recipe.target_modules[-1] == "linear_head"
        assert (recipe.group_size, recipe.lora_rank, recipe.lora_alpha, arguments.warmup_steps) == (16, 32, 64, 0.1)
        assert (recipe.passage_max_length, recipe.compress_layers[-1], recipe.start_layer) == (192, 28, 4)
        assert arguments.dataloader_drop_last
        assert arguments.bf16
        assert getattr(arguments, checkpointing())
        assert recipe.train_method == ("distill_fix_layer_teacher" if name == "distill" else "normal")
        assert sources.raw_peft == (None if name == "distill" else ["result_self_distillation"])
    assert parsed == [
        ("distill", None, (1, 2, 4, 8), 2e-4),
        ("compensate", "layer", (1,), 2e-5),
        *[("compensate", "token", (ratio,), 2e-5) for ratio in (2, 4, 8)],
    ]


def test_a_run_without_problems_warns_of_none(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = [word for word in distill(data, tmp_path / "run", "--gradient-checkpointing") if word != "--use_cpu"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main(["train", *options]) == 0
    assert [str(warning.message) for warning in said] == []
    assert caplog.messages == []


def test_losses_are_logged_without_a_progress_bar(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.NOTSET, "pyterrier_llmrerank")  # as it is; put back afterwards
    assert main(["train", *distill(data, tmp_path / "run"), "--logging_steps", "1", "--disable_tqdm", "True"]) == 0
    assert [message.partition(":")[0] for message in caplog.messages if "'loss': " in message] == [
        f"step {step} of 4" for step in range(1, 5)
    ]


def opened_as_said(capsys: pytest.CaptureFixture[str], folder: Path) -> Any:
    """The reranker that a run's last lines open."""
    said = capsys.readouterr().out.split("\n\n")
    assert said[-2].endswith(f"The adapter is in {folder}; open it in Python with")
    return eval(said[-1], {kind.__name__: kind for kind in (MatroyshkaReranker, RankLLaMAReranker)})


def test_distil_and_compensate(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distilled, layer, token = (tmp_path / name for name in ("distilled", "layer", "token"))

    def check(folder: Path, **parts: Any) -> None:
        """Check the scores of the reranker that the printed call opens, in two shapes."""
        said, wanted = opened_as_said(capsys, folder), MatroyshkaReranker(MISTRAL, **parts, dtype="float32")
        said.set_parameter("dtype", "float32")
        for shape in ({}, {"compress_layers": [4], "compress_ratio": 2}):
            pair = ("panda", "x " * 9)
            assert said.at(**shape).compute_score(pair) == pytest.approx(
                wanted.at(**shape).compute_score(pair), abs=1e-4
            )

    assert main(["train", *distill(data, distilled)]) == 0
    check(distilled, adapters=[distilled])
    options = distill(data, layer)[1:]
    options[options.index("--compress_ratios") : options.index("--compress_ratios") + 3] = []
    options += ["--raw_peft", str(distilled), "--train_method", "normal", "--finetune_type", "layer"]
    assert main(["train", "compensate", *options]) == 0
    check(layer, adapters=[distilled, layer])
    options = [str(token) if o == str(layer) else o for o in options]
    options += ["--raw_peft", str(distilled), str(layer), "--finetune_type", "token"]
    assert main(["train", "compensate", *options, "--compress_ratios", "2"]) == 0
    check(token, adapters=[distilled, layer], token_adapters={2: token})
    card = (token / "README.md").read_text()
    assert "# An adapter of mistral_base\n\nTrained by pyterrier_llmrerank for 4 steps" in card
    assert "CompensateTraining(group_size=4, " in card
    assert 'MatroyshkaReranker("path/to/this/folder")' in card
    assert "[More Information Needed]" not in card


def test_compensation_may_follow_an_adapter_that_was_trained_on_longer_texts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distilled, layer, token, further = (tmp_path / name for name in ("distilled", "layer", "token", "further"))

    def compensate(output: Path, *options: str) -> int:
        command = distill(data, output, "--train_method", "normal", "--max_steps", "1")[1:]
        at = command.index("--compress_ratios")
        return main(["train", "compensate", *command[:at], *command[at + 3 :], *options])

    usual = ("--query_max_len", "32", "--passage_max_len", "192")
    below = ("--raw_peft", str(distilled), str(layer))
    assert main(["train", *distill(data, distilled, "--max_steps", "1", *usual)]) == 0
    assert compensate(layer, "--raw_peft", str(distilled), "--passage_max_len", "600", "--query_max_len", "32") == 0
    assert compensate(token, *below, *usual, "--finetune_type", "token", "--compress_ratios", "2") == 0
    assert compensate(further, "--model_name_or_path", str(layer), "--raw_peft", str(distilled), *usual) == 0
    for folder in (layer, token, further):
        assert read_json(folder / "reranker.json")["max_length"] == 632
    long = [("panda", "panda " * 900)]
    assert ids_of(MatroyshkaReranker(token, dtype="float32"), long) == ids_of(
        MatroyshkaReranker(MISTRAL, start_layer=4, max_length=632, dtype="float32"), long
    )
    both = MatroyshkaReranker(MISTRAL, adapters=[distilled, layer], dtype="float32")
    assert ids_of(both, long) == ids_of(MatroyshkaReranker(layer, dtype="float32"), long)
    assert both.compute_score(long) == MatroyshkaReranker(layer, dtype="float32").compute_score(long)
    copy = shutil.copytree(MISTRAL, tmp_path / "copy")  # over another base, their order is not known
    with pytest.raises(ValueError, match="has query_max_length=384 and max_length=512, but .* give query_max_length"):
        MatroyshkaReranker(copy, adapters=[distilled, layer], dtype="float32").compute_score(("panda", "a panda"))


def test_the_printed_call_opens_a_base_of_a_relative_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MISTRAL, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    options = ["--model_name_or_path", "base", "--max_steps", "1", "--start_layer", "3", "--prompt", "Why 'this'?"]
    assert main(["train", *distill(data, Path("it's"), *options)]) == 0
    said, wanted = (
        opened_as_said(capsys, Path("it's")),
        MatroyshkaReranker("base", adapters="it's", start_layer=3, prompt="Why 'this'?", dtype="float32"),
    )
    said.set_parameter("dtype", "float32")
    pair = ("panda", "a panda")
    assert said.at(cutoff=3).compute_score(pair) == pytest.approx(wanted.at(cutoff=3).compute_score(pair), abs=1e-4)


@pytest.mark.parametrize(
    ("trained", "scored"),
    [
        ({"query_max_len": 32, "passage_max_len": 192}, {}),
        ({"query_max_len": 8, "passage_max_len": 52}, {}),  # scores with 512, like the original
        ({"query_max_len": 32, "passage_max_len": 600}, {"max_length": 632}),
        ({"query_max_len": 400, "passage_max_len": 100}, {"query_max_length": 400}),
        ({"query_max_len": 600, "passage_max_len": 100}, {"query_max_length": 600, "max_length": 700}),
    ],
)
def test_a_matroyshka_scores_with_all_tokens_that_it_was_trained_on(
    trained: dict[str, int], scored: dict[str, int], data: Path, tmp_path: Path
) -> None:
    lengths = [word for name, value in trained.items() for word in (f"--{name}", str(value))]
    assert main(["train", *distill(data, tmp_path / "run", "--max_steps", "1", *lengths)]) == 0
    described = read_json(tmp_path / "run" / "reranker.json")
    assert {name: described[name] for name in LENGTHS if name in described} == scored
    opened = MatroyshkaReranker(tmp_path / "run", dtype="float32")
    wanted = MatroyshkaReranker(MISTRAL, start_layer=4, dtype="float32", **scored)
    long = [("why " * 700, "panda " * 900), ("panda", "panda " * 900)]
    assert ids_of(opened, long) == ids_of(wanted, long)
    again = ["--model_name_or_path", str(tmp_path / "run"), "--query_max_len", "32", "--passage_max_len", "192"]
    assert main(["train", *distill(data, tmp_path / "again", "--max_steps", "1", *again)]) == 0
    assert ids_of(MatroyshkaReranker(tmp_path / "again", dtype="float32"), long) == ids_of(wanted, long)


def test_rankllama_with_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.jsonl"
    with path.open("w") as lines:
        for number, record in enumerate(RECORDS):
            passages = {
                "positive_passages": [{"docid": "p", "title": "", "text": text} for text in record["pos"]],
                "negative_passages": [{"docid": "n", "title": "", "text": text} for text in record["neg"]],
            }
            lines.write(json.dumps({"query_id": str(number), "query": record["query"], **passages}) + "\n")
    options = [
        "train", "rankllama", "--model_name_or_path", str(MODELS / "rankllama_base"), "--dataset_name", str(path),
        "--eval_data", str(path), "--eval_steps", "2", "--save_steps", "2", "--max_steps", "4", "--use_cpu",
        "--train_n_passages", "4", "--patience", "5", "--q_max_len", "8", "--p_max_len",
        "40", "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--overwrite_output_dir",
    ]  # fmt: skip
    assert main(options) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_global_step"] in (2, 4)
    assert [entry["step"] for entry in state["log_history"] if "eval_nDCG@10" in entry] == [2, 4]
    reranker = opened_as_said(capsys, tmp_path / "run")
    assert np.isfinite(reranker.compute_score(("panda", "a panda")))
    assert f"for {state['best_global_step']} steps" in (tmp_path / "run" / "README.md").read_text()
    assert "for 2 steps" in (tmp_path / "run" / "checkpoint-2" / "README.md").read_text()
    card = ModelCard.load(tmp_path / "run" / "README.md", ignore_metadata_errors=False)
    assert f"nDCG@10 {state['best_metric']:.4f} on `train.jsonl`, after {state['best_global_step']} steps" in card.text
    assert card.data.metrics == ["nDCG@10"]
    assert str(tmp_path) not in card.text
    assert "@article{rankllama" in card.text


@pytest.mark.parametrize("intervals", ["--eval_steps 2 --save_steps 4", "--eval_steps 2 --save_steps 3",
                                       "--eval_steps 2 --save_steps 3 --load_best_model_at_end True",
                                       "--eval_steps 2 --save_strategy epoch"])  # fmt: skip
def test_the_best_weights_are_kept_even_if_no_checkpoint_is_due(
    intervals: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.9, 0.5])
    monkeypatch.setattr(Validation, "__call__", lambda *_: next(values))
    assert main(["train", *distill(data, tmp_path / "run", "--eval_data", str(data), *intervals.split())]) == 0
    kept, best, last = (
        load_file(tmp_path / "run" / folder / "adapter_model.safetensors")
        for folder in ("", "checkpoint-2", "checkpoint-4")
    )
    assert all(torch.equal(kept[name], tensor) for name, tensor in best.items())
    assert not all(torch.equal(kept[name], tensor) for name, tensor in last.items())
    assert "for 2 steps" in (tmp_path / "run" / "README.md").read_text()


def test_a_card_names_the_best_step_only_if_its_weights_are_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.9, 0.5, 0.5, 0.5])
    monkeypatch.setattr(Validation, "__call__", lambda *_: next(values))
    command = ["train", *distill(data, tmp_path / "run", "--eval_data", str(data), "--save_steps", "2")]
    command += ["--lr_scheduler_type", "constant"]
    assert main(command) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert main([*command, "--resume_from_checkpoint", "True", "--max_steps", "6"]) == 0
    assert "for 4 steps" in (tmp_path / "run" / "README.md").read_text()  # the best of those that are left
    kept, left = (load_file(tmp_path / "run" / name / "adapter_model.safetensors") for name in ("", "checkpoint-4"))
    assert all(torch.equal(kept[name], tensor) for name, tensor in left.items())


def test_another_runs_output_is_left_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "note").write_text("before")
    command = ["train", *distill(data, folder, "--max_steps", "1")]
    assert main(command) == 1
    assert f"error: --output_dir='{folder}': another run is there (checkpoint-2)" in capsys.readouterr().err
    assert main([*command, "--resume_from_checkpoint", "True"]) == 1
    assert "error: --resume_from_checkpoint: no checkpoint in --output_dir=" in capsys.readouterr().err
    assert [path.name for path in folder.rglob("*")] == ["checkpoint-2", "note"]
    assert main([*command, "--overwrite_output_dir"]) == 0
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--use_lora", "False"], "use_lora=False; allowed: True"),
        (["--train_method", "distill_fix_layer_teacher"], "train.jsonl, line 1: no pos_scores"),
        (["--train_data", "nothing.jsonl"], "train_data='nothing.jsonl': no such file"),
        (["--compress_ratios", "3"], "--compress_ratios 3; allowed: powers of two"),
        (["--start_layer", "9"], "start_layer=9"),
        (["--patience", "3"], "patience=3 needs eval_data"),
        (["--eval_on_start"], "--eval_on_start; allowed: without it"),
        (["--load_best_model_at_end"], "--load_best_model_at_end needs eval_data"),
        (["--eval_data", "x", "--eval_strategy", "no"], "eval_strategy='no' measures nothing on eval_data; allowed:"),
        (["--eval_data", "x", "--eval_strategy", "no", "--patience", "2"], "eval_strategy='no' measures nothing on"),
        (
            ["--eval_data", "x", "--save_strategy", "no", "--patience", "2"],
            "patience=2 needs saved .*save_strategy='no' ",
        ),
        (["--eval_data", "x", "--metric_for_best_model", "eval_loss"], "metric_for_best_model='eval_loss': nDCG@10 al"),
        (
            ["--eval_data", "x", "--greater_is_better", "False"],
            "greater_is_better=False would keep the weights with the l",
        ),
        (["--eval_data", "x", "--eval_steps", "0"], "--eval_steps=0.0; allowed: a number above 0"),
        (["--eval_data", "x", "--eval_steps", "-1"], "--eval_steps=-1.0; allowed: a number above 0"),
        (["--eval_data", "x", "--eval_steps", "inf"], "--eval_steps=inf; allowed: a number above 0"),
        (["--eval_data", "x", "--save_steps", "0"], "--eval_steps=0.0; allowed: .* It follows save_steps"),
        (["--eval_data", "x", "--eval_delay", "5"], "eval_delay=5.0: the run ends at 4, so nothing is measured on"),
        (
            ["--eval_data", "x", "--max_steps", "-1", "--eval_strategy", "epoch", "--eval_delay", "2"],
            "eval_delay=2.0: the run ends at 1, so nothing is measured on .*; allowed: at most 1",
        ),
        (["--eval_strategy", "steps"], "eval_strategy='steps' needs eval_data to measure"),
        (["--save_strategy", "best"], "save_strategy='best' needs eval_data to measure"),
        (["--eval_steps", "1"], "--eval_steps=1.0 needs eval_data to measure"),
        (["--metric_for_best_model", "x"], "metric_for_best_model='x' needs eval_data to measure"),
        (["--warmup_ratio", "-0.1"], "--warmup_ratio=-0.1; allowed: a number from 0 to less than 1"),
        (["--warmup_ratio", "1"], "--warmup_ratio=1.0; allowed: a number from 0 to less than 1"),
        (["--eval-data", "nothing.jsonl"], "eval_data='nothing.jsonl': no such file"),
        (["--model_name_or_path", "./none"], "no such model folder"),
    ],
)
def test_errors_come_before_training(
    data: Path, tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *distill(data, tmp_path / "run", *change)]) == 1
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_card_names_the_settings_that_trained_the_model(data: Path, tmp_path: Path) -> None:
    (tmp_path / "fsdp.json").write_text("{}")
    options = ["--weight_decay", "0.3", "--lr_scheduler_type", "cosine", "--bf16", "--optim", "adafactor"]
    options += ["--max_grad_norm", "0.1", "--max_steps", "1", "--fsdp_config", str(tmp_path / "fsdp.json")]
    options += ["--eval_data", str(data), "--eval_steps", "7", "--save_strategy", "best"]
    assert main(["train", *distill(data, tmp_path / "run", *options)]) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    (call,) = re.findall(r"^DistillTraining\(.*\)$", card, re.MULTILINE)
    recipe = eval(call, {"DistillTraining": DistillTraining})
    assert (recipe.bf16, recipe.max_steps, recipe.group_size, recipe.eval_steps) == (True, 1, 4, 7)
    settings = {"lr_scheduler_type": "cosine", "optim": "adafactor", "weight_decay": 0.3, "max_grad_norm": 0.1}
    assert recipe.arguments == settings | {"save_strategy": "best"}
    assert str(tmp_path) not in card


def test_teacher_scores_are_in_all_records_or_in_none(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """distill_fix_layer learns from them if there are any, but a batch has them for all of its groups or for none."""
    scored = [record | {"pos_scores": [1.0], "neg_scores": [0.0] * len(record["neg"])} for record in RECORDS[:2]]
    data.write_text("".join(json.dumps(record) + "\n" for record in scored + RECORDS[2:]))
    assert main(["train", *distill(data, tmp_path / "run")]) == 1
    said = f"train_data: 6 of {len(RECORDS)} records have no pos_scores and neg_scores; allowed: teacher scores in all"
    assert said in capsys.readouterr().err
    assert main(["train", *distill(data, tmp_path / "run", "--train_method", "normal", "--max_steps", "1")]) == 0


@pytest.mark.parametrize("setting", [["--teacher_weight", "1"], ["--absolute_margin", "0"]])
def test_rankllama_names_the_line_without_a_teachers_scores(
    setting: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model_name_or_path", str(MODELS / "rankllama_base"), "--use_cpu"]
    files = ["--train_data", str(data), "--output_dir", str(tmp_path / "run")]
    assert main(["train", "rankllama", *base, *files, *setting]) == 1
    assert "train.jsonl, line 1: no pos_scores and neg_scores, which training with a" in capsys.readouterr().err


def test_options_have_one_name_in_full(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", *distill(data, tmp_path / "run", "--max_step", "2")])
    assert "unrecognized arguments: --max_step 2" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["rankllama", "distill", "compensate"])
def test_help_begins_with_our_options_and_ends_with_examples(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", recipe, "--help"])
    said = capsys.readouterr().out
    parts = ("\nmodel and data:\n", "\nrecipe:\n", "\ntransformers' TrainingArguments", "\nexamples:\n")
    assert [said.count(part) for part in parts] == [1] * 4
    assert sorted(said.index(part) for part in parts) == [said.index(part) for part in parts]
    runs = said.rpartition("\nexamples:\n")[2].replace("\\\n", "").splitlines()
    assert len(runs) == 2
    for run in runs:
        words = run.split()
        assert words[:3] == ["llmrerank", "train", recipe]
        _, sources, _ = parse(recipe, [*words[3:], "--use_cpu"])
        assert sources.model_name_or_path


def test_token_and_cache_reach_the_hubs_client() -> None:
    """The client reads them from the environment when it is imported."""
    options = ["--token", "hf_x", "--cache-dir", "somewhere"]  # the command's other options have underscores
    code = "import sys, types\n"
    code += "import dataclasses; Options = dataclasses.make_dataclass('Options', [])\n"
    code += "commands = types.SimpleNamespace(RECIPES={'distill': Options}, Sources=Options, TrainerOptions=Options)\n"
    code += "commands.main = lambda *arguments: None\n"
    code += "sys.modules['pyterrier_llmrerank.training'] = types.SimpleNamespace(commands=commands)\n"
    code += "from pyterrier_llmrerank.__main__ import main\n"
    code += f"main(['train', 'distill', *{options}])\n"
    code += "from huggingface_hub import constants, get_token; print(constants.HF_HUB_CACHE, get_token())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split()[-2:] == ["somewhere", "hf_x"]


#: A run whose processes measure different nDCG@10: the first gets better after two steps, the second does not.
MEASURED_APART = """\
import os, sys
from pyterrier_llmrerank.__main__ import main
from pyterrier_llmrerank.training.validation import Validation

values = iter([[0.5, 0.6, 0.6], [0.5, 0.5, 0.5]][int(os.environ["RANK"])])
Validation.__call__ = lambda *_: next(values)
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_two_processes_are_one_with_twice_the_batch_even_if_they_measure_differently(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = ["--max_grad_norm", "0", "--max_steps", "3", "--eval_data", str(data), "--eval_steps", "1"]
    same += ["--save_steps", "4", "--patience", "1"]
    one = distill(data, tmp_path / "one", "--per_device_train_batch_size", "4", *same)
    two = distill(data, tmp_path / "two", "--ddp_find_unused_parameters", "False", "--ddp_timeout", "60", *same)
    values = iter([0.5, 0.6, 0.6])
    monkeypatch.setattr(Validation, "__call__", lambda *_: next(values))
    assert main(["train", *one]) == 0
    (tmp_path / "apart.py").write_text(MEASURED_APART)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [*torchrun, str(tmp_path / "apart.py"), *two],
        check=True, capture_output=True, env={**os.environ, **environment}, timeout=240,
    )  # fmt: skip
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    assert sorted(path.name for path in (tmp_path / "two").glob("checkpoint-*")) == [
        "checkpoint-1", "checkpoint-2", "checkpoint-3"
    ]  # fmt: skip
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=5e-4, rtol=1e-3)  # Adam magnifies what rounds


def test_an_interrupted_run_continues_where_it_was(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ("--save_steps", "2", "--max_steps", "3", "--gradient_accumulation_steps", "2")  # the second epoch begins
    assert main(["train", *distill(data, tmp_path / "whole", *saving)]) == 0
    compute_loss = GroupTrainer.compute_loss

    def interrupted(trainer: GroupTrainer, *inputs: Any, **options: Any) -> Any:
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return compute_loss(trainer, *inputs, **options)

    with monkeypatch.context() as patched:
        patched.setattr(GroupTrainer, "compute_loss", interrupted)
        assert main(["train", *distill(data, tmp_path / "cut", *saving)]) == 130
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    assert main(["train", *distill(data, tmp_path / "cut", *saving, "--resume_from_checkpoint", "True")]) == 0
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "whole"), rtol=1e-5)
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_command_trains_in_tevatrons_format_of_2024(data: Path, tmp_path: Path) -> None:
    options = [
        "train", "rankllama", "--train_data", str(data), "--max_steps", "1", "--use_cpu", "--report_to", "none",
        "--train_group_size", "4", "--lora_rank", "4", "--per_device_train_batch_size", "1",
        "--gradient_accumulation_steps", "1",
    ]  # fmt: skip
    base = str(MODELS / "rankllama_base")
    flags = ["--input_format", "tevatron-2024", "--query_prefix", "", "--append_eos_token"]
    assert main([*options, "--model_name_or_path", base, "--output_dir", str(tmp_path / "one"), *flags]) == 0
    assert main([*options, "--model_name_or_path", str(tmp_path / "one"), "--output_dir", str(tmp_path / "two")]) == 0
    wanted = InputFormat("tevatron-2024", "", "document: ", True)
    for name in ("one", "two"):  # the second goes on in the first one's format
        opened = RankLLaMAReranker(tmp_path / name, dtype="float32")
        assert opened.named_format == wanted
        assert np.isfinite(opened.compute_score(("panda", "a panda")))


def test_training_encodes_as_scoring_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "rankllama_base")
    recipe = RankLLaMATraining(input_format="tevatron-2024", append_eos=True, passage_max_length=20)
    pairs = [("panda", recipe.body(record["neg"][0], "a-b")) for record in RECORDS]
    form = InputFormat("tevatron-2024", append_eos=True)
    assert recipe.inputs(None)(tokenizer, pairs) == inputs_of(form, 32, 20)(tokenizer, pairs)


@pytest.fixture
def uploads(cached: Cache, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """A hub that has two bases, and keeps the files of each upload."""
    kept: dict[str, dict[str, bytes]] = {}

    def upload_folder(
        api: HfApi, *, repo_id: str, folder_path: Path, allow_patterns: list[str] | None = None, **options: object
    ) -> None:
        names = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        chosen = filter_repo_objects(names, allow_patterns=allow_patterns)
        assert repo_id not in kept  # once, at the end
        kept[repo_id] = {name: (Path(folder_path) / name).read_bytes() for name in chosen}

    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    for name in ("mistral_base", "rankllama_base"):
        cached.add(f"someone/{name}", MODELS / name, "a" * 40, "main")
    return kept


@pytest.mark.parametrize("command", ["rankllama", "distill", "compensate"])
def test_a_pushed_run_is_what_save_writes(
    command: str, data: Path, tmp_path: Path, cached: Cache, uploads: dict[str, dict[str, bytes]]
) -> None:
    base = "someone/rankllama_base" if command == "rankllama" else "someone/mistral_base"
    options = [
        "train", command, "--model_name_or_path", base, "--train_data", str(data), "--max_steps", "2", "--use_cpu",
        "--save_steps", "1", "--report_to", "none", "--train_group_size", "4", "--lora_rank", "4",
        "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1",
    ]  # fmt: skip
    if command != "rankllama":
        options += ["--compress_layers", "4", "--compress_ratios", "1"]
    if command == "distill":
        options += ["--train_method", "distill_fix_layer"]
    if command == "compensate":
        earlier = distill(data, tmp_path / "earlier", "--max_steps", "1")
        assert main(["train", *earlier]) == 0
        options += ["--raw_peft", str(tmp_path / "earlier")]
    run = tmp_path / "run"
    push = ["--push_to_hub", "--hub_model_id", "owner/model", "--license", "mit", "--output_dir", str(run)]
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert main([*options, *push]) == 0
    sent = uploads["owner/model"]
    assert (run / "training_args.bin").exists()
    opener = RankLLaMAReranker if command == "rankllama" else MatroyshkaReranker
    (run / "notes.txt").unlink()
    opener(run, dtype="float32").save(tmp_path / "saved")
    saved = {str(file.relative_to(tmp_path / "saved")) for file in (tmp_path / "saved").rglob("*") if file.is_file()}
    if command == "compensate":  # a run keeps its own adapter at the top
        saved = {name.replace("1/", "adapter-1/").removeprefix("2/") for name in saved}
    assert sent.keys() == saved
    (tmp_path / "sent").mkdir()
    for name, content in sent.items():
        (tmp_path / "sent" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "sent" / name).write_bytes(content)
    cached.add("owner/model", tmp_path / "sent", "c" * 40, "main")
    pair = ("panda", "a panda")
    ours = opener(run, dtype="float32").compute_score(pair)
    assert opener("owner/model", dtype="float32").compute_score(pair) == ours
    card = ModelCard.load(tmp_path / "sent" / "README.md", ignore_metadata_errors=False)
    assert (card.data.base_model, card.data.license, card.data.library_name) == (base, "mit", "peft")
    assert f'{opener.__name__}("owner/model")' in card.text
    for said in ("for 2 steps with", "Trained on `train.jsonl`.", "## Licence\n\nmit", "## Citation"):
        assert said in card.text
    assert str(tmp_path) not in card.text


def test_uploads_that_would_open_nowhere_are_refused(
    data: Path, tmp_path: Path, uploads: dict[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    push = ["--push_to_hub", "--hub_model_id", "owner/model"]
    assert main(["train", *distill(data, tmp_path / "run", *push)]) == 1
    assert "push_to_hub: the base " in capsys.readouterr().err
    command = [word.replace(MISTRAL, "someone/mistral_base") for word in distill(data, tmp_path / "run", *push)]
    assert main(["train", *command, "--hub_strategy", "checkpoint"]) == 1
    assert "hub_strategy='checkpoint': only the result is uploaded" in capsys.readouterr().err
    assert uploads == {}
