"""The command line: from a run to a reranked run and its evaluation, and training."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .errors import ScoringError
from .matroyshka import MatroyshkaReranker
from .rankllama import RankLLaMAReranker
from .reranker import LLMReranker
from .runs.evaluation import compare, parse_measure
from .runs.formats import best_first, by_query, read_run, rerank_line, run_line, writing
from .runs.sources import judgements, rerank_rows

logger = logging.getLogger(__name__)

Form = Literal["three", "trec"]

#: What users cause, and what becomes one line.
ERRORS = (ValueError, OSError, ImportError, ScoringError, FloatingPointError)


def _examples(*lines: str) -> str:
    """Below a command's options, each line as it is."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


app = typer.Typer(
    help="Rerank with RankLLaMA and Matroyshka: from a run to a reranked run and its evaluation, and training.",
    epilog=_examples(
        "llmrerank prepare run.txt --topics topics.tsv --texts docs.jsonl.gz --depth 200 --output rerank.jsonl.gz",
        "llmrerank rerank rankllama rerank.jsonl.gz --output reranked.txt",
        "llmrerank convert reranked.txt --form trec --output reranked.trec",
        "llmrerank evaluate reranked.trec nDCG@10 --qrels qrels.txt --baseline run.txt",
    ),
    no_args_is_help=False,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
rerank = typer.Typer(
    help="Score a rerank file and write a run.\n\nEach re-ranker has a --help of its own.",
    no_args_is_help=False,
)
train = typer.Typer(help="Train a re-ranker.\n\nEach recipe has a --help of its own.", no_args_is_help=False)
app.add_typer(rerank, name="rerank")
app.add_typer(train, name="train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words; None for the process's own.

    Returns:
        The exit status: 0; 1 where a file, an argument's value or a model is not what is allowed; 2 where the
        command itself is malformed; 130 after Ctrl-C.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        return app(args=argv, standalone_mode=False) or 0
    except typer.TyperException as error:
        typer.echo(f"error: {error.format_message().rstrip('.')}. See --help.", err=True)
        return error.exit_code
    except (*ERRORS, _OptionError) as error:
        typer.echo(f"error: {_in_a_line(error)}", err=True)
        return 1


class _OptionError(Exception):
    """An error of which the message calls arguments by their options' names."""

    def __init__(self, error: Exception, arguments: Iterable[str]) -> None:
        options = {name: name.replace("_", "-") for name in arguments} | {"target": "output"}
        named = rf"(?<![\w/'\"-])({'|'.join(options)})="
        super().__init__(re.sub(named, lambda name: f"--{options[name[1]]}=", _in_a_line(error)))


def _in_a_line(error: BaseException) -> str:
    parts = (str(error) or type(error).__name__, *getattr(error, "__notes__", ()))
    return " ".join(" ".join(parts).split())


# -- arguments that several commands have


def _set_verbosity(verbose: bool) -> bool:
    """Our warnings, or what is done and others' warnings, too."""
    logging.getLogger(__package__).setLevel(logging.INFO if verbose else logging.WARNING)
    for name in ("", "torchao", "torch.utils._pytree"):  # the last two say when they are imported what they have not
        logging.getLogger(name).setLevel(logging.WARNING if verbose else logging.ERROR)
    return verbose


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run of 3, 4 or 6 columns, also .gz.")]
Columns = Annotated[
    str | None,
    typer.Option(
        help="The run's columns, if ranks and scores could be mistaken: qid,docno,rank; _ is a column that is not read."
    ),
]
Output = Annotated[Path, typer.Option(help="The file to write; compressed where its name ends in .gz.")]
OutputForm = Annotated[Form, typer.Option(help="Tevatron's three columns (qid, docno, score), or TREC's six.")]
Tag = Annotated[str, typer.Option(help="The run's name, in TREC's form.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show progress, and say what is done.", callback=_set_verbosity)
]


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
            help="Queries: an ir_datasets id, a PyTerrier dataset, or a file: qid, tab, query; TREC's <top> elements, "
            "of which the title is read; or JSON lines (.jsonl) with qid, query_id, _id or id, and query or text."
        ),
    ],
    texts: Annotated[
        str,
        typer.Option(
            help="Documents: an ir_datasets id, a PyTerrier dataset, or a file: columns parted by tabs: docno, text; "
            "docno, title, text; or docno, url, title, text; or JSON lines with docno, docid, _id or id, text or "
            "contents, perhaps title and url."
        ),
    ],
    output: Output,
    depth: Annotated[int, typer.Option(min=1, help="Documents of each query, from the best.")] = 200,
    columns: Columns = None,
    verbose: Verbose = False,
) -> None:
    """Join a run with queries and texts.

    What is written, over an output that is there, is a rerank file: JSON lines with query_id, query, docid, text and
    score, and title and url where there are some; queries as in the run, each from its best document.
    """
    count = 0
    with writing(output) as lines:
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
    """Write a run in another form, over an output that is there.

    Ranks count from 1, by score; equal ones by the rank that they had, or as they came.

    Of a run that has ranks alone, the scores are minus its ranks.
    """
    if output.exists() and output.samefile(run):
        raise ValueError(f"--output={str(output)!r} is the run itself; wanted another name.")
    with writing(output) as lines:
        for _, rows in by_query(read_run(run, columns)):
            for rank, row in enumerate(best_first(rows), 1):
                lines.write(run_line(row.qid, row.docno, rank, row.score, form, tag))


