"""The ``llmrerank`` command: prepare, rerank, convert and evaluate runs, and train rerankers."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from . import __version__
from .cli_options import ERRORS, OptionError, command_options, flag, flags, in_shell, naming, one_line, set_options
from .matroyshka import MatroyshkaReranker
from .options import options_of
from .rankllama import RankLLaMAReranker
from .reranker import LLMReranker
from .runs.evaluation import compare, parse_measure
from .runs.formats import RunRow, best_first, by_query, read_run, rerank_line, run_line
from .runs.sources import judgements, rerank_rows
from .runs.text_files import writing

logger = logging.getLogger(__name__)

Form = Literal["three", "trec"]

#: The commands, in the order in which a user needs them.
COMMANDS = ("prepare", "rerank", "evaluate", "convert", "train", "teach")


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)


def _examples(*lines: str) -> str:
    """Format the examples at the end of a command's help with their line breaks."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


app = typer.Typer(
    cls=_Commands,
    help="Rerank with RankLLaMA and Matroyshka rerankers: prepare, rerank, evaluate and convert runs, or train.",
    epilog=_examples(
        "llmrerank prepare run.txt --topics topics.tsv --texts docs.jsonl.gz --depth 200 --output rerank.jsonl.gz",
        "llmrerank rerank rankllama rerank.jsonl.gz --output reranked.txt",
        "llmrerank evaluate reranked.txt nDCG@10 --qrels qrels.txt --baseline run.txt",
        "llmrerank convert reranked.txt --form trec --output reranked.trec",
    ),
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},  # --base_model is --base-model
    no_args_is_help=False,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
rerank = typer.Typer(
    help="Score a rerank file and write a run.\n\nEach reranker has its own --help.",
    no_args_is_help=False,
)
train = typer.Typer(help="Train a reranker.\n\nEach recipe has its own --help.", no_args_is_help=False)
app.add_typer(rerank, name="rerank")
app.add_typer(train, name="train")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmrerank {__version__}")
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words of the command line; None for the words that this process was started with.

    Returns:
        The exit status: 0; 1 if a file, a value or a model is invalid; 2 if the command itself is malformed; 130 after
        Ctrl-C.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    words = sys.argv[1:] if argv is None else argv
    try:
        return app(args=words, standalone_mode=False) or 0
    except typer.TyperException as error:
        typer.echo(f"error: {error.format_message().rstrip('.')}. See --help.", err=True)
        return error.exit_code
    except OptionError as error:
        typer.echo(f"error: {error.in_shell(words)}", err=True)
        return 1
    except ERRORS as error:
        typer.echo(f"error: {one_line(error)}", err=True)
        return 1


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


# -- arguments shared by several commands


#: Loggers of torchao, which transformers imports if it is installed. They log its missing extras.
IMPORTED = ("torchao", "torch.utils._pytree")


def _set_verbosity(verbose: bool) -> bool:
    """Log this package's warnings or, if verbose, its progress and the warnings of other packages."""
    logging.getLogger(__package__).setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING if verbose else logging.ERROR)
    for name in IMPORTED:
        logging.getLogger(name).setLevel(logging.ERROR)
    return verbose


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run of 3, 4 or 6 columns, optionally .gz.")]
Columns = Annotated[
    str | None,
    typer.Option(
        help="The run's columns, for example qid,docno,rank. Use _ for a column to ignore. By default, their "
        "number decides."
    ),
]
Output = Annotated[Path, typer.Option(help="The file to write, compressed if its name ends in .gz.")]
OutputForm = Annotated[Form, typer.Option(help="Three columns (qid, docno, score) or TREC's six.")]
Tag = Annotated[str, typer.Option(help="The run's name in the TREC form.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show progress and log each step.", callback=_set_verbosity)]


# -- commands


