"""The commands, their options, errors and help."""

import argparse
import gzip
import importlib.metadata
import inspect
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import MODELS, frame
from scipy import stats
from typer.main import get_command
from typer.testing import CliRunner

from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker, RankLLaMAReranker, cli, cli_options
from pyterrier_llmrerank.cli import app, main
from pyterrier_llmrerank.runs import streaming
from pyterrier_llmrerank.runs.collection import Judgement
from pyterrier_llmrerank.runs.formats import RunRow, read_rerank, read_run

RANKLLAMA = ["--model", str(MODELS / "rankllama_adapter"), "--base-model", str(MODELS / "rankllama_base")]
KINDS = {"rankllama": RankLLaMAReranker, "matroyshka": MatroyshkaReranker}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run commands in a folder with a run of three queries, six documents each, and its texts."""
    rows = frame(3, 6)
    with gzip.open(tmp_path / "run.gz", "wt") as lines:
        lines.writelines(f"{r.qid} Q0 {r.docno} {r.rank} {r.score} first\n" for r in rows.itertuples())
    topics = rows.drop_duplicates("qid")
    (tmp_path / "topics.tsv").write_text("".join(f"{r.qid}\t{r.query}\n" for r in topics.itertuples()))
    texts = rows.drop_duplicates("docno")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"docno": r.docno, "title": "T", "text": r.text}) + "\n" for r in texts.itertuples())
    )
    (tmp_path / "others.txt").write_text("7 0 d3 1\n")
    (tmp_path / "qrels.txt").write_text("q0 0 d3 1\nq1 0 d0 1\nq2 0 d1 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> int:
    return main(shlex.split(command))


PREPARE = "prepare run.gz --topics topics.tsv --texts texts.jsonl --depth 4 --output rerank.jsonl.gz"


def test_a_run_is_prepared_reranked_converted_and_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PREPARE) == 0
    rows = list(read_rerank(Path("rerank.jsonl.gz")))
    assert [(row.qid, row.docno) for row in rows] == [(f"q{q}", f"d{d}") for q in range(3) for d in range(4)]
    assert (
        main(["rerank", "rankllama", "rerank.jsonl.gz", "--output", "mine.txt", *RANKLLAMA, "--dtype", "float32"]) == 0
    )
    scored = RankLLaMAReranker(
        MODELS / "rankllama_adapter", base_model=MODELS / "rankllama_base", dtype="float32"
    ).transform(
        pd.DataFrame([row._asdict() for row in rows]).rename(columns={"score": "before"})
    )  # fmt: skip
    want = scored.sort_values(["qid", "rank"])
    got = list(read_run(Path("mine.txt")))
    assert [(row.qid, row.docno) for row in got] == list(zip(want["qid"], want["docno"], strict=True))
    assert [row.score for row in got] == pytest.approx(want["score"].tolist(), abs=1e-5)
    assert run("convert mine.txt --output mine.trec.gz --tag mine") == 0
    ranked = list(read_run(Path("mine.trec.gz")))
    assert [row.rank for row in ranked] == [1, 2, 3, 4] * 3
    assert [row[:2] + row[3:] for row in ranked] == [row[:2] + row[3:] for row in got]
    assert gzip.decompress(Path("mine.trec.gz").read_bytes()).startswith(f"q0 Q0 {got[0].docno} 1 ".encode())
    assert capsys.readouterr() == ("", "")
    assert run("evaluate mine.trec.gz RR@10 --qrels qrels.txt --baseline run.gz --per-query") == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    ranks = want.set_index(["qid", "docno"])["rank"]
    values = [1 / (1 + ranks[f"q{q}", docno]) for q, docno in enumerate(("d3", "d0", "d1"))]
    before = [1 / 4, 1, 1 / 2]
    assert said[0] == ["qid", "measure", "value", "baseline", "difference"]
    assert sorted(said[1:4]) == [
        [f"q{q}", "RR@10", f"{value:.4f}", f"{other:.4f}", f"{value - other:.4f}"]
        for q, (value, other) in enumerate(zip(values, before, strict=True))
    ]
    assert said[5] == ["measure", "value", "baseline", "difference", "p"]
    p = f"{stats.ttest_rel(values, before).pvalue:.2g}"
    mean, other = np.mean(values), np.mean(before)
    assert said[6] == ["RR@10", f"{mean:.4f}", f"{other:.4f}", f"{mean - other:.4f}", p]


def test_a_collection_by_name_equals_its_files(collections: Path, tmp_path: Path) -> None:
    if not (collections / "irds_home" / "vaswani").is_dir():
        pytest.skip("needs irds_home/vaswani in LLMRERANK_DATA: a home of ir_datasets")
    shutil.copytree(collections / "irds_home" / "vaswani", tmp_path / "vaswani")
    there = collections / "vaswani"
    environment = {**os.environ, "IR_DATASETS_HOME": str(tmp_path)}

    run, depth = str(there / "runs" / "bm25.res.gz"), ["--depth", "5"]
    files = ["--topics", str(there / "topics.tsv"), "--texts", str(there / "docs.jsonl.gz")]
    commands = [
        ["prepare", run, "--topics", "vaswani", "--texts", "irds:vaswani", *depth, "--output", "named.jsonl"],
        ["prepare", run, *files, *depth, "--output", "files.jsonl"],
        ["evaluate", run, "--qrels", "vaswani"],
        ["evaluate", run, "--qrels", str(there / "qrels.txt")],
    ]
    code = f"from pyterrier_llmrerank.cli import main\nfor words in {commands}:\n    assert main(words) == 0"
    command = [sys.executable, "-c", code]  # a new process, since ir_datasets reads IR_DATASETS_HOME on import
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=240, cwd=tmp_path, env=environment
    )
    named, read = (list(read_rerank(tmp_path / name)) for name in ("named.jsonl", "files.jsonl"))
    assert len(named) == 5 * 93
    for one, other in zip(named, read, strict=True):
        assert (one.qid, one.docno, one.score) == (other.qid, other.docno, other.score)
        assert one.query.lower().split() == other.query.lower().split()  # ir_datasets has capitals
        assert one.text.split() == other.text.split()
    assert ran.stdout.split() == ["measure", "value", "nDCG@10", "0.4449"] * 2


def test_convert_orders_by_score(folder: Path) -> None:
    Path("given.txt").write_text("q d1 9 0.25\nq d2 2 0.5\nq d3 1 0.5\n")
    assert run("convert given.txt --output three.txt --form three") == 0
    assert Path("three.txt").read_text() == "q\td3\t0.5\nq\td2\t0.5\nq\td1\t0.25\n"


#: A run in the form of MS MARCO. The relevant documents have ranks 2, 3 and 1.
RANKS = "q0\td0\t1\nq0\td3\t2\nq1\td1\t1\nq1\td2\t2\nq1\td0\t3\nq2\td1\t1\n"


@pytest.mark.parametrize(
    "command",
    [
        "prepare ranks.tsv --topics topics.tsv --texts texts.jsonl --output o",
        "convert ranks.tsv --output o",
        "evaluate ranks.tsv --qrels qrels.txt",
        "evaluate run.gz --qrels qrels.txt --baseline ranks.tsv",
    ],
)
def test_ranks_are_not_read_as_scores(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("ranks.tsv").write_text(RANKS)
    assert run(command) == 1
    assert "ranks.tsv, line 3: the scores count up like ranks" in capsys.readouterr().err
    assert not Path("o").exists()


def test_ranks_are_read_as_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("ranks.tsv").write_text(RANKS)
    columns = "--columns qid,docno,rank"
    assert (
        run(f"prepare ranks.tsv {columns} --topics topics.tsv --texts texts.jsonl --depth 1 --output best.jsonl") == 0
    )
    assert [(row.docno, row.score) for row in read_rerank(Path("best.jsonl"))] == [("d0", -1), ("d1", -1), ("d1", -1)]
    assert run(f"convert ranks.tsv {columns} --output ranks.trec") == 0
    lines = [line.split() for line in Path("ranks.trec").read_text().splitlines()]
    assert [(qid, docno, rank) for qid, _, docno, rank, *_ in lines] == [
        tuple(line.split("\t")) for line in RANKS.splitlines()
    ]
    mean = f"{(1 / 2 + 1 / 3 + 1) / 3:.4f}"
    for words in (f"ranks.tsv {columns}", "ranks.trec"):
        assert run(f"evaluate {words} RR@10 --qrels qrels.txt") == 0
        assert capsys.readouterr().out.split() == ["measure", "value", "RR@10", mean]
    both = "evaluate ranks.tsv RR@10 --qrels qrels.txt --baseline ranks.tsv --baseline-columns"
    assert run(f"{both} qid,docno,score {columns}") == 0
    assert capsys.readouterr().out.split()[5:8] == ["RR@10", mean, f"{1:.4f}"]


def test_several_runs_are_compared_with_a_baseline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = "q0 d3 2\nq0 d0 1\nq1 d0 2.5\nq2 d1 3.5\n"
    Path("best.txt").write_text(best)
    Path("AP").write_text(best.replace("d3 2", "d3 0.5"))
    command = "evaluate best.txt RR ./AP P@1 --qrels qrels.txt --baseline run.gz --correction bonferroni"
    assert run(command) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["run", "measure", "value", "baseline", "difference", "p", "p_bonferroni"]
    assert [line[:3] for line in lines[1:]] == [
        ["best.txt", "RR", "1.0000"],
        ["./AP", "RR", "0.8333"],
        ["best.txt", "P@1", "1.0000"],
        ["./AP", "P@1", "0.6667"],
    ]
    p = stats.ttest_rel([1, 1, 1], [1 / 4, 1, 1 / 2]).pvalue
    assert lines[1][5:] == [f"{p:.2g}", f"{min(1, 2 * p):.2g}"]
    assert run("evaluate best.txt RR P@1 --qrels qrels.txt --baseline run.gz") == 0
    alone = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert alone[1:] == [lines[1][1:6], lines[3][1:6]]


def test_evaluate_measures_ndcg_at_10_by_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate run.gz --qrels qrels.txt") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["measure", "value"],
        ["nDCG@10", "0.6872"],
    ]


# -- rerank's options


def reranked(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[LLMReranker, dict[str, Any]]:
    """Return the reranker and the arguments that a rerank command passes on."""
    calls: list[tuple[LLMReranker, dict[str, Any]]] = []

    def record(reranker: LLMReranker, source: Path, target: Path, **arguments: Any) -> None:
        calls.append((reranker, {"source": source, "target": target, **arguments}))

    monkeypatch.setattr(streaming, "rerank_file", record)
    assert main(["rerank", *words]) == 0
    ((reranker, arguments),) = calls
    return reranker, arguments


@pytest.mark.parametrize("name", KINDS)
def test_defaults_are_the_constructors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker, arguments = reranked(monkeypatch, name, "in.jsonl", "--output", "out.txt")
    assert reranker == KINDS[name]()
    assert arguments == {
        "source": Path("in.jsonl"), "target": Path("out.txt"), "form": "three", "tag": name, "resume": False,
        "shard": None, "workers": 1, "address": None,
    }  # fmt: skip


def test_options_are_the_arguments_of_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "matroyshka in --output out.gz --form trec --tag mine --resume --shard 2/4 --workers 2 --address auto "
        "--verbose --model smollm2-135m --cutoff 20 --cutoff 10 --compress-layers 8 --compress-layers 12 "
        "--compress-ratio 2 --prune 8:50 --prune 12:20 --normalize --max-length 100 --dtype float32 --batch-size 3 "
        "--prompt why?"
    )
    reranker, arguments = reranked(monkeypatch, *words.split())
    assert reranker == MatroyshkaReranker(
        "smollm2-135m", cutoff=[10, 20], compress_layers=[8, 12], compress_ratio=2, prune={8: 50, 12: 20},
        normalize=True, max_length=100, dtype="float32", batch_size=3, prompt="why?", verbose=True,
    )  # fmt: skip
    assert (arguments["form"], arguments["tag"], arguments["resume"]) == ("trec", "mine", True)
    assert (arguments["shard"], arguments["workers"], arguments["address"]) == ("2/4", 2, "auto")
    words = f"matroyshka in --output out --model smollm2-135m --token-adapters 2:{MODELS}/adapter_comp_token2"
    reranker, _ = reranked(monkeypatch, *words.split())
    assert reranker == MatroyshkaReranker("smollm2-135m", token_adapters={2: str(MODELS / "adapter_comp_token2")})


@pytest.mark.parametrize("name", KINDS)
def test_every_argument_is_an_option_with_help(name: str) -> None:
    said = shown("rerank", name)
    arguments = [one for one in inspect.signature(KINDS[name]).parameters if one not in cli_options.WITHOUT_OPTION]
    assert len(arguments) >= 12
    for argument in arguments:
        assert re.search(f' --{argument.replace("_", "-")} [^-]*[A-Z"]', said), argument
    assert re.findall(r"`|\bNone\b|\bTrue\b|\bFalse\b|: \[|\{\d|list\[|\b[a-z]+_(?:layer|length|ratio)", said) == []


def shown(*words: str) -> str:
    """Return the help of a command in one line."""
    return " ".join(CliRunner().invoke(app, [*words, "--help"], terminal_width=10_000).output.split())


def test_help_shows_lists_and_pairs_as_a_shell_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    said = shown("rerank", "matroyshka")
    for words in (
        "--prune 8:50 --prune 16:20", "--compress-layers 8 --compress-layers 16", "--cutoff 16",
        "--token-adapters 2:FOLDER --token-adapters 4:FOLDER", "--adapters FIRST --adapters SECOND",
        "--device cuda:0 --device cuda:1",
    ):  # fmt: skip
        assert words in said
    some = f"--model smollm2-135m {words} --cutoff 20 --prune 8:50 --prune 16:20 --compress-layers 8"
    reranker, _ = reranked(monkeypatch, "matroyshka", "in", "--output", "out", *some.split())
    assert (reranker.device, reranker.prune) == (("cuda:0", "cuda:1"), ((8, 50), (16, 20)))


def test_help_lists_each_command_in_a_line() -> None:
    names = {(): list(cli.COMMANDS), ("rerank",): ["rankllama", "matroyshka"],
             ("train",): ["rankllama", "distill", "compensate"]}  # fmt: skip
    for words, wanted in names.items():
        output = CliRunner().invoke(app, [*words, "--help"], terminal_width=80).output
        lines = [
            line.split(maxsplit=1) for line in output.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
        ]
        assert [name for name, _ in lines] == wanted
        assert all(text.endswith(".") and not text.endswith("...") for _, text in lines)
    root = get_command(app)
    assert sorted(root.commands) == sorted(cli.COMMANDS)


def test_version_shows_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"llmrerank {importlib.metadata.version('pyterrier-llmrerank')}\n"


def commands(group: Any, context: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the commands of a group and its subgroups, each with the context of its group."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, command.make_context(name, [], parent=context, resilient_parsing=True))
        else:
            yield command, context


def test_every_option_may_be_spelled_with_underscores() -> None:
    root = get_command(app)
    seen = set()
    for command, context in commands(root, root.make_context("llmrerank", [], resilient_parsing=True)):

        def parse(*words: str, command: Any = command, context: Any = context) -> dict[str, Any]:
            return command.make_context(command.name, list(words), parent=context, resilient_parsing=True).params

        for option in command.params:
            for flag in (flag for flag in option.opts if "-" in flag[2:]):
                value = [] if option.is_flag else ["2:3" if ":" in (option.metavar or "") else "3"]
                dashed, underscored = parse(flag, *value), parse("--" + flag[2:].replace("-", "_"), *value)
                assert dashed == underscored != parse(), (command.name, flag)
                seen.add((command.name, flag))
    assert len(seen) >= 20
    assert {("evaluate", "--per-query"), ("rankllama", "--base-model"), ("matroyshka", "--token-adapters")} <= seen


@pytest.mark.parametrize("recipe", ["rankllama", "distill", "compensate"])
def test_every_option_of_training_may_be_spelled_with_dashes(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[argparse.ArgumentParser, list[str]]] = []

    def parse_args(self: argparse.ArgumentParser, words: list[str]) -> None:
        calls.append((self, words))
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    assert main(["train", recipe]) == 1
    actions = calls[0][0]._option_string_actions
    flags = [flag for flag in actions if "_" in flag and "gradient_checkpointing" not in flag]  # which has two names
    assert {"--train_data", "--dataset_name", "--per_device_train_batch_size"} <= {*flags}
    for spelled in (flags, ["--" + flag[2:].replace("_", "-") for flag in flags]):
        assert main(["train", recipe, *spelled, "--gradient-checkpointing"]) == 1
        *words, checkpointing = calls.pop()[1]
        assert [actions[word] for word in words] == [actions[flag] for flag in flags]
        assert checkpointing in actions


def test_ctrl_c_says_how_far_the_output_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        error = KeyboardInterrupt()
        error.add_note("out.txt holds 3 pairs.")
        raise error

    monkeypatch.setattr(streaming, "rerank_file", stopped)
    assert main(["rerank", "rankllama", "in", "--output", "out.txt"]) == 130
    assert capsys.readouterr().err == "Interrupted. out.txt holds 3 pairs.\n"


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("rerank rankllama in.jsonl --output begun.txt --model smollm2-135m", "to continue it, set --resume."),
        ("teach train.jsonl begun.txt --model smollm2-135m", "to continue it, set --resume."),
        ("teach train.jsonl new.txt --model smollm2-135m", "neg_scores is already present; allowed with --overwrite."),
        ("teach none new.txt", "TRAIN_FILE='none': no such file; expected JSON lines."),
        ("rerank rankllama none --output o", "RERANK_FILE='none': no such file; allowed: a rerank file, as written by"
         " prepare."),
        ("rerank matroyshka in.jsonl --output o --prune 8:5 --released",
         "--prune 8:5: --released reads the heads of layers other than the cutoffs; allowed: no cascade."),
        ("rerank matroyshka in.jsonl --output o --prune 8:5 --prune 9:7",
         "--prune 8:5 --prune 9:7: 7 cannot survive layer 9: only 5 are left there."),
        ("rerank matroyshka in.jsonl --output o --prune 0:5", "--prune 0:5; allowed: layers and the number of "
         "candidates that survive each, 8:50 16:20, integers of at least 1."),
        ("rerank matroyshka in.jsonl --output o --model smollm2-135m --compress-layers 2 --compress-layers 40",
         "--compress-layers 2 --compress-layers 40: --model='smollm2-135m' has 30 layers, so none runs after layer 40;"
         " allowed: 1 to 29."),
        ("rerank rankllama in.jsonl --output o --model smollm2-135m --append-eos", "--append-eos: input_format "
         "'tevatron-2023' has no end token; allowed: without it."),
        ("prepare run.gz --topics none --texts texts.jsonl --output o", "--topics='none': no such file or dataset; "
         "allowed: a file, an ir_datasets id (https://ir-datasets.com) or a PyTerrier dataset."),
        ("evaluate run.gz --qrels qrels.txt --baseline run.gz --baseline-columns qid,docno", "--baseline-columns="
         "'qid,docno'; allowed: qid, docno, and rank, score or both, with _ for each column to ignore, such as "
         "qid,docno,rank or qid,_,docno,_,score,_."),
    ],
)  # fmt: skip
def test_errors_name_options(command: str, hint: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("begun.txt", "in.jsonl"):
        Path(name).touch()
    Path("train.jsonl").write_text('{"query": "q", "pos": ["a"], "neg": ["b"], "neg_scores": [1]}')
    assert run(command) == 1
    assert capsys.readouterr().err.endswith(f"{hint}\n")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("adapters=(): no adapter", "--adapters=(): no adapter"),
        ("adapters=(none)", "--adapters=(none)"),
        ("x/adapters=3/y and 'adapters=3'", "x/adapters=3/y and 'adapters=3'"),
        ("adapters=['a b', 'c']; allowed: one, or None.", "--adapters 'a b' --adapters c; allowed: one."),
        ("adapters=[(8, 50)] is {2: folder, 4: folder}", "--adapters 8:50 is 2:folder 4:folder"),
        ("adapters=['a]', \"b's adapters=3\"]", "--adapters 'a]' --adapters 'b'\"'\"'s adapters=3'"),
    ],
)
def test_arguments_and_values_are_spelled_as_in_a_shell(message: str, wanted: str) -> None:
    assert cli_options.in_shell(message, cli_options.flags("adapters")) == wanted


def test_lists_of_training_follow_one_option() -> None:
    names = {"compress_ratios": "--compress_ratios"}
    assert cli_options.in_shell("compress_ratios=[2, 3]", names, repeat=False) == "--compress_ratios 2 3"


@pytest.mark.parametrize(
    "quoted",
    [
        "'a adapters=(1)'", '"it\'s adapters=3"', r"'\' adapters=3'", "'this, or None. allowed: False'",
        "['x', 'adapters=3']", "'a {8: 50}'", "'cut off adapters=3...", "'adapters=True'",
    ],
)  # fmt: skip
def test_quoted_texts_in_an_error_stay_as_they_are(quoted: str) -> None:
    names = cli_options.flags("adapters")
    message = f"the model's qid is {quoted}; set adapters=True"
    assert cli_options.in_shell(message, names) == f"the model's qid is {quoted}; set --adapters"


@pytest.mark.parametrize(
    ("message", "words", "wanted"),
    [
        ("model='x': no", ["model"], "--model='x': no"),
        ("x model=3: no", ["--output=x model=3"], "x model=3: no"),
        ("url=http://x/?model=3&model=4: no (model=True)", [], "--url=http://x/?model=3&model=4: no (--model)"),
        ("/a/b or None.txt: no", [], "/a/b or None.txt: no"),
        ("b or None. txt: no; allowed: 1 or None.", ["b or None. txt"], "b or None. txt: no; allowed: 1."),
    ],
)
def test_arguments_alone_are_spelled(message: str, words: list[str], wanted: str) -> None:
    assert cli_options.in_shell(message, cli_options.flags("model", "url"), words) == wanted


def test_names_of_files_in_an_error_stay_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x").touch()
    for name in ("cutoff=20.txt", "this or None. allowed: False {8: 50}"):
        Path(name).write_text("not json\n")
        assert main(["rerank", "matroyshka", name, "--model", "smollm2-135m", "--output", "o"]) == 1
        assert capsys.readouterr().err.startswith(f"error: {name}, line 1: not JSON")
        assert main(["rerank", "matroyshka", "x", "--model", "smollm2-135m", f"--output={name}"]) == 1
        assert capsys.readouterr().err.startswith(f"error: {name} already exists and is not overwritten; ")


def test_verbose_logs_each_step(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(PREPARE) == 0
    assert caplog.messages == []
    assert run(f"{PREPARE} --verbose") == 0
    assert caplog.messages == ["rerank.jsonl.gz: 12 pairs"]


def test_torchao_is_heard_if_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers imports it wherever it is installed, and it warns of extras on import."""
    torchao = logging.getLogger("torchao.kernel")
    reranked(monkeypatch, "rankllama", "in", "--output", "out", "--verbose")
    assert not torchao.isEnabledFor(logging.WARNING)
    reranked(monkeypatch, "rankllama", "in", "--output", "out", "--verbose", "--quantization", "int8")
    assert torchao.isEnabledFor(logging.WARNING)


