"""The ``train`` commands, with the options of the original programs and of transformers' Trainer.

``train rankllama`` fine-tunes RankLLaMA; ``train distill`` and then ``train compensate`` train a Matroyshka reranker.
All options of :class:`transformers.TrainingArguments` are accepted, so that several devices (``torchrun``),
DeepSpeed, FSDP, mixed precision, checkpoints, logging and upload work as in other programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from ..checkpoints.cards import Stated
from ..checkpoints.description import KINDS
from .batches import Groups, draw_seed
from .data import check_scores, open_data
from .matroyshka import CompensateTraining, DistillTraining
from .output_folder import find_resumed
from .rankllama import RankLLaMATraining
from .recipes import Recipe
from .resumed_settings import MAY_CHANGE
from .trainer import train
from .validation import MeasuredArguments, Validation, keep_best, measured_every

logger = logging.getLogger(__name__)

RECIPES: dict[str, type[Recipe]] = {
    "rankllama": RankLLaMATraining,
    "distill": DistillTraining,
    "compensate": CompensateTraining,
}

#: Options of the original programs that have no effect here, each with the reason.
WITHOUT_EFFECT = {
    "tokenizer_name": "the model's own tokenizer is used",
    "dataset_proc_num": "texts are tokenised when they are drawn",
    "use_flash_attn": "the fused kernel that fits the device is used",
    "loss_type": "train_method determines the loss",
    "padding_side": "scores do not depend on padding",
    "layer_wise": "every layer from start_layer has a head",
    "cache_path": "HF_DATASETS_CACHE sets the cache of datasets",
}

#: Two runs of each command, shown below its --help.
EXAMPLES = {
    "rankllama": """\
  {prog} --model_name_or_path meta-llama/Llama-2-7b-hf --train_data train.jsonl --output_dir rankllama --bf16
  {prog} --model_name_or_path rankllama --train_data more.jsonl --output_dir further""",
    "distill": """\
  {prog} --model_name_or_path mistralai/Mistral-7B-v0.1 --train_data train.jsonl --output_dir distilled --bf16
  {prog} --model_name_or_path smollm2-135m --train_data train.jsonl --output_dir small \\
      --train_method distill_fix_layer --eval_data dev.jsonl --eval_steps 50 --patience 3""",
    "compensate": """\
  {prog} --model_name_or_path mistralai/Mistral-7B-v0.1 --raw_peft distilled \\
      --train_data train.jsonl --output_dir layer
  {prog} --model_name_or_path mistralai/Mistral-7B-v0.1 --raw_peft distilled \\
      --train_data train.jsonl --output_dir token2 --finetune_type token --compress_ratios 2""",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of examples."""


class TrainerOptions(MeasuredArguments):
    """Holds transformers' options, in a group of their own."""

    _argument_group_name = "transformers' TrainingArguments: output, rates, batches, steps, devices and the rest"


def _argument(default: Any, help: str, *aliases: str) -> Any:
    """Declare an option of a command; transformers hands the metadata on to argparse."""
    metadata = {"help": help, "aliases": [f"--{alias}" for alias in aliases]}
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Sources:
    """Holds the options for the model, the data and the output folder."""

    _argument_group_name: typing.ClassVar[str] = "model and data"

    model_name_or_path: str = dataclasses.field(
        metadata={
            "help": "causal language model, or adapter to train further: a folder, .gguf file or hub id; "
            "smollm2-135m is the small model that needs no hub"
        }
    )
    train_data: list[str] = _argument(None, "JSON lines files, folders of them, or a dataset's hub id", "dataset_name")
    dataset_split: str = _argument("train", "split of a hub dataset")
    eval_data: list[str] = _argument(
        None, "validation data of the same form, to measure nDCG@10 on; the best weights measured are kept"
    )
    raw_peft: list[str] = _argument(None, "adapters to merge into the base first, in this order")
    use_lora: bool = _argument(True, "only true is allowed")
    warmup_ratio: float | None = _argument(None, "share of the steps in which the learning rate rises")
    license: str | None = _argument(None, "licence of the result, as the hub abbreviates it, for its model card")
    token: str | None = _argument(None, "token of the Hugging Face hub, like HF_TOKEN")
    overwrite_output_dir: bool = _argument(
        False, "remove an earlier run from output_dir first; of a run that is resumed, only later checkpoints"
    )
    cache_dir: str | None = _argument(None, "cache of hub files, like HF_HUB_CACHE")


def parse(command: str, argv: Sequence[str]) -> tuple[Recipe, Sources, TrainingArguments]:
    """Read a command line.

    Args:
        command: a key of :data:`RECIPES`.
        argv: the words after it.

    Raises:
        ValueError: the value of an option is not allowed.
        SystemExit: an option is unknown or malformed; argparse has printed its name.
    """
    recipe_type = RECIPES[command]
    argv = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    if "activation_checkpointing" in _trainers():  # the newer name of gradient_checkpointing
        argv = [re.sub("^--gradient_checkpointing", "--activation_checkpointing", word) for word in argv]
    defaults = {
        f.name: f.default for f in dataclasses.fields(recipe_type) if f.name in _trainers() and f.default is not None
    }
    del defaults["gradient_checkpointing"]  # False, as in the original programs
    parser = _parser(command, recipe_type)
    parser.set_defaults(**defaults, load_best_model_at_end=None)
    _set_defaults_by_others(parser, argv)
    sources, chosen, arguments, ignored = parser.parse_args_into_dataclasses(args=argv)
    recipe = recipe_type(
        **vars(chosen),
        **{name: getattr(arguments, name) for name in (*defaults, "bf16", "eval_steps")},
        arguments=_further_arguments(parser, recipe_type, argv),
    )
    for name, value in vars(ignored).items():
        if value is not None:
            logger.warning("--%s has no effect: %s", name, WITHOUT_EFFECT[name])
    if not sources.use_lora:
        raise ValueError("use_lora=False; allowed: True. Only LoRA adapters and heads are trained.")
    if not sources.train_data:
        raise ValueError("train_data is missing; expected JSON lines files, or a dataset's hub id.")
    keep_best(arguments, recipe.patience, "eval_data", bool(sources.eval_data))
    return recipe, sources, arguments