@app.command(
    epilog=_examples(
        "llmrerank evaluate reranked.trec --qrels msmarco-passage/trec-dl-2019/judged",
        "llmrerank evaluate reranked.trec nDCG@10 'RR(rel=2)@10' --qrels qrels.txt --baseline bm25.res.gz",
        "llmrerank evaluate reranked.trec AP --qrels qrels.txt --per-query > values.txt",
    )
)
def evaluate(
    run: Run,
    qrels: Annotated[
        str,
        typer.Option(
            help="Judgements: an ir_datasets id, a PyTerrier dataset, or a file in TREC's form (qid, iteration, docno, "
            "label) or BEIR's (qid, docno, label)."
        ),
    ],
    measures: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MEASURE]...", help="Of ir_measures or trec_eval; nDCG@10 if none is named."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A second run; p is a paired two-sided t-test's over the judged queries.")
    ] = None,
    columns: Columns = None,
    baseline_columns: Annotated[str | None, typer.Option(help="The baseline's columns.")] = None,
    per_query: Annotated[bool, typer.Option("--per-query", help="A line for each query, before those of all.")] = False,
) -> None:
    """Measure a run, or two.

    All queries with judgements count; one that a run lacks, as one for which nothing was found.

    A warning says how many those are; where it has none of them, that is an error.

    Documents of equal score stand by rank, or as they do in the file; trec_eval orders them by docno.
    """
    parsed = [parse_measure(name) for name in measures or ["nDCG@10"]]
    second = None if baseline is None else read_run(baseline, baseline_columns)
    queries, total = compare(parsed, judgements(qrels), read_run(run, columns), second)
    if per_query:
        _show(queries)
        typer.echo()
    _show(total)


def _show(table: Any) -> None:
    typer.echo(table.to_string(index=False, float_format="{:.4f}".format, formatters={"p": "{:.2g}".format}))


# -- reranking: options are the constructors' arguments


def _said(kind: type[LLMReranker]) -> dict[str, str]:
    """The first sentence that the docstring says of each argument."""
    _, _, arguments = (inspect.getdoc(kind) or "").partition("\nArgs:\n")
    arguments = re.split(r"^\S", arguments, maxsplit=1, flags=re.M)[0]
    found = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \S|\Z)", arguments, re.M | re.S)
    sentences = {names: re.split(r"(?<=\.) ", " ".join(text.split()))[0] for names, text in found}
    plain = {names: said.replace("``", "") for names, said in sentences.items()}
    return {name: said[0].upper() + said[1:] for names, said in plain.items() for name in names.split(", ")}