# -- errors


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("prepare none --topics topics.tsv --texts texts.jsonl --output o", "No such file or directory: 'none'"),
        ("prepare run.gz --topics none --texts texts.jsonl --output o", "--topics='none': no such file or dataset"),
        ("prepare run.gz --topics topics.tsv --texts topics.tsv --output o", "docno 'd0' .* not among the texts"),
        ("evaluate run.gz foo --qrels qrels.txt", "measure='foo'; allowed"),
        (
            "evaluate run.gz other.gz --qrels qrels.txt",
            "measure='other.gz'; allowed.* There is no run 'other.gz' either",
        ),
        ("evaluate run.gz ./run.gz --qrels qrels.txt", "the run './run.gz' is named twice"),
        ("evaluate run.gz RR RR --qrels qrels.txt --baseline run.gz", "measure=RR is named twice"),
        ("evaluate run.gz nDCG@10 ndcg_cut_10 --qrels qrels.txt", "measure=nDCG@10 is named twice"),
        ("evaluate run.gz --qrels qrels.txt --correction holm", "--correction='holm' needs a baseline"),
        ("evaluate qrels.txt --qrels run.gz", "run.gz, line 1: 6 whitespace-separated columns"),
        ("convert run.gz --output none/o", "the folder .*none does not exist"),
        (
            "convert run.gz --output o --columns qid,docno",
            "--columns='qid,docno'; allowed: qid, docno, and rank, score or both",
        ),
        ("convert run.gz --output ./run.gz", "--output='run.gz' is the run itself"),
        ("convert run.gz --output o --tag 'a b'", "tag is 'a b'; expected no whitespace"),
        ("rerank rankllama topics.tsv --output o --model ./none", "--model='./none'"),
        (
            "rerank rankllama topics.tsv --output o --model smollm2-135M",
            "--model='smollm2-135M': no such model; did you",
        ),
        (
            "rerank rankllama topics.tsv --output o --device gpu",
            "--device gpu: 'gpu' is not a device; allowed: 'cpu', .*'xpu', a list of these.$",
        ),
        ("rerank rankllama x/device=3/y --output o --model smollm2-135m", "RERANK_FILE='x/device=3/y': no such file; "),
        ("rerank rankllama topics.tsv --output o --shard 5/4 --model smollm2-135m", "--shard='5/4'; allowed: i/n"),
        ("rerank rankllama topics.tsv --output /dev/null --model smollm2-135m", "--output='/dev/null' is not a file"),
        (
            "evaluate run.gz --qrels others.txt",
            "the run has none of the queries with judgements: it has 'q0'.* have '7'",
        ),
        ("rerank matroyshka none --output o --compress-ratio 3", "--compress-ratio=3; allowed: 1, 2, 4, 8"),
        (f"rerank rankllama topics.tsv --output o {shlex.join(RANKLLAMA)}", "topics.tsv, line 1: not JSON"),
    ],
)
def test_errors_are_one_line(folder: Path, command: str, problem: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(command) == 1
    (said,) = capfd.readouterr().err.splitlines()
    assert re.match(f"error: .*{problem}", said)
    assert not Path("o").exists()


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("", "Missing command"),
        ("evaluate run.gz", "Missing option '--qrels'"),
        (
            "prepare run.gz --topics t --texts t --output o --depth 0",
            "'--depth': .* greater than or equal to 1",
        ),
        ("convert run.gz --output o --form four", "'four' is not one of 'three', 'trec'"),
        ("rerank matroyshka x --output o --prune 5", "'5' has no colon"),
        ("rerank matroyshka x --output o --prune a:5", "Invalid value for '--prune'"),
        ("rerank rankllama x --output o --cutoff 5", "No such option"),
        ("train dance", "No such command 'dance'"),
    ],
)
def test_malformed_commands_are_named(command: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command) == 2
    assert re.match(f"error: .*{problem}", capsys.readouterr().err)


