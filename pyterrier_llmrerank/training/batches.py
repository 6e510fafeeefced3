"""Groups drawn from training data, and batches of them as the model takes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.inputs import Ids
from ..engine.packing import PackedPairs
from .records import Body, Group, read_example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

#: Encodes pairs of query and passage.
Inputs = Callable[["PreTrainedTokenizerBase", Sequence[tuple[str, str]]], list[Ids]]


def draw_seed(arguments: TrainingArguments) -> int:
    """Return the seed for drawing groups."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


class Groups(torch.utils.data.Dataset[Group]):
    """Draws a group for each record, and a new one in each epoch.

    The draw depends on seed, epoch and index of the record alone. It is the same in every process and worker, and in a
    resumed run.

    Args:
        records: rows for :func:`~pyterrier_llmrerank.training.records.read_example`.
        size: passages in a group.
        seed: the seed for drawing groups.
        body: formats the passages.
    """

    def __init__(self, records: Any, size: int, seed: int, body: Body) -> None:
        self.records = records
        self.body = body
        self.size = size
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call] # workers may outlive an epoch

    @property
    def epoch(self) -> int:
        """The epoch to draw, from 0, in this process and its workers."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Group:
        generator = random.Random(f"{self.seed}/{self.epoch}/{index}")  # unlike a tuple's hash, equal in all processes
        record = self.records[index]
        name = str(record.get("query_id") or f"line {index + 1}")
        return read_example(record, self.body).draw(self.size, generator, name)


@dataclass(frozen=True)
class Batch:
    """Holds encoded groups.

    Args:
        packed: the passages of all groups, ``groups * size`` pairs.
        teacher: the teacher's scores, ``[groups, size]``; None if a group has none.
        size: passages in a group.
        names: the groups' names.
    """

    packed: PackedPairs
    teacher: Tensor | None
    size: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Collator:
    """Encodes groups as a batch.

    Args:
        tokenizer: the model's tokenizer.
        inputs: returns the encoding for a prompt, which is None for a group without its own.
    """

    tokenizer: PreTrainedTokenizerBase
    inputs: Callable[[str | None], Inputs]

    def __call__(self, groups: Iterable[Group]) -> Batch:
        """Encode and pack the passages, and stack the teacher's scores."""
        groups = list(groups)
        rows = [
            ids
            for group in groups
            for ids in self.inputs(group.prompt)(self.tokenizer, [(group.query, text) for text in group.passages])
        ]
        scores = [group.teacher for group in groups if group.teacher is not None]
        return Batch(
            PackedPairs(rows),
            torch.tensor(scores) if len(scores) == len(groups) else None,
            len(groups[0].passages),
            tuple(group.name for group in groups),
        )