def _further_arguments(parser: HfArgumentParser, recipe_type: type[Recipe], argv: Sequence[str]) -> dict[str, Any]:
    """Return transformers' options that weights depend on, where a command line sets them and no recipe does."""
    given = parser.parse_args(argv)  # TrainingArguments would change some values
    elsewhere = MAY_CHANGE.difference(["save_strategy", "load_best_model_at_end"])  # these choose the weights to keep
    elsewhere = elsewhere.union(f.name for f in dataclasses.fields(recipe_type))
    values = {f.name: getattr(given, f.name) for f in dataclasses.fields(TrainingArguments) if f.name not in elsewhere}
    return {name: value for name, value in values.items() if value != parser.get_default(name)}


def _trainers() -> set[str]:
    """Return the names of transformers' options."""
    return {f.name for f in dataclasses.fields(TrainingArguments)}


def _parser(command: str, recipe_type: type[Recipe]) -> HfArgumentParser:
    hints = typing.get_type_hints(recipe_type)
    options = dataclasses.make_dataclass(
        "Options",
        [
            (f.name, _parser_type(hints[f.name]), _argument(f.default, f.metadata["help"], *f.metadata["aliases"]))
            for f in dataclasses.fields(recipe_type)
            if f.metadata["shell"] and f.name not in _trainers()
        ],
        namespace={"_argument_group_name": "recipe"},
    )
    prog = f"llmrerank train {command}"
    parser = HfArgumentParser(
        [Sources, options, TrainerOptions],  # type: ignore[list-item]
        prog=prog,
        usage=f"{prog} --model_name_or_path MODEL --train_data FILE ... --output_dir FOLDER [option ...]",
        description=(recipe_type.__doc__ or "").split("\n")[0],
        epilog="examples:\n" + EXAMPLES[command].format(prog=prog),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def _parser_type(hint: Any) -> Any:
    """Return the type for argparse: a list for a tuple; for bool or None, bool, which needs no value."""
    if hint == bool | None:
        return bool
    return list[typing.get_args(hint)[0]] if typing.get_origin(hint) is tuple else hint  # type: ignore[misc]


def _set_defaults_by_others(parser: HfArgumentParser, argv: Sequence[str]) -> None:
    """Set the defaults that depend on other options."""
    given = parser.parse_args(argv)
    if given.warmup_ratio is not None:
        if not 0 <= given.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={given.warmup_ratio}; allowed: a number from 0 to less than 1.")
        parser.set_defaults(warmup_steps=given.warmup_ratio)
    if given.eval_data:
        parser.set_defaults(**measured_every(given.eval_steps, given.save_steps))


def main(command: str, argv: Sequence[str]) -> Path:
    """Run a ``train`` command.

    Args:
        command: a key of :data:`RECIPES`.
        argv: the words after it.

    Returns:
        The folder with the trained adapter.

    Raises:
        ValueError, FileNotFoundError: an option, the model or the data is not allowed; raised before training.
        FileExistsError: ``output_dir`` holds another run or a model.
        FloatingPointError: as :class:`~pyterrier_llmrerank.training.trainer.GroupTrainer`.
    """
    recipe, sources, arguments = parse(command, argv)
    if arguments.disable_tqdm:  # without a progress bar, losses are logged
        logging.getLogger(__name__.partition(".")[0]).setLevel(logging.INFO)
    find_resumed(arguments, sources.overwrite_output_dir)  # raises before the slow steps
    checkpoint = recipe.open(sources.model_name_or_path, sources.raw_peft or [])
    recipe = recipe.following(checkpoint)
    with arguments.main_process_first(desc="reading the data"):
        records = open_data("train_data", sources.train_data, sources.dataset_split, bool(recipe.loss.teacher_settings))
    if recipe.loss.teacher_settings or recipe.loss.needs_full_pass:  # the loss reads teacher scores
        check_scores("train_data", records)
    validation = None
    if sources.eval_data:
        validation = Validation.of_records(
            open_data("eval_data", sources.eval_data, sources.dataset_split), recipe.body
        )
    groups = Groups(records, recipe.group_size, draw_seed(arguments), recipe.body)
    stated = Stated(sources.train_data, sources.eval_data or (), sources.license)
    folder = train(recipe, checkpoint, groups, arguments, validation, sources.overwrite_output_dir, stated)
    if arguments.should_save:  # one process of several
        call = f"{KINDS[checkpoint.kind]}({str(folder)!r})"  # the folder describes itself
        print(f"\nThe adapter is in {folder}; open it in Python with\n\n    {call}")
    return folder