# -- help


EXAMPLES = [
    command
    for words in (
        [], ["prepare"], ["convert"], ["evaluate"], ["rerank", "rankllama"], ["rerank", "matroyshka"],
    )
    for command in CliRunner()
    .invoke(app, [*words, "--help"]).output.partition("Examples:\n")[2].replace("\\\n", "").splitlines()
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_in_the_help_run(example: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(example.partition(" > ")[0])
    assert words[0] == "llmrerank"
    monkeypatch.setattr(cli, "read_run", lambda *_: iter([RunRow("q", "d", None, 1.0, 1)]))
    monkeypatch.setattr(cli, "rerank_rows", lambda *_: iter([]))
    monkeypatch.setattr(cli, "judgements", lambda name: [Judgement("q", "d", 1)])
    monkeypatch.setattr(streaming, "rerank_file", lambda *_, **__: None)
    Path("matroyshka.txt").touch()  # which tells that it is no measure
    assert main(words[1:]) == 0


def test_the_commands_have_examples() -> None:
    assert len(EXAMPLES) == 18


def test_help_and_errors_import_no_model_code(folder: Path) -> None:
    """Torch and transformers take seconds; arguments and files are checked before."""
    commands = {
        "rerank rankllama --help": "Usage: ",
        "rerank rankllama run.gz --output run.gz": "error: run.gz already exists and is not overwritten",
        "rerank rankllama none.jsonl --output new.txt": "error: RERANK_FILE='none.jsonl': no such file; allowed: a rer",
        "rerank rankllama run.gz --output none/new.txt": "error: --output='none/new.txt': no such folder; allowed",
        "rerank matroyshka run.gz --output new.txt --compress-ratio 3": "error: --compress-ratio=3; allowed: 1, 2",
        "teach none.jsonl new.jsonl": "error: TRAIN_FILE='none.jsonl': no such file",
        "teach texts.jsonl run.gz": "error: run.gz already exists",
    }
    code = f"""import sys
from pyterrier_llmrerank.cli import main
for command in {[*commands]}:
    main(command.split())
    print("----", file=sys.stderr)
print([name for name in ("torch", "transformers", "scipy") if name in sys.modules], file=sys.stderr)"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.startswith("Usage: ")
    *said, imported = ran.stderr.split("----\n")
    for text, wanted in zip(said[1:], [*commands.values()][1:], strict=True):
        assert text.startswith(wanted)
    assert imported == "[]\n"
