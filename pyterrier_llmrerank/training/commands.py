"""The ``train`` commands: the original programs' command lines, on transformers' Trainer.

``train rankllama`` fine-tunes RankLLaMA; ``train distill`` and then ``train compensate`` make a Matroyshka
Re-Ranker. Every option of :class:`transformers.TrainingArguments` is one of theirs too, so that several
devices (``torchrun``), DeepSpeed, FSDP, mixed precision, checkpoints, logging and upload work as they do there.
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

from .data import Groups, open_data
from .recipes import CompensateTraining, DistillTraining, RankLLaMATraining, Recipe, option
from .trainer import resumed_from, train
from .validation import MEASURE, Validation

logger = logging.getLogger(__name__)

RECIPES: dict[str, type[Recipe]] = {
    "rankllama": RankLLaMATraining,
    "distill": DistillTraining,
    "compensate": CompensateTraining,
}

#: Options of the original programs that change nothing here, and why.
WITHOUT_EFFECT = {
    "tokenizer_name": "the tokenizer is the model's own",
    "dataset_proc_num": "texts are tokenised as they are drawn",
    "use_flash_attn": "the fused kernel that fits the device is used",
    "loss_type": "the loss follows from train_method",
    "padding_side": "scores do not depend on padding",
    "layer_wise": "every layer from start_layer on has a head",
    "cache_path": "datasets are cached where HF_DATASETS_CACHE says",
}


#: Two runs of each command, below its --help.
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
    """Defaults are shown, and lines of examples stay lines."""


class TrainerOptions(TrainingArguments):
    """Transformers' own, in a group of their own."""

    _argument_group_name = "transformers' TrainingArguments: output, rates, batches, steps, devices and the rest"


@dataclass(frozen=True)
class Sources:
    """What is trained on."""

    _argument_group_name: typing.ClassVar[str] = "what is trained on"

    model_name_or_path: str = dataclasses.field(
        metadata={
            "help": "a causal language model, or an adapter that is to go on learning: a folder, .gguf file or hub id; "
            "smollm2-135m is the small model that needs no hub"
        }
    )
    train_data: list[str] = option(None, "JSON lines files, folders of them, or a dataset's hub id", "dataset_name")
    dataset_split: str = option("train", "which part of a hub dataset")
    eval_data: list[str] = option(
        None, "data of the same form, on which nDCG@10 is measured; the best checkpoint is kept"
    )
    raw_peft: list[str] = option(None, "adapters merged into the base before, in this order")
    use_lora: bool = option(True, "true is the only value")
    warmup_ratio: float | None = option(None, "share of the steps in which the learning rate rises")
    token: str | None = option(None, "of the Hugging Face hub; HF_TOKEN does the same")
    overwrite_output_dir: bool = option(
        False, "remove an earlier run from output_dir and begin anew; nothing is removed where a run is resumed"
    )
    cache_dir: str | None = option(None, "where hub files are kept; HF_HUB_CACHE does the same")
    # These change nothing, see above, and stay out of the help.
    tokenizer_name: str | None = option(None, argparse.SUPPRESS)
    dataset_proc_num: str | None = option(None, argparse.SUPPRESS)
    use_flash_attn: bool = option(False, argparse.SUPPRESS)
    loss_type: str | None = option(None, argparse.SUPPRESS)
    padding_side: str | None = option(None, argparse.SUPPRESS)
    layer_wise: bool = option(False, argparse.SUPPRESS)
    cache_path: str | None = option(None, argparse.SUPPRESS)