@app.command(
    epilog=_examples(
        "llmrerank prepare run.repllama.psg.dl19.txt --topics msmarco-passage/trec-dl-2019 --texts msmarco-passage \\",
        "    --depth 200 --output rerank_input.repllama.psg.dl19.jsonl",
        "llmrerank prepare bm25.res.gz --topics topics.tsv --texts docs.jsonl.gz --output rerank.jsonl.gz",
    )
)
def prepare(
    run: Run,
    topics: Annotated[
        str,
        typer.Option(
            help="Queries: an ir_datasets id, a PyTerrier dataset or a file. A file has tab-separated columns (qid, "
            "query), TREC <top> elements, whose titles are read, or JSON lines (.jsonl) with qid, query_id, _id or id, "
            "and query or text."
        ),
    ],
    texts: Annotated[
        str,
        typer.Option(
            help="Documents: an ir_datasets id, a PyTerrier dataset or a file. A file has tab-separated columns "
            "(docno, text; docno, title, text; or docno, url, title, text) or JSON lines (.jsonl) with docno, docid, "
            "_id or id, text or contents, and optionally title and url."
        ),
    ],
    output: Output,
    depth: Annotated[int, typer.Option(min=1, help="Number of top documents to keep for each query.")] = 200,
    columns: Columns = None,
    verbose: Verbose = False,
) -> None:
    """Join a run with the texts of its queries and documents.

    Writes a rerank file: JSON lines with query_id, query, docid, text and score, and title and url if available.

    Queries keep the order of the run; the documents of each are sorted by score. An existing output is replaced.
    """
    count = 0
    with naming(flags("topics", "texts", "columns")), writing(output) as lines:
        for row in rerank_rows(run, topics, texts, depth, columns):
            lines.write(rerank_line(row))
            count += 1
    logger.info("%s: %d pairs", output, count)


@app.command(
    epilog=_examples(
        "llmrerank convert run.rankllama.psg.dl19.txt --form trec --output run.rankllama.psg.dl19.trec",
        "llmrerank convert bm25.res.gz --form three --output bm25.txt",
    )
)
def convert(
    run: Run, output: Output, form: OutputForm = "trec", tag: Tag = "llmrerank", columns: Columns = None
) -> None:
    """Convert a run to another form.

    Ranks count from 1 and follow the scores; ties keep their rank or, without ranks, their order.

    If the run has only ranks, scores are the negated ranks. An existing output is replaced.
    """
    if output.exists() and output.samefile(run):
        raise ValueError(f"--output={str(output)!r} is the run itself; choose another file.")
    with naming(flags("columns")), writing(output) as lines:
        for _, rows in by_query(read_run(run, columns)):
            for rank, row in enumerate(best_first(rows), 1):
                lines.write(run_line(row.qid, row.docno, rank, row.score, form, tag))


@app.command(
    epilog=_examples(
        "llmrerank evaluate reranked.trec --qrels msmarco-passage/trec-dl-2019/judged",
        "llmrerank evaluate reranked.trec nDCG@10 'RR(rel=2)@10' --qrels qrels.txt --baseline bm25.res.gz",
        "llmrerank evaluate rankllama.txt matroyshka.txt nDCG@10 AP --qrels qrels.txt --baseline bm25.res.gz \\",
        "    --correction holm",
        "llmrerank evaluate reranked.trec AP --qrels qrels.txt --per-query > values.txt",
    )
)
def evaluate(
    run: Run,
    qrels: Annotated[
        str,
        typer.Option(
            help="Judgements: an ir_datasets id, a PyTerrier dataset or a file in the form of TREC (qid, iteration, "
            "docno, label) or BEIR (qid, docno, label)."
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|MEASURE",
            help="More runs; measures of ir_measures or trec_eval, by default nDCG@10. Write ./AP for a run AP.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A run to compare with. p is from a paired two-sided t-test over queries.")
    ] = None,
    correction: Annotated[
        Literal["holm", "bonferroni"] | None,
        typer.Option(help="Correct p for the number of runs, measure by measure."),
    ] = None,
    columns: Columns = None,
    baseline_columns: Annotated[str | None, typer.Option(help="The baseline's columns, like --columns.")] = None,
    per_query: Annotated[bool, typer.Option("--per-query", help="Also show the values of each query.")] = False,
) -> None:
    """Evaluate runs, and compare them with a baseline.

    Every query with judgements counts; a query missing from a run counts as one without results, with a warning.

    Documents with equal scores keep their rank or, without ranks, their order. trec_eval sorts them by docno.
    """
    runs, measures = _runs_and_measures([str(run), *(more or [])])
    with naming(flags("qrels", "correction", "columns")):
        queries, total = compare(
            measures or [parse_measure("nDCG@10")],
            judgements(qrels),
            {name: read_run(Path(name), columns) for name in runs},
            None if baseline is None else _baseline(baseline, baseline_columns),
            correction,
        )
    if per_query:
        _show(queries)
        typer.echo()
    _show(total)


