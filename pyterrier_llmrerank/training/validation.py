"""Validation of a model in training, by nDCG@10, and the arguments of a run that is validated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import pandas as pd
from ir_measures import nDCG
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .records import Body, read_example

MEASURE = "nDCG@10"

#: Scores ``(query, body, prompt)`` triples.
Score = Callable[[Sequence[tuple[str, str, str | None]]], Sequence[float]]


def no_common_query(results: pd.Series[Any], judgements: pd.Series[Any]) -> str:
    """Return a hint for an error if results and judgements share no qid, with a qid of each; else an empty string."""
    if results.empty or judgements.empty or results.isin(set(judgements)).any():
        return ""
    return f"; no qid is in both: the results have {results.iloc[0]!r}, the judgements {judgements.iloc[0]!r}"


@dataclass(frozen=True)
class Validation:
    """Measures a scoring function on candidates with relevance judgements.

    Args:
        pairs: candidates: columns ``qid``, ``docno``, ``query``, ``body`` (the passage as the model reads it) and
            ``prompt``, None for the recipe's.
        qrels: columns ``qid``, ``docno`` and ``label``. A relevant passage that is not a candidate lowers nDCG; a query
            without candidates is ignored.

    Raises:
        ValueError: no query has both candidates and judgements.
    """

    pairs: pd.DataFrame
    qrels: pd.DataFrame

    def __post_init__(self) -> None:
        own = self.qrels[self.qrels["qid"].isin(set(self.pairs["qid"]))]
        if own.empty:
            qids = no_common_query(self.pairs["qid"], self.qrels["qid"])
            raise ValueError(f"validation: no query has both candidates and judgements{qids}.")
        object.__setattr__(self, "qrels", own)

    def __call__(self, score: Score) -> float:
        """Return the mean nDCG@10 over the queries with candidates and judgements."""
        named = zip(*(self.pairs[name] for name in ("query", "body", "prompt")), strict=True)
        scores = score(list(named))
        run = pd.DataFrame(
            {"query_id": self.pairs["qid"], "doc_id": self.pairs["docno"], "score": [float(s) for s in scores]}
        )
        qrels = self.qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
        return float(ir_measures.calc_aggregate([nDCG @ 10], qrels, run)[nDCG @ 10])

    @classmethod
    def of_records(cls, records: Iterable[Any], body: Body) -> Validation:
        """Make validation data from training records: positives against negatives."""
        pairs: list[tuple[str, str, str, str, str | None]] = []
        qrels: list[tuple[str, str, int]] = []
        for number, record in enumerate(records):
            read = read_example(record, body)
            for docno, passage in enumerate(read.positives + read.negatives):
                pairs.append((str(number), str(docno), read.query, passage, read.prompt))
            qrels += [(str(number), str(docno), 1) for docno in range(len(read.positives))]
        return cls(
            pd.DataFrame(pairs, columns=["qid", "docno", "query", "body", "prompt"], dtype=object),
            pd.DataFrame(qrels, columns=["qid", "docno", "label"]),
        )


def measurements(state: TrainerState) -> dict[int, float]:
    """Return the measured nDCG@10 by step, in the order of measuring."""
    name = f"eval_{MEASURE}"
    return {int(entry["step"]): entry[name] for entry in state.log_history if name in entry}


class MeasuredArguments(TrainingArguments):
    """Holds transformers' arguments, and keeps the best weights at any intervals of saving and measuring.

    ``load_best_model_at_end`` may be None until :func:`keep_best`.
    """

    def __post_init__(self) -> None:
        """Check the arguments as transformers does, except for intervals that differ, which our Trainer allows.

        Raises:
            ValueError: ``eval_on_start`` is set, with which a resumed run would measure a step twice and stop early; or
                ``eval_steps`` is not positive, which transformers would replace or never reach; or as transformers.
        """
        if self.eval_on_start:
            raise ValueError("eval_on_start=True; allowed: False. A run measures after its steps only.")
        steps = self.eval_steps
        if self.eval_strategy == IntervalStrategy.STEPS and steps is not None and not 0 < steps < math.inf:
            raise ValueError(
                f"eval_steps={steps}; allowed: a number above 0. It follows save_steps if it is not given."
            )
        best, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.load_best_model_at_end = best


def measured_every(eval_steps: float | None, save_steps: float) -> dict[str, Any]:
    """Return the settings of a run that measures nDCG@10 after every ``eval_steps``; for None, ``save_steps``."""
    return {
        "eval_strategy": "steps",
        "eval_steps": save_steps if eval_steps is None else eval_steps,
        "metric_for_best_model": f"eval_{MEASURE}",
        "greater_is_better": True,
    }


def keep_best(arguments: TrainingArguments, patience: int | None, data: str, given: bool) -> None:
    """Set ``load_best_model_at_end`` if it is None: a run with validation data keeps its best weights if it saves any.

    Args:
        arguments: the arguments of the run.
        patience: the recipe's.
        data: the name of the validation data, for messages.
        given: whether there are validation data.

    Raises:
        ValueError: there are validation data, but no measurements, or the weights to keep would not be those with the
            highest nDCG@10; or a setting needs validation data, or saved weights, that the run does not have.
    """
    strategy, saves = IntervalStrategy(arguments.eval_strategy), SaveStrategy(arguments.save_strategy)
    keeping = {"patience": patience, "load_best_model_at_end": arguments.load_best_model_at_end}
    if given:
        _check_measurements(arguments, strategy, data)
    else:
        measuring = {
            "eval_strategy": None if strategy == IntervalStrategy.NO else strategy.value,
            "save_strategy": saves.value if saves == SaveStrategy.BEST else None,
        }
        for name in ("eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better"):
            measuring[name] = getattr(arguments, name)
        for name, value in {**keeping, **measuring}.items():
            if value:
                raise ValueError(f"{name}={value!r} needs {data} to measure nDCG@10 on.")
    for name, value in keeping.items():
        if value and saves == SaveStrategy.NO:
            raise ValueError(
                f"{name}={value} needs saved weights, but save_strategy='no' saves none; allowed: 'steps', 'epoch', "
                "'best'."
            )
    if arguments.load_best_model_at_end is None:
        arguments.load_best_model_at_end = given and saves != SaveStrategy.NO


def _check_measurements(arguments: TrainingArguments, strategy: IntervalStrategy, data: str) -> None:
    """Raise ValueError if nothing would be measured on validation data, or anything but the highest nDCG@10 kept."""
    if strategy == IntervalStrategy.NO:
        raise ValueError(f"eval_strategy='no' measures nothing on {data}; allowed: 'steps', 'epoch', or no {data}.")
    metric = arguments.metric_for_best_model
    if metric not in (MEASURE, f"eval_{MEASURE}"):
        raise ValueError(f"metric_for_best_model={metric!r}: nDCG@10 alone is measured; allowed: 'eval_{MEASURE}'.")
    if not arguments.greater_is_better:
        raise ValueError("greater_is_better=False would keep the weights with the lowest nDCG@10; allowed: True.")
    last: float = arguments.max_steps  # of steps or epochs, as far as they are known without the training data
    if strategy == IntervalStrategy.EPOCH:
        last = -1 if last > 0 else arguments.num_train_epochs
    if 0 < last < arguments.eval_delay:
        raise ValueError(
            f"eval_delay={arguments.eval_delay}: the run ends at {last:g}, so nothing is measured on {data}; allowed: "
            f"at most {last:g}."
        )
