"""What both rerankers share: a frame goes in, the same frame comes out with scores and ranks."""

from __future__ import annotations

import inspect
import logging
import threading
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, ItemsView, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import pyterrier as pt

from .checkpoints.files import located, shown
from .engine.usage import Usage
from .errors import ScoringError, short
from .values import as_list, column, devices, one_of, path_like, positive, problem_of, problem_of_id

# Torch and transformers take seconds to import: that waits until weights are asked for.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .checkpoints.checkpoint import Checkpoint
    from .engine.inputs import Ids
    from .engine.scoring import Shape
    from .engine.weights import Weights
    from .training.fitting import Frames
    from .training.recipes import Recipe

logger = logging.getLogger(__name__)

_LOCK = threading.RLock()  # held while a reranker finds its weights or adds up its usage, so that threads may share it

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "float8")
ATTENTIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")


class Scores(NamedTuple):
    """What came of scoring some rows.

    Args:
        final: the score of each, ``[rows]``; NaN where scoring stopped before.
        by_layer: those at each layer that was read; NaN where a row did not come so far.
        exit_layer: the layer after which each left a cascade; None without one.
        logits: by which they are ranked, ``[rows]``: the final scores before they were normalised.
    """

    final: np.ndarray
    by_layer: Mapping[int, np.ndarray]
    exit_layer: np.ndarray | None
    logits: np.ndarray

    @classmethod
    def none(cls, rows: int = 0) -> Scores:
        """Those of rows of which none has been scored."""
        missing = np.full(rows, np.nan)
        return cls(missing, defaultdict(lambda: missing), np.zeros(rows, dtype=int), missing)

    @classmethod
    def of(cls, error: BaseException, rows: int) -> Scores:
        """Those that stand on what stopped scoring, if it had come to that."""
        scores = getattr(error, "scores", None)
        return scores if isinstance(scores, cls) else cls.none(rows)