def _runs_and_measures(words: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Split words into runs and measures; the first word is a run."""
    runs, measures = [words[0]], []
    for word in words[1:]:
        try:
            measures.append(parse_measure(word))
        except ValueError as error:
            if not Path(word).exists():
                raise ValueError(f"{error} There is no run {word!r} either.") from error
            runs.append(word)
    files = [Path(name).resolve() for name in runs]
    if repeated := [name for number, name in enumerate(runs) if files[number] in files[:number]]:
        raise ValueError(f"the run {repeated[0]!r} is named twice; expected it once.")
    return runs, measures


def _baseline(run: Path, columns: str | None) -> Iterator[RunRow]:
    """Read the baseline, with errors that name its own option for columns."""
    with naming({"columns": "--baseline-columns"}):
        yield from read_run(run, columns)


def _show(table: Any) -> None:
    formatters = {name: "{:.2g}".format for name in table if name.startswith("p")}
    typer.echo(table.to_string(index=False, float_format="{:.4f}".format, formatters=formatters))


# -- reranking: options are the constructors' arguments


RerankFile = Annotated[Path, typer.Argument(metavar="RERANK_FILE", help="A rerank file, as written by prepare.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted output, or score rows added to the rerank file. Refused if options that affect "
        "scores changed; <output>.journal records them.",
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Rerank shard I of N, for a job array. Shards have whole queries; their outputs, joined in order, equal "
        "the output for the whole file. Needs a --dtype other than auto.",
    ),
]
Workers = Annotated[
    int, typer.Option(min=1, help="Number of scoring processes, started with Ray. Each uses one GPU, if there are any.")
]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster. By default, Ray starts on this machine.")]


def _rerank_command(name: str, kind: type[LLMReranker], summary: str, *examples: str) -> None:
    def command(
        source: RerankFile,
        output: Output,
        form: OutputForm = "three",
        tag: Tag = name,
        resume: Resume = False,
        shard: Shard = None,
        workers: Workers = 1,
        address: Address = None,
        verbose: Verbose = False,
        **arguments: Any,
    ) -> None:
        from .runs.streaming import rerank_file

        names = flags(*arguments, "form", "resume", "shard", "workers", "address")
        names |= {"source": "RERANK_FILE", "target": "--output"}
        try:
            with naming(names):
                rerank_file(
                    _made(kind, _given(arguments), verbose), source, output,
                    form=form, tag=tag, resume=resume, shard=shard, workers=workers, address=address,
                )  # fmt: skip
        except KeyboardInterrupt as error:
            notes = " ".join(getattr(error, "__notes__", ()))
            typer.echo(f"Interrupted. {in_shell(notes, names, [str(output)])}", err=True)
            raise

    set_options(command, command_options(**{name: kind}))
    help = f"{summary}\n\nOmit an option to use its default."
    rerank.command(name, help=help, epilog=_examples(*examples))(command)


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments whose options are given."""
    return {name: value for name, value in arguments.items() if value not in (None, [], ())}


def _made(kind: type[LLMReranker], given: Mapping[str, Any], verbose: bool = False) -> LLMReranker:
    """Make a reranker from the given options."""
    if "quantization" in given:  # the warnings of torchao matter now
        for name in IMPORTED:
            logging.getLogger(name).setLevel(logging.NOTSET)
    return kind(**given, verbose=verbose)


_rerank_command(
    "rankllama",
    RankLLaMAReranker,
    "Rerank with RankLLaMA (Ma et al., 2023).",
    "llmrerank rerank rankllama rerank.jsonl.gz --output run.rankllama.txt",
    "llmrerank rerank rankllama rerank.jsonl.gz --output run.rankllama.trec.gz --form trec --verbose \\",
    "    --model castorini/rankllama-v1-7b-lora-passage --base-model meta-llama/Llama-2-7b-hf --resume",
    "llmrerank rerank rankllama rerank.jsonl.gz --output small.txt --model smollm2-135m",
)
_rerank_command(
    "matroyshka",
    MatroyshkaReranker,
    "Rerank with a Matroyshka Re-Ranker (Liu et al., 2025).",
    "llmrerank rerank matroyshka rerank.jsonl.gz --output run.txt --adapters compensate/layer/full --cutoff 20",
    "llmrerank rerank matroyshka rerank.jsonl.gz --output run.txt --compress-layers 8 --compress-layers 16 \\",
    "    --compress-ratio 2 --prune 8:50 --prune 16:20",
    "llmrerank rerank matroyshka rerank.jsonl.gz --output small.txt --model smollm2-135m --cutoff 20",
)


# -- teaching: options are the constructors' arguments, too

TEACHERS: dict[str, type[LLMReranker]] = {"rankllama": RankLLaMAReranker, "matroyshka": MatroyshkaReranker}


def _teach(
    source: Annotated[Path, typer.Argument(metavar="TRAIN_FILE", help="JSON lines, optionally .gz.")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The file to write; compressed if it ends in .gz.")],
    reranker: Annotated[Literal["rankllama", "matroyshka"], typer.Option(help="The kind of teacher.")] = "rankllama",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scores that lines have already.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted output.")] = False,
    verbose: Verbose = False,
    **arguments: Any,
) -> None:
    from .training.teacher_scores import join_titles, teach

    given, kind = _given(arguments), TEACHERS[reranker]
    if others := given.keys() - {option.name for option in options_of(kind)}:
        raise ValueError(f"{flag(min(others))} is not an option of --reranker={reranker}.")
    with naming(flags(*arguments, "overwrite", "resume") | {"source": "TRAIN_FILE", "target": "OUTPUT"}):
        teacher = _made(kind, given)
        pipeline = teacher if isinstance(teacher, RankLLaMAReranker) else join_titles() >> teacher
        teach(source, target, pipeline, overwrite=overwrite, resume=resume, verbose=verbose)


def _teach_command() -> None:
    set_options(_teach, command_options(**TEACHERS))
    app.command(
        "teach",
        help="Add a teacher's scores to a training file.\n\nEach line gets pos_scores and neg_scores. Omit an option "
        "to use the reranker's default.",
        epilog=_examples(
            "llmrerank teach train.jsonl taught.jsonl --model smollm2-135m",
            "llmrerank teach train.jsonl taught.jsonl.gz --reranker matroyshka --model smollm2-135m --resume",
        ),
    )(_teach)


_teach_command()


# -- training: the training package parses the options


def _train_command(recipe: str, help: str) -> None:
    def command(context: typer.Context) -> None:
        _set_hub_environment(context.args)
        from .training import commands

        options = (commands.RECIPES[recipe], commands.Sources, commands.TrainerOptions)
        names = {field.name: f"--{field.name}" for each in options for field in dataclasses.fields(each)}
        with naming(names, repeat=False):
            commands.main(recipe, context.args)

    unparsed = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    train.command(recipe, help=help, context_settings=unparsed)(command)


def _set_hub_environment(options: Sequence[str]) -> None:
    """Set the environment variables that the hub's client reads when it is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--token", nargs="?")  # a missing value is an error of the recipe's own parser
    parser.add_argument("--cache-dir", "--cache_dir", nargs="?")
    known, _ = parser.parse_known_args(options)
    for name, value in (("HF_TOKEN", known.token), ("HF_HUB_CACHE", known.cache_dir)):
        if value:
            os.environ[name] = value


_train_command("rankllama", "Fine-tune a RankLLaMA reranker.")
_train_command("distill", "Train a Matroyshka reranker by cascaded self-distillation.")
_train_command("compensate", "Train another Matroyshka adapter, for all depths or one width.")
