"""Train a reranker in a pipeline, on the results of the stages before it."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyterrier as pt
import torch
from transformers import TrainingArguments

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.saving import empty_folder
from ..engine.devices import resolve_device, resolve_dtype
from .batches import Groups, draw_seed
from .frames import check_qrels, records_of, validation_of
from .matroyshka import MatroyshkaTraining
from .objectives import named
from .output_folder import adapter_alone
from .recipes import Recipe
from .trainer import train
from .validation import MeasuredArguments, keep_best, measured_every

logger = logging.getLogger(__name__)


class Frames(NamedTuple):
    """Holds results with judgements, as the reranker reads them.

    Args:
        results: results with texts, in the columns that the reranker takes.
        qrels: judgements.
        bodies: formats the passages of a frame as the model reads them.
        text_field: the column with texts.
    """

    results: pd.DataFrame
    qrels: pd.DataFrame
    bodies: Callable[[pd.DataFrame], list[str]]
    text_field: str


def fit(
    recipe: Recipe,
    start: Callable[[], Checkpoint],
    training: Frames,
    validation: Frames | None,
    *,
    device: str | tuple[str, ...] | None,
    dtype: str,
    verbose: bool,
    described: Mapping[str, Any] | None = None,
) -> Path:
    """Train by a recipe on results with judgements.

    Args:
        recipe: the settings. Without an ``output_dir``, the adapter alone is kept, in a new folder of PyTerrier's home;
            with one, the run's checkpoints too.
        start: opens the checkpoint to start from.
        training: the training data. A column ``teacher`` holds another model's scores; they are used if the recipe's
            loss has a teacher.
        validation: data to measure nDCG@10 on; the best checkpoint is kept.
        device: as for a reranker, but a single device.
        dtype: the dtype of frozen weights and of computation, as for a reranker.
        verbose: show a progress bar.
        described: as for :func:`~pyterrier_llmrerank.training.trainer.train`.

    Returns:
        The folder with the trained adapter.

    Raises:
        ValueError: a frame or setting is not allowed.
        FileExistsError: the recipe's ``output_dir`` is not empty, and no run in it is resumed.
        FloatingPointError: as :class:`~pyterrier_llmrerank.training.trainer.GroupTrainer`.
    """
    place = _one_device(device)  # raises before the slow steps
    qrels = check_qrels(training.qrels, "qrels_tr")
    records = records_of(training.results, qrels, training.bodies, recipe.min_label, recipe.text, training.text_field)
    if recipe.loss.teacher_settings and "pos_scores" not in records[0]:
        recipe = _without_teacher(recipe)
    measured = None
    if validation is not None:
        measured = validation_of(validation.results, check_qrels(validation.qrels, "qrels_va"), validation.bodies)
    arguments = _arguments(recipe, place, resolve_dtype(dtype, place), measured is not None, verbose)
    checkpoint = start()
    if not arguments.resume_from_checkpoint:
        empty_folder(Path(str(arguments.output_dir)), "output_dir")
    passages = sum(len(record["pos"]) + len(record["neg"]) for record in records)
    logger.info("Training on %d queries with %d passages; result in %s", len(records), passages, arguments.output_dir)
    groups = Groups(records, recipe.group_size, draw_seed(arguments), as_is)
    if recipe.output_dir is not None:
        return train(recipe, checkpoint, groups, arguments, measured, described=described)
    with adapter_alone(Path(str(arguments.output_dir))):
        return train(recipe, checkpoint, groups, arguments, measured, described=described)


def _one_device(device: str | tuple[str, ...] | None) -> torch.device:
    """Return the device to train on; ValueError unless it is the CPU or the first GPU."""
    if isinstance(device, tuple):
        raise ValueError(
            f"device={device!r}: fit trains on one device; for several: torchrun -m pyterrier_llmrerank train."
        )
    place = resolve_device(device)
    if place.index:  # the Trainer uses the first one
        raise ValueError(f"device={device!r}: fit trains on the first GPU; choose it by CUDA_VISIBLE_DEVICES.")
    return place


def _without_teacher(recipe: Recipe) -> Recipe:
    """Return the recipe that learns from labels alone; ValueError if a setting asks for a teacher."""
    needing = recipe.loss.teacher_settings
    if isinstance(recipe, MatroyshkaTraining) and recipe.train_method == type(recipe).train_method:
        del needing["train_method"]  # the default method is replaced
    if needing or not isinstance(recipe, MatroyshkaTraining):
        raise ValueError(f"{named(needing)}: the results have no column 'teacher', which it needs.")
    method = recipe.train_method.removesuffix("_teacher")
    logger.info("The results have no column 'teacher': train_method=%r learns from their labels.", method)
    return dataclasses.replace(recipe, train_method=method)


def as_is(text: str, title: str | None) -> str:
    """Return a text unchanged: it is formatted already."""
    return text


def _arguments(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, measured: bool, verbose: bool
) -> TrainingArguments:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    settings = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if field.name in names and getattr(recipe, field.name) is not None
    }
    if "activation_checkpointing" in names:  # the newer name of gradient_checkpointing
        settings["activation_checkpointing"] = settings.pop("gradient_checkpointing")
    if recipe.bf16 is None:
        settings |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    settings |= {"use_cpu": device.type == "cpu", "report_to": "none", "disable_tqdm": not verbose}
    settings["save_total_limit"] = 2
    if recipe.output_dir is None:
        run = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
        settings["output_dir"] = str(Path(pt.io.pyterrier_home()) / "llmrerank" / "trained" / run)
    if measured:
        settings |= measured_every(recipe.eval_steps, recipe.save_steps)
    arguments = MeasuredArguments(**{"load_best_model_at_end": None, **settings, **recipe.arguments})
    keep_best(arguments, recipe.patience, "validation results", measured)
    return arguments