#: Arguments that are no options: a rerank file has one text, and training is another command.
_NO_OPTIONS = ("self", "text_field", "training", "verbose")


def _pair(key: Callable[[str], Any], value: Callable[[str], Any]) -> Callable[[str], tuple[Any, Any]]:
    """What reads ``8:50``."""

    def parse(word: str) -> tuple[Any, Any]:
        first, colon, second = word.partition(":")
        if not colon:
            raise typer.BadParameter(f"{word!r} has no colon")
        return key(first), value(second)

    return parse


def _option(parameter: inspect.Parameter, hint: Any, said: str) -> inspect.Parameter:
    """A constructor's argument as an option; what may be several is given once for each."""
    kinds = typing.get_args(hint) or (hint,)
    origins = {typing.get_origin(kind): typing.get_args(kind) for kind in kinds}
    annotation: Any
    if mapping := origins.get(Mapping):
        metavar = ":".join(kind.__name__ for kind in mapping).upper()
        info = typer.Option(help=f"{said} May be repeated.", metavar=metavar, parser=_pair(*mapping))
        annotation, default = Annotated[list[Any] | None, info], None
    elif element := origins.get(Sequence):
        info = typer.Option(help=f"{said} May be repeated.")
        annotation, default = Annotated[list[element[0]] | None, info], None  # type: ignore[valid-type]
    else:
        # Named in full: of a bool, typer would make two options.
        info = typer.Option(f"--{parameter.name.replace('_', '-')}", help=said)
        annotation, default = Annotated[hint, info], parameter.default
    return inspect.Parameter(parameter.name, parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _options(kind: type[LLMReranker]) -> list[inspect.Parameter]:
    """The options of a re-ranker."""
    known = vars(sys.modules[kind.__module__])
    said = _said(RankLLaMAReranker) | {k: v for k, v in _said(kind).items() if not v.startswith("As for")}
    return [
        _option(parameter, eval(parameter.annotation, known), said[name])
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in _NO_OPTIONS
    ]


def _with_options(command: Callable[..., None], options: list[inspect.Parameter]) -> None:
    """Give a command options in place of its ``**arguments``."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own] + options
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _rerank_command(name: str, kind: type[LLMReranker], *examples: str) -> None:
    def command(
        source: Annotated[Path, typer.Argument(metavar="RERANK_FILE", help="JSON lines, as prepare writes; also .gz.")],
        output: Output,
        form: OutputForm = "three",
        tag: Tag = name,
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on with an output that was interrupted, or whose source has grown.")
        ] = False,
        workers: Annotated[
            int, typer.Option(min=1, help="Processes that score, on Ray; a GPU each where there are some.")
        ] = 1,
        address: Annotated[str | None, typer.Option(help="A Ray cluster's; else Ray starts on this machine.")] = None,
        verbose: Verbose = False,
        **arguments: Any,
    ) -> None:
        from .runs.streaming import rerank_file

        given = {key: value for key, value in arguments.items() if value not in (None, [], ())}
        try:
            rerank_file(
                kind(**given, verbose=verbose), source, output,
                form=form, tag=tag, resume=resume, workers=workers, address=address,
            )  # fmt: skip
        except KeyboardInterrupt as error:
            typer.echo(f"interrupted. {' '.join(getattr(error, '__notes__', ()))}", err=True)
            raise
        except ERRORS as error:
            raise _OptionError(error, [*arguments, "form", "workers"]) from error

    _with_options(command, _options(kind))
    summary = (kind.__doc__ or "").split("\n")[0]
    help = f"{summary}\n\nWhere None is spoken of, leave the option out."
    rerank.command(name, help=help, epilog=_examples(*examples))(command)


_rerank_command(
    "rankllama",
    RankLLaMAReranker,
    "llmrerank rerank rankllama rerank.jsonl.gz --output run.rankllama.txt",
    "llmrerank rerank rankllama rerank.jsonl.gz --output run.rankllama.trec.gz --form trec --verbose \\",
    "    --model castorini/rankllama-v1-7b-lora-passage --base-model meta-llama/Llama-2-7b-hf --resume",
    "llmrerank rerank rankllama rerank.jsonl.gz --output small.txt --model smollm2-135m",
)
_rerank_command(
    "matroyshka",
    MatroyshkaReranker,
    "llmrerank rerank matroyshka rerank.jsonl.gz --output run.txt --adapters compensate/layer/full --cutoff 20",
    "llmrerank rerank matroyshka rerank.jsonl.gz --output run.txt --compress-layers 8 --compress-layers 16 \\",
    "    --compress-ratio 2 --prune 8:50 --prune 16:20",
    "llmrerank rerank matroyshka rerank.jsonl.gz --output small.txt --model smollm2-135m --cutoff 20",
)


# -- teaching: options are the constructors' arguments, as in reranking

TEACHERS: dict[str, type[LLMReranker]] = {"rankllama": RankLLaMAReranker, "matroyshka": MatroyshkaReranker}


def _teach(
    source: Annotated[Path, typer.Argument(metavar="TRAIN_FILE", help="JSON lines for training; also .gz.")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The file to write; compressed if it ends in .gz.")],
    reranker: Annotated[Literal["rankllama", "matroyshka"], typer.Option(help="The teacher.")] = "rankllama",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scores that lines have already.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted output.")] = False,
    verbose: Verbose = False,
    **arguments: Any,
) -> None:
    from .training.teaching import join_titles, teach

    given = {name: value for name, value in arguments.items() if value not in (None, [], ())}
    kind = TEACHERS[reranker]
    if others := given.keys() - inspect.signature(kind.__init__).parameters.keys():
        raise ValueError(f"--{min(others).replace('_', '-')} is no option of --reranker={reranker}.")
    teacher = kind(**given)
    pipeline = teacher if isinstance(teacher, RankLLaMAReranker) else join_titles() >> teacher
    teach(source, target, pipeline, overwrite=overwrite, resume=resume, verbose=verbose)


def _teach_command() -> None:
    known = {p.name: p.replace(default=None) for kind in reversed(TEACHERS.values()) for p in _options(kind)}
    _with_options(_teach, list(known.values()))
    app.command(
        "teach",
        help="Add a teacher's scores, pos_scores and neg_scores, to each line of a training file.\n\n"
        "Omit an option to use the reranker's default.",
        epilog=_examples(
            "llmrerank teach train.jsonl taught.jsonl --model smollm2-135m",
            "llmrerank teach train.jsonl taught.jsonl.gz --reranker matroyshka --model smollm2-135m --resume",
        ),
    )(_teach)


_teach_command()


# -- training: everything after the recipe is transformers' HfArgumentParser's


def _train_command(recipe: str, help: str) -> None:
    def command(context: typer.Context) -> None:
        # transformers takes options with dashes too; here they have one spelling.
        options = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), o) for o in context.args]
        _hub_settings(options)
        try:
            from .training import commands
        except ImportError as error:
            message = f"training needs more packages (pip install 'pyterrier-llmrerank[train]'): {error}"
            raise ImportError(message) from error
        commands.main(recipe, options)

    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    train.command(recipe, help=help, context_settings=passed_on)(command)


def _hub_settings(options: Sequence[str]) -> None:
    """Hand on what the hub's client reads from the environment, when it is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--token")
    parser.add_argument("--cache_dir")
    known, _ = parser.parse_known_args(options)
    for name, value in (("HF_TOKEN", known.token), ("HF_HUB_CACHE", known.cache_dir)):
        if value:
            os.environ[name] = value


_train_command("rankllama", "Fine-tune RankLLaMA.")
_train_command("distill", "Make a Matroyshka Re-Ranker, by cascaded self-distillation.")
_train_command("compensate", "Train one more adapter for a Matroyshka Re-Ranker of some depth or width.")