class LLMReranker(pt.Estimator):
    """A pointwise cross-encoder on a decoder-only language model, as a PyTerrier transformer.

    Subclasses say how a pair becomes ids, where the heads sit and how much of the model is run. Every
    constructor argument is kept as the attribute of its name. Weights are opened on first use, and
    rerankers over the same ones share a single copy in memory.

    Rerankers that were made with equal arguments are equal, so that experiments share their work. One that is changed
    afterwards (:meth:`set_parameter`, :meth:`fit`, an attribute) equals itself alone from then on, and keeps its hash:
    a dict still finds it, and the keys of a grid stay as many as they were, whatever it sets them to. (Two that are
    equal from the start are one key, as in any dict: give one of them another ``batch_size``, for example.)
    """

    schematic: ClassVar[Mapping[str, str]]

    model: str
    text_field: str
    batch_size: int | None
    device: str | tuple[str, ...] | None
    dtype: str
    quantization: str | None
    torch_compile: bool
    attn_implementation: str | None
    verbose: bool
    training: Recipe | None
    _usage: Usage = Usage()
    _usage_level: int = logging.INFO  # at which each call's is logged
    _has_warned: bool = False  # of ties, which it does once
    _made_with: dict[str, Any] | None = None  # the arguments of one that was changed, as they were before
    _shared_key: Hashable
    _shared_weights: tuple[Weights, ...]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **options: Any) -> None:
        """Say what the constructor takes: PyTerrier's ``__new__``, which takes anything, hides it from some tools."""
        super().__init_subclass__(**options)
        cls.__signature__ = inspect.signature(cls)

    def _set_shared(
        self,
        model: object,
        text_field: str,
        batch_size: int | None,
        device: object,
        dtype: object,
        quantization: str | None,
        torch_compile: bool,
        attn_implementation: str | None,
        verbose: bool,
        training: Recipe | None,
    ) -> None:
        """Check and keep the arguments that every reranker has."""
        self.model = located(path_like("model", model))
        self.text_field = column("text_field", text_field)
        self.batch_size = None if batch_size is None else positive("batch_size", batch_size)
        self.device = devices(device)
        self.dtype = str(dtype).removeprefix("torch.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}.")
        self.quantization = one_of("quantization", quantization, QUANTIZATIONS)
        self.torch_compile = bool(torch_compile)
        self.attn_implementation = one_of("attn_implementation", attn_implementation, ATTENTIONS)
        self.verbose = bool(verbose)
        self.training = training

    # -- what subclasses say

    @abstractmethod
    def _checkpoint(self) -> partial[Any]:
        """What opens the checkpoint that the arguments name; the same call means the same weights."""

    def _overlaid(self) -> partial[Any] | None:
        """What opens the checkpoint with adapters laid over the weights of :meth:`_checkpoint`; None for none."""
        return None

    @abstractmethod
    def _shape(self, checkpoint: Checkpoint) -> Shape:
        """How much of it is run; ValueError where the checkpoint does not allow what the arguments ask."""

    @abstractmethod
    def _encode(self, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """Ids of ``(query, body)`` pairs."""

    @abstractmethod
    def deepest(self) -> int | None:
        """The deepest decoder layer that this reranker runs; None for the model's last."""

    def _bodies(self, inp: pd.DataFrame) -> list[str]:
        """The text of each row as the model reads it."""
        return list(inp[self.text_field])

    def _columns(self, scores: Scores) -> dict[str, np.ndarray]:
        """What is added to a frame, rank apart."""
        return {"score": scores.final}

    def _at_cutoffs(self, scores: Scores) -> np.ndarray:
        """What is given without a frame, ``[cutoffs, pairs]``."""
        return scores.final[None]

    def _finish(self, scores: np.ndarray) -> np.ndarray:
        """What is done to the logits last."""
        return scores

    def _check_layerwise(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError on what only layers that are walked one by one allow."""
        for name, allowed in (("torch_compile", [False]), ("attn_implementation", [None, "sdpa"])):
            value = getattr(self, name)
            if not checkpoint.supports_layerwise and value not in allowed:
                raise ValueError(
                    f"{name}={value!r}: the layers of {checkpoint.argument} (model_type "
                    f"{checkpoint.config.model_type!r}) cannot be walked one by one; allowed: {allowed[0]}."
                )

    # -- the PyTerrier contract

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score and rank every row.

        Args:
            inp: a result frame: ``qid``, ``query``, ``docno`` and the text column. Whatever else it holds
                passes through; rows keep their order. Rows with the same query and text are scored once.

        Returns:
            A copy with ``score`` (float64) and ``rank`` (from 0 within each query).

        Raises:
            pyterrier.validate.InputValidationError: a column is missing.
            ValueError: a qid, docno, query or text is missing, or the model does not allow what was asked.
            ScoringError: scoring had to stop; its ``scores`` are the rows already scored.
            KeyboardInterrupt: Ctrl-C; likewise.
        """
        pt.validate.result_frame(inp, extra_columns=["query", self.text_field], context=self)
        self._check_rows(inp)
        if len(inp) == 0:
            none = {name: pd.Series(values) for name, values in self._columns(Scores.none()).items()}
            return ranked(inp.assign(**none))
        pairs = list(zip(inp["query"], self._bodies(inp), strict=True))
        try:
            scores = self._score(pairs, inp["qid"], lambda row: self._label(inp, row))
        except (ScoringError, KeyboardInterrupt) as error:
            so_far = Scores.of(error, len(inp))
            there = ~np.isnan(so_far.logits)
            scored = inp.assign(**self._columns(so_far))[there]
            error.scores = ranked(scored, so_far.logits[there])  # type: ignore[union-attr]
            raise
        result = ranked(inp.assign(**self._columns(scores)), scores.logits)
        self._has_warned = self._has_warned or warn_of_ties(self, inp["qid"], scores.final, scores.logits)
        return result

    def compute_score(self, pairs: Iterable[Any]) -> float | np.ndarray:
        """Score pairs without a frame.

        Args:
            pairs: one ``(query, passage)`` pair, or an iterable of them: tuples, lists, or the rows of an array
                ``[n, 2]``. Two strings in a list are one pair too.

        Returns:
            A float for one pair, an array ``[n]`` for a list. With several cutoffs, one per cutoff, shallowest
            first, ``[cutoffs]`` and ``[cutoffs, n]``.

        Raises:
            ValueError: something is not a pair of strings.
            ScoringError: as :meth:`transform`; its ``scores`` are an array ``[cutoffs, n]``, NaN where there is none.
            KeyboardInterrupt: likewise.
        """
        pairs = as_list(pairs)
        is_unordered = isinstance(pairs, Set) and not isinstance(pairs, ItemsView)
        if is_unordered or isinstance(pairs, Mapping | pd.DataFrame) or not isinstance(pairs, Iterable):
            raise ValueError(
                f"pairs={short(pairs)} ({type(pairs).__name__}); allowed: a pair of strings, (query, passage), a list "
                "of pairs, or an array with a row for each."
            )
        given = [pairs] if isinstance(pairs, str) else list(pairs)  # a string is no iterable of pairs
        single = len(given) == 2 and all(isinstance(text, str) for text in given)
        checked = []
        for number, pair in enumerate([given] if single else map(as_list, given)):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"pairs[{number}] is {short(pair)}; wanted two strings, (query, passage).")
            for name, text in zip(("query", "passage"), pair, strict=True):
                if problem := problem_of(text):
                    raise ValueError(f"the {name} of pairs[{number}] is {problem}.")
            checked.append((pair[0], self._body(pair[1])))
        try:
            scores = self._at_cutoffs(self._score(checked, [None] * len(checked), "pairs[{}]".format))
        except (ScoringError, KeyboardInterrupt) as error:
            error.scores = self._at_cutoffs(Scores.of(error, len(checked)))  # type: ignore[union-attr]
            raise
        if len(scores) == 1:
            return float(scores[0, 0]) if single else scores[0]
        return scores[:, 0] if single else scores

    def _body(self, passage: str) -> str:
        """A passage that came without a frame."""
        return passage

    def _check_rows(self, inp: pd.DataFrame) -> None:
        """Raise ValueError on what would only show as something obscure, or not at all, further on."""
        if repeated := list(inp.columns[inp.columns.duplicated()]):
            raise ValueError(f"the frame has several columns {repeated[0]!r}; wanted one.")
        for name in ("qid", "docno"):
            if inp[name].isna().any():
                raise ValueError(f"{name} is missing in row {int(inp[name].isna().argmax())} of the frame.")
            for row, value in enumerate(inp[name]):
                if problem := problem_of_id(value):
                    raise ValueError(f"{name} is {problem} in row {row} of the frame.")
        for name in ("query", self.text_field):
            problems = [(row, problem) for row, value in enumerate(inp[name]) if (problem := problem_of(value))]
            if not problems:
                continue
            row, problem = problems[0]
            if isinstance(inp[name].dtype, pd.StringDtype) and pd.isna(inp[name].iloc[row]):  # a None comes out as nan
                problem = problem_of(None)
            more = f" and {len(problems) - 1} more rows" if len(problems) > 1 else ""
            raise ValueError(f"{name!r} is {problem} for {self._label(inp, row)}{more}.")

    @staticmethod
    def _label(inp: pd.DataFrame, row: int) -> str:
        """A row by what its user knows it by."""
        qid, docno = (getattr(value, "item", lambda value=value: value)() for value in inp[["qid", "docno"]].iloc[row])
        return f"qid {qid!r}, docno {docno!r}"

    def _score(self, pairs: list[tuple[str, str]], qids: Iterable[Hashable], label: Callable[[int], str]) -> Scores:
        """Score pairs, of which those of one qid and query compete; each distinct one goes through the model once."""
        from .engine.cascade import Cascade
        from .engine.scoring import score

        replicas = self._replicas()
        shape = self._shape(replicas[0].checkpoint)
        if not pairs:
            return Scores.none()
        at: dict[tuple[str, str], int] = {}
        inverse = np.array([at.setdefault(pair, len(at)) for pair in pairs])
        distinct = list(at)
        cascade = None
        if shape.prune:
            queries = list(zip(qids, (query for query, _ in pairs), strict=True))
            cascade = Cascade(dict(shape.prune), queries, inverse, shape.cutoffs[-1])

        def of_rows(scores: np.ndarray) -> Scores:
            by_layer = dict(zip(shape.cutoffs, scores[:, inverse], strict=True))
            if cascade is None:
                final = by_layer[shape.cutoffs[-1]]
            else:
                final = cascade.ordered(by_layer)
                for layer, here in by_layer.items():  # a row may have left where another with its text went on
                    here[cascade.exit_layer < layer] = np.nan
            finished = {layer: self._finish(here) for layer, here in by_layer.items()}
            return Scores(self._finish(final), finished, None if cascade is None else cascade.exit_layer, final)

        used: list[Usage] = []
        with pt.tqdm(total=len(distinct), desc=type(self).__name__, unit="pair", disable=not self.verbose) as bar:
            try:
                scores = score(
                    replicas,
                    shape,
                    distinct,
                    self._encode,
                    batch_size=self.batch_size,
                    label=lambda index: label(pairs.index(distinct[index])),
                    progress=bar.update,
                    used=used.append,
                    cascade=cascade,
                )
            except (ScoringError, KeyboardInterrupt) as error:
                if hasattr(error, "scores"):
                    error.scores = of_rows(error.scores)
                raise
            finally:
                if used:  # it came as far as that
                    took = sum(used, Usage())
                    self._add_up(took)
                    logger.log(self._usage_level, "%r: %s", self, took)
        return of_rows(scores)

    def _add_up(self, used: Usage) -> None:
        """Take some usage into the sum."""
        with _LOCK:
            self._usage += used

    @property
    def usage(self) -> Usage:
        """What all calls so far took together; one log line (INFO) after each says what that call did."""
        return self._usage

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the model's tokenizer; no weight is read for it. For ``pt.text.sliding(..., tokenizer=...)``.

        Padding, truncation and tokens that are set on it change no scores.

        Raises:
            ValueError: the model is not what is allowed.
            FileNotFoundError: it is not there.
            ConnectionError: it is to come from the hub, which cannot be reached.
        """
        return self._weights().checkpoint.public_tokenizer

    # -- training

    @abstractmethod
    def _recipe(self) -> Recipe:
        """How it is trained: as its arguments say."""

    @abstractmethod
    def _train(self, training: Frames, validation: Frames | None) -> Path:
        """Train, and return the folder of the new adapter."""

    @abstractmethod
    def _take_up(self, adapter: str) -> None:
        """Score with a newly trained adapter from now on."""

    def fit(
        self,
        topics_or_res_tr: pd.DataFrame,
        qrels_tr: pd.DataFrame,
        topics_or_res_va: pd.DataFrame | None = None,
        qrels_va: pd.DataFrame | None = None,
    ) -> None:
        """Train on results with judgements; in a pipeline those of the stages before: ``(bm25 >> reranker).fit(...)``.

        Each query's relevant results compete with its other results, judged or not. A query with no relevant
        result gets what is judged relevant from the other queries' results or from the recipe's ``text``, or
        is left out; one log line counts these. Losses are logged too (INFO), or shown in a progress bar where
        ``verbose``. With validation given, nDCG@10 is measured on it every
        ``eval_steps``, the best checkpoint is kept, and ``patience`` stops early. From then on the re-ranker
        scores with what it learnt, which lies, with its checkpoints, in the recipe's ``output_dir`` (by default a
        new folder in PyTerrier's home); :meth:`save` writes it elsewhere. Fitting again goes on from there: a
        RankLLaMA's adapter learns on, a Matroyshka gets one more. Texts are cut to the lengths that the recipe
        says. A re-ranker that was fit equals none but itself.

        Args:
            topics_or_res_tr: results with texts: the columns that :meth:`transform` takes, and perhaps
                ``teacher``, another model's scores to distil from (Matroyshka).
            qrels_tr: columns ``qid``, ``docno`` and ``label``.
            topics_or_res_va: results to validate on; with ``qrels_va`` or not at all.
            qrels_va: likewise.

        Raises:
            ValueError: a frame is not what is allowed, or leaves nothing to train on.
            FileExistsError: there is something in the recipe's ``output_dir``.
            FloatingPointError: the loss is not finite; names the step, learning rate and queries.
        """
        from .training.fitting import Frames

        if (topics_or_res_va is None) != (qrels_va is None):
            given, missing = ("topics_or_res_va", "qrels_va")[:: 1 if qrels_va is None else -1]
            raise ValueError(f"{given} is given without {missing}; wanted both or neither.")
        for name, results in (("topics_or_res_tr", topics_or_res_tr), ("topics_or_res_va", topics_or_res_va)):
            if results is None:
                continue
            if missing_columns := [c for c in ("qid", "query", "docno", self.text_field) if c not in results.columns]:
                raise ValueError(f"{name} has columns {list(results.columns)}; missing: {', '.join(missing_columns)}.")
            self._check_rows(results)
        validation = None
        if topics_or_res_va is not None and qrels_va is not None:
            validation = Frames(topics_or_res_va, qrels_va, self._bodies, self.text_field)
        if "_shared_weights" in self.__dict__:  # not needed while another copy is trained
            for weights in stacked(self._shared_weights):
                weights.leave(self)
            del self._shared_weights, self._shared_key
        adapter = self._train(Frames(topics_or_res_tr, qrels_tr, self._bodies, self.text_field), validation)
        self._take_up(located(str(adapter)))

    # -- one copy of the weights, or one a device

    def _weights(self) -> Weights:
        """The weights that the arguments name; of several devices those on the first."""
        return self._replicas()[0]

    def _replicas(self) -> tuple[Weights, ...]:
        """The same for each device, shared with every living reranker that names the same."""
        from .checkpoints.files import identity
        from .engine.devices import resolve_devices, resolve_dtype
        from .engine.weights import Weights, shared_weights

        places = resolve_devices(self.device)
        dtype = resolve_dtype(self.dtype, *places)
        openers = [opener for opener in (self._checkpoint(), self._overlaid()) if opener is not None]
        files = [(opener.func, identity(opener.args)) for opener in openers]
        options = [(place, dtype, self.quantization, self.torch_compile) for place in places]
        key = tuple((*named, *of_place) for of_place in options for named in files)
        with _LOCK:
            if self.__dict__.get("_shared_key") != key:
                replicas = []
                for of_place in options:
                    weights: Weights | None = None
                    for named, opener in zip(files, openers, strict=True):
                        weights = shared_weights(
                            (*named, *of_place), partial(Weights, opener, *of_place, below=weights)
                        )
                    assert weights is not None
                    replicas.append(weights)
                kept = stacked(replicas)
                for joined in kept:  # first, so that what is still needed is not dropped
                    joined.join(self)
                for left in stacked(self.__dict__.get("_shared_weights", ())):
                    if left not in kept:
                        left.leave(self)
                self._shared_key, self._shared_weights = key, tuple(replicas)
            return self._shared_weights

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    # -- a value: equal, hashable and printed by its arguments

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in list(inspect.signature(type(self).__init__).parameters)[1:]}

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """None: PyTerrier would take an empty tuple among the arguments for a list of them."""
        return {}

    def set_parameter(self, name: str, value: Any) -> None:
        """Change a constructor argument, as ``pt.GridScan`` does; it is checked as if given to the constructor.

        Args:
            name: of the argument.
            value: what it is to be.

        Raises:
            ValueError: no such argument, or not a value for it.
        """
        arguments = self._arguments()
        if name not in arguments:
            raise ValueError(f"no argument {name!r}; allowed: {', '.join(arguments)}.")
        changed = type(self)(**{**arguments, name: value})
        for argument, before in arguments.items():
            if (after := getattr(changed, argument)) != before:
                setattr(self, argument, after)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._made_with is None and name in self.__dict__ and not name.startswith("_"):
            with suppress(AttributeError):  # a constructor that sets something twice has not made it yet
                self._made_with = self._arguments()
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, LLMReranker) or type(self) is not type(other):
            return False
        return self._made_with is other._made_with is None and self._arguments() == other._arguments()

    def __hash__(self) -> int:
        return hash((type(self), *(self._made_with or self._arguments()).values()))

    def __repr__(self) -> str:
        parameters = list(inspect.signature(type(self).__init__).parameters.values())[1:]
        changed = [p.name for p in parameters[1:] if getattr(self, p.name) != p.default]
        given = [repr(shown(self.model)), *(f"{name}={self._shown(name)!r}" for name in changed)]
        return f"{type(self).__name__}({', '.join(given)})"

    def _shown(self, name: str) -> Any:
        """An argument's value as it is printed."""
        return getattr(self, name)


def stacked(replicas: Iterable[Weights]) -> list[Weights]:
    """Weights of several devices, with all that they are laid over."""
    return [weights for replica in replicas for weights in replica.stack]


def ranked(scored: pd.DataFrame, logits: np.ndarray | None = None) -> pd.DataFrame:
    """A copy of a frame with PyTerrier's ranks added, whatever its index is called and holds.

    Args:
        scored: the frame, with ``score``.
        logits: by which it is ranked, ``[rows]``; None for the score.
    """
    numbered = scored.reset_index(drop=True)  # an index named qid would hide the column
    if logits is not None:
        numbered["score"] = logits
    numbered = pt.model.add_ranks(numbered)
    order = numbered.index.to_numpy()
    numbered["score"] = scored["score"].to_numpy()[order]
    numbered.index = scored.index.take(order)
    return numbered


def warn_of_ties(scored_by: object, qids: pd.Series[Any], scores: np.ndarray, logits: np.ndarray) -> bool:
    """Warn where an evaluator cannot tell apart what differs before it is normalised.

    Args:
        scored_by: named in the warning.
        qids: of each row, ``[rows]``.
        scores: finished, ``[rows]``.
        logits: what was finished, ``[rows]``.

    Returns:
        Whether there was something to warn of.
    """
    if scores is logits:
        return False
    query = pd.factorize(qids)[0]
    order = np.lexsort((logits, query))
    single = scores[order].astype(np.float32)
    same_score, same_logit, same_query = (column[1:] == column[:-1] for column in (single, logits[order], query[order]))
    count = int((same_query & same_score & ~same_logit).sum())
    if count:
        logger.warning(
            "%r: normalize=True makes %d scores the same as another one of their query in single precision, in which "
            "trec_eval compares them, though their logits differ. Ranks follow the logits; for measures by score use "
            "normalize=False.", scored_by, count,
        )  # fmt: skip
    return bool(count)