def parse(command: str, argv: Sequence[str]) -> tuple[Recipe, Sources, TrainingArguments]:
    """Read a command line.

    Args:
        command: one of :data:`RECIPES`.
        argv: what follows it.

    Raises:
        ValueError: an option has a value that is not allowed.
        SystemExit: an option is unknown or malformed; argparse has said which.
    """
    recipe_type = RECIPES[command]
    argv = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    trainers = {f.name for f in dataclasses.fields(TrainingArguments)}
    if "activation_checkpointing" in trainers:  # the newer name of gradient_checkpointing
        argv = [re.sub("^--gradient_checkpointing", "--activation_checkpointing", word) for word in argv]
    hints = typing.get_type_hints(recipe_type)
    own = [f for f in dataclasses.fields(recipe_type) if "help" in f.metadata]
    options = dataclasses.make_dataclass(
        "Options",
        [(f.name, _parsed(hints[f.name]), dataclasses.field(metadata=f.metadata, **_default(f.default))) for f in own],
        namespace={"_argument_group_name": "the recipe"},
    )
    prog = f"python -m pyterrier_llmrerank train {command}"
    parser = HfArgumentParser(
        [Sources, options, TrainerOptions],  # type: ignore[list-item]
        prog=prog,
        usage=f"{prog} --model_name_or_path MODEL --train_data FILE ... --output_dir FOLDER [option ...]",
        description=(recipe_type.__doc__ or "").split("\n")[0],
        epilog="examples:\n" + EXAMPLES[command].format(prog=prog),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    shared = {f.name: f.default for f in dataclasses.fields(recipe_type) if f.name in trainers}
    del shared["gradient_checkpointing"]  # the original commands name it
    shared = {name: value for name, value in shared.items() if value is not None}
    parser.set_defaults(**shared)
    given = parser.parse_args(argv)
    if given.warmup_ratio is not None:
        parser.set_defaults(warmup_steps=given.warmup_ratio)
    if given.eval_data:
        every = given.save_steps if given.eval_steps is None else given.eval_steps
        parser.set_defaults(
            eval_strategy="steps", eval_steps=every, metric_for_best_model=f"eval_{MEASURE}", greater_is_better=True
        )
        if given.eval_strategy == "no" and given.save_strategy == "steps" and given.save_steps % every == 0:
            parser.set_defaults(load_best_model_at_end=True)
    sources, chosen, arguments = parser.parse_args_into_dataclasses(args=argv)
    recipe = recipe_type(**vars(chosen), **{name: getattr(arguments, name) for name in shared})
    if not sources.use_lora:
        raise ValueError("use_lora=False; allowed: True. What is trained are LoRA adapters and heads.")
    if not sources.train_data:
        raise ValueError("train_data is missing; wanted JSON lines files, or a dataset's hub id.")
    for name, reason in WITHOUT_EFFECT.items():
        if getattr(sources, name):
            logger.warning("--%s has no effect: %s", name, reason)
    if not sources.eval_data and recipe.patience is not None:
        raise ValueError(f"patience={recipe.patience} needs eval_data to measure nDCG@10 on.")
    return recipe, sources, arguments


def _parsed(hint: Any) -> Any:
    """The type under which an option is parsed: tuples come as lists."""
    return list[typing.get_args(hint)[0]] if typing.get_origin(hint) is tuple else hint  # type: ignore[misc]


def _default(value: Any) -> dict[str, Any]:
    return {"default_factory": lambda: list(value)} if isinstance(value, tuple) else {"default": value}


def main(command: str, argv: Sequence[str]) -> Path:
    """Run a ``train`` command.

    Returns:
        The folder with the trained adapter.

    Raises:
        ValueError, FileNotFoundError: an option, the model or the data is not what is allowed; before training.
        FileExistsError: another run is in ``output_dir``.
        FloatingPointError: as :class:`~pyterrier_llmrerank.training.trainer.GroupTrainer`.
    """
    recipe, sources, arguments = parse(command, argv)
    if arguments.disable_tqdm:  # losses are logged then
        logging.getLogger(__name__.partition(".")[0]).setLevel(logging.INFO)
    resumed_from(arguments, sources.overwrite_output_dir)  # which raises before what takes long
    checkpoint = recipe.open(sources.model_name_or_path, sources.raw_peft or [])
    with arguments.main_process_first(desc="reading the data"):
        records = open_data("train_data", sources.train_data, sources.dataset_split, recipe.loss.needs_teacher)
    validation = None
    if sources.eval_data:
        validation = Validation.of_records(
            open_data("eval_data", sources.eval_data, sources.dataset_split), recipe.body
        )
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    groups = Groups(records, recipe.group_size, seed, recipe.body)
    folder = train(recipe, checkpoint, groups, arguments, validation, sources.overwrite_output_dir)
    if arguments.should_save:  # one process of several
        call = recipe.opening_call(checkpoint, str(folder))
        print(f"\nThe adapter is in {folder}; open it in Python with\n\n    {call}")
    return folder
