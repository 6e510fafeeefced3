"""The base class of all rerankers: scores and ranks the rows of a frame."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import pandas as pd
import pyterrier as pt

from .checkpoints.locate import absolute, shortest
from .engine.cascade import Cascade
from .engine.prefetch import PreparedIds
from .engine.usage import Stopwatch, Usage
from .errors import ScoringError
from .frames import check_columns, check_rows, distinct, row_name, warn_of_ties, with_ranks
from .options import Converted, Option, constructor_signature, with_options
from .scores import RowObserver, Scores
from .value_semantics import ValueSemantics
from .values import as_bool, as_pairs, check_column, check_devices, check_path, check_positive, one_of, optional, refuse

# Torch and transformers take seconds to import; they are imported when weights are needed.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .checkpoints.checkpoint import Checkpoint
    from .engine.inputs import Encoding, Ids, MatroyshkaInputs
    from .engine.scoring import Scorer
    from .engine.shape import Shape
    from .engine.weights import Weights
    from .replicas import Replicas
    from .training.fit import Frames
    from .training.recipes import Recipe

logger = logging.getLogger(__name__)

_LOCK = threading.RLock()  # held while weights are found or usage is added up: threads may share a reranker

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "float8")
ATTENTIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")


def check_model(name: str, value: object) -> str:
    """Check a folder, file or hub id. Return a path as an absolute path, a hub id as it is."""
    return absolute(check_path(name, value))


def recipe_of(*kinds: str) -> Callable[[str, object], Any]:
    """Return a check for a recipe of one of these classes, by their names in the training package, or None."""

    def check(name: str, value: object) -> Any:
        if value is not None:
            from . import training

            if not isinstance(value, tuple(getattr(training, kind) for kind in kinds)):
                refuse(name, value, f"{', '.join(f'{kind}(...)' for kind in kinds)} or None")
        return value

    return check


def _check_dtype(name: str, value: object) -> str:
    dtype = str(value).removeprefix("torch.")
    return dtype if dtype in DTYPES else refuse(name, value, ", ".join(DTYPES))


@with_options
class LLMReranker(ValueSemantics, pt.Estimator):
    """Rerank with a decoder-only language model as a pointwise cross-encoder.

    Subclasses define the input format, the heads and the part of the model that is run. Each constructor argument is
    kept as an attribute of the same name. Weights are opened on first use, and rerankers over the same weights share
    one copy in memory.

    Rerankers made with equal arguments are equal, so experiments share their work. A reranker that is changed later
    (:meth:`set_parameter`, :meth:`fit`, an attribute) equals only itself from then on and keeps its hash, so that it
    can stay a key of a dict. A copy or pickle of it compares by its current values, like a new reranker. (To a dict,
    rerankers that are equal from the start are one key. To keep both, give one another ``batch_size``.)
    """

    schematic: ClassVar[Mapping[str, str]]
    #: The options of the shape, which progress bars show.
    SHAPE: ClassVar[tuple[str, ...]] = ()
    __signature__: ClassVar[inspect.Signature]

    model: Option[str] = Option(check=check_model, help="a folder, file or hub id. Paths are kept absolute.")
    _: KW_ONLY
    text_field: Option[str] = Option(default="text", check=check_column, help="the column with the text.")
    batch_size: Option[int | None] = Option(
        default=None,
        check=optional(check_positive),
        help="pairs per batch; None for as many as fit a token budget.",
    )
    device: Converted[str | Sequence[str] | None, str | tuple[str, ...] | None] = Converted(
        default=None,
        check=check_devices,
        help='for example ``"cuda:1"``; None for CUDA or MPS if available, else the CPU. With several devices, '
        '``["cuda:0", "cuda:1"]``, each holds a copy of the weights and takes some queries at a time, with all their '
        "candidates. They are kept as a tuple. :meth:`fit` trains on the CPU or the first GPU.",
        shell="the device, such as ``cuda:1``; by default, CUDA or MPS if available, else the CPU. With ``--device "
        "cuda:0 --device cuda:1``, each takes some queries at a time.",
    )
    dtype: Option[str] = Option(
        default="auto",
        check=_check_dtype,
        help='the dtype of weights and computation: ``"auto"`` for bfloat16 where the device computes in it natively, '
        'else float32; or ``"float32"``, ``"bfloat16"`` or ``"float16"``.',
    )
    quantization: Option[str | None] = Option(
        default=None,
        check=one_of(*QUANTIZATIONS),
        help='hold the linear projections of the layers in eight bits: ``"int8"`` or ``"float8"``; None for no '
        "quantization. It needs torchao (``pip install 'pyterrier-llmrerank[quantization]'``) and changes scores. "
        "Activations are quantised too where that is fast: to int8 on CUDA with ``torch_compile``, and on a CPU in "
        "fp32; to float8 in bf16 on CUDA of capability 8.9 or higher. Training and merged models are not quantised.",
    )
    torch_compile: Option[bool] = Option(
        default=False,
        check=as_bool,
        help="compile the layers with torch.compile on first use. New batch shapes do not trigger compilation. "
        "On a CPU this needs a C++ compiler. (Its name is not ``compile``: that is a method that pipelines call.)",
    )
    attn_implementation: Option[str | None] = Option(
        default=None,
        check=one_of(*ATTENTIONS),
        help='the attention kernel: ``"sdpa"``, ``"eager"``, ``"flex_attention"`` (compiled on first use, on CUDA and '
        'CPUs), ``"flash_attention_2"`` or ``"flash_attention_3"`` (on CUDA in bf16 or fp16, if their packages are '
        "installed); None for the fastest kernel of torch.",
    )
    verbose: Option[bool] = Option(default=False, check=as_bool, help="show a progress bar.")

    # Without annotations, which would make them options.
    _usage = Usage()
    _usage_parent = cast("LLMReranker | None", None)  # another reranker, which counts this one's usage too
    _usage_level = logging.INFO
    _has_warned = False  # of ties; one warning is enough
    _held = cast("Replicas | None", None)  # the weights in use
    _prepared = cast("PreparedIds | None", None)  # by tokenise()

    def __init_subclass__(cls, **options: Any) -> None:
        """Set the signature, which PyTerrier's ``__new__`` hides from some tools."""
        super().__init_subclass__(**options)
        cls.__signature__ = constructor_signature(cls)

    # -- for subclasses

    @abstractmethod
    def _checkpoint(self) -> partial[Any]:
        """Return a call that opens the checkpoint; equal calls mean equal weights."""

    def _overlay_checkpoint(self) -> partial[Any] | None:
        """Return a call that opens the checkpoint with a token adapter over it; None without a token adapter."""
        return None

    @abstractmethod
    def _shape(self, checkpoint: Checkpoint) -> Shape:
        """Return the part of a checkpoint to run; ValueError if the checkpoint does not allow the arguments."""

    @abstractmethod
    def _inputs(self) -> Encoding | MatroyshkaInputs:
        """Return the encoding of pairs. Equal encodings give equal ids with the same tokenizer."""

    @abstractmethod
    def deepest(self) -> int | None:
        """Return the deepest layer that is run; None for the model's last layer."""

    def _bodies(self, frame: pd.DataFrame) -> list[str]:
        """Return the text of each row as the model reads it."""
        return list(frame[self.text_field])

    def _bare(self, texts: list[str]) -> list[str]:
        """Format bare texts, without a frame, for the model."""
        return texts

    def _columns(self, scores: Scores) -> dict[str, np.ndarray]:
        """Return the columns to add to a frame, except the rank."""
        return {"score": scores.final}

    def _at_cutoffs(self, scores: Scores) -> np.ndarray:
        """Return the scores of pairs without a frame, ``[cutoffs, pairs]``."""
        return scores.final[None]

    def _finish(self, logits: np.ndarray) -> np.ndarray:
        """Turn logits into scores."""
        return logits

    def _check_layerwise(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError for options that need a model whose layers can be run one by one."""
        for name, allowed in (("torch_compile", [False]), ("attn_implementation", [None, "sdpa"])):
            value = getattr(self, name)
            if value not in allowed:
                checkpoint.require_layerwise(name, value, str(allowed[0]))

    # -- frames and pairs

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score and rank the rows of a frame.

        Args:
            inp: a result frame with ``qid``, ``query``, ``docno`` and the text column. Other columns pass through,
                and rows keep their order. Rows with the same query and text are scored once.

        Returns:
            A copy with ``score`` (float64) and ``rank`` (from 0 within each query).

        Raises:
            pyterrier.validate.InputValidationError: a column is missing.
            ValueError: a qid, docno, query or text is missing, or the model does not allow the arguments.
            ScoringError: scoring had to stop; ``scores`` holds the rows scored so far.
            KeyboardInterrupt: Ctrl-C, with ``scores`` as above.
        """
        pt.validate.result_frame(inp, extra_columns=["query", self.text_field], context=self)
        check_rows(inp, self.text_field)
        if len(inp) == 0:
            none = {name: pd.Series(values) for name, values in self._columns(Scores.none()).items()}
            return with_ranks(inp.assign(**none))
        pairs = list(zip(inp["query"], self._bodies(inp), strict=True))
        try:
            scores = self._score(pairs, inp["qid"], lambda row: row_name(inp, row))
        except (ScoringError, KeyboardInterrupt) as error:
            so_far = Scores.of_error(error, len(inp))
            is_scored = ~np.isnan(so_far.logits)
            scored = inp.assign(**self._columns(so_far))[is_scored]
            error.scores = with_ranks(scored, so_far.logits[is_scored])  # type: ignore[union-attr]
            raise
        result = with_ranks(inp.assign(**self._columns(scores)), scores.logits)
        self._has_warned = self._has_warned or warn_of_ties(self, inp["qid"], scores.final, scores.logits)
        return result

    def tokenise(self, inp: pd.DataFrame) -> None:
        """Tokenise a frame ahead of :meth:`transform`; a thread may do so while another frame is scored.

        The token ids are kept for :meth:`transform`, which ignores them if an argument or the model has changed. A
        reranker without weights does nothing. Errors are left to :meth:`transform`, which names the row.

        Args:
            inp: the frame.
        """
        held = self._held
        if held is None:  # transform finds them
            return
        stopwatch = Stopwatch()
        try:
            texts, _ = distinct(list(zip(inp["query"], self._bodies(inp), strict=True)))
            inputs, (_, _, tokenizer) = self._inputs(), held.weights[0].at_depth(0)
            prepared = self._prepared
            if prepared is None or prepared.settings != (held.key, inputs):
                prepared = self._prepared = PreparedIds((held.key, inputs))
            with stopwatch:
                prepared.add(texts, inputs(tokenizer, texts))
        except BaseException as error:  # a panic of the tokenizer is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
        finally:
            self.add_usage(Usage(tokenising_seconds=stopwatch.seconds))

    def _encode(self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """Return the ids of distinct pairs, which :meth:`tokenise` may have prepared."""
        inputs, held, prepared = self._inputs(), self._held, self._prepared
        if prepared is None or held is None or prepared.settings != (held.key, inputs):
            return inputs(tokenizer, pairs)
        return prepared.take(partial(inputs, tokenizer), pairs)

    def compute_score(self, pairs: Iterable[Any]) -> float | np.ndarray:
        """Score pairs without a frame.

        Args:
            pairs: one ``(query, passage)`` pair, or an iterable of pairs: tuples, lists, or the rows of an array
                ``[n, 2]``. A list of two strings is one pair.

        Returns:
            A float for one pair, an array ``[n]`` for several. With several cutoffs, one score for each, from the
            shallowest: ``[cutoffs]`` and ``[cutoffs, n]``.

        Raises:
            ValueError: a value is not a pair of strings.
            ScoringError: as for :meth:`transform`; ``scores`` is an array ``[cutoffs, n]``, NaN for missing scores.
            KeyboardInterrupt: Ctrl-C, with ``scores`` as above.
        """
        texts, is_single = as_pairs(pairs)
        bodies = self._bare([passage for _, passage in texts])
        read = [(query, body) for (query, _), body in zip(texts, bodies, strict=True)]
        try:
            scores = self._at_cutoffs(self._score(read, [None] * len(read), "pairs[{}]".format))
        except (ScoringError, KeyboardInterrupt) as error:
            error.scores = self._at_cutoffs(Scores.of_error(error, len(read)))  # type: ignore[union-attr]
            raise
        if len(scores) == 1:
            return float(scores[0, 0]) if is_single else scores[0]
        return scores[:, 0] if is_single else scores

    def _score(self, pairs: list[tuple[str, str]], qids: Iterable[Hashable], name: Callable[[int], str]) -> Scores:
        """Score pairs; each distinct pair goes through the model once.

        Args:
            pairs: the query and passage of each row.
            qids: the qid of each row; rows with the same qid and query compete.
            name: names a row in errors.
        """
        scorer = self.scorer()
        shape = scorer.shape
        if not pairs:
            return Scores.none()
        texts, pair_of_row = distinct(pairs)
        cascade = None
        if shape.prune:
            queries = list(zip(qids, (query for query, _ in pairs), strict=True))
            cascade = Cascade(dict(shape.prune), queries, pair_of_row, shape.cutoffs[-1])

        def scores_of(logits: np.ndarray) -> Scores:
            return Scores.of_logits(logits[:, pair_of_row], shape.cutoffs, cascade, self._finish)

        with pt.tqdm(total=len(texts), desc=self.label(), unit="pair", disable=not self.verbose) as bar:
            observer = RowObserver(name, pair_of_row, bar)
            try:
                logits = scorer.score(texts, observer, cascade)
            except (ScoringError, KeyboardInterrupt) as error:
                if hasattr(error, "scores"):
                    error.scores = scores_of(error.scores)
                raise
            finally:
                if observer.parts:  # scoring began
                    usage = sum(observer.parts, Usage())
                    self.add_usage(usage)
                    if logger.isEnabledFor(self._usage_level):
                        logger.log(self._usage_level, "%s: %s", repr(self), str(usage))  # a record holds no weights
        return scores_of(logits)

    # -- usage

    @property
    def usage(self) -> Usage:
        """The usage of all calls since the last :meth:`take_usage`. Each call logs its own usage (INFO)."""
        return self._usage

    def add_usage(self, usage: Usage) -> None:
        """Add to :attr:`usage` the usage of work on behalf of this reranker."""
        with _LOCK:
            self._usage += usage
            if self._usage_parent is not None:
                self._usage_parent.add_usage(usage)

    def take_usage(self) -> Usage:
        """Return :attr:`usage`, and start again from zero."""
        with _LOCK:
            usage, self._usage = self._usage, Usage()
        return usage

    def label(self) -> str:
        """Return the name of a progress bar: the class, and the options of the shape that are not the default."""
        shape = [text for text in self._options_shown() if text.partition("=")[0] in self.SHAPE]
        return type(self).__name__ + (f"({', '.join(shape)})" if shape else "")

    def silent_copy(self) -> Self:
        """Return a copy with zero usage and no progress bar, which logs at DEBUG level."""
        silent = copy.copy(self)
        silent._usage = Usage()
        silent.verbose = False
        silent._usage_level = logging.DEBUG
        return silent

    # -- training

    @abstractmethod
    def _recipe(self) -> Recipe:
        """Return the recipe to train by."""

    @abstractmethod
    def _train(self, training: Frames, validation: Frames | None) -> Path:
        """Train, and return the folder of the new adapter."""

    @abstractmethod
    def _switch_to(self, adapter: str) -> None:
        """Score with a newly trained adapter from now on."""

    def fit(
        self,
        topics_or_res_tr: pd.DataFrame,
        qrels_tr: pd.DataFrame,
        topics_or_res_va: pd.DataFrame | None = None,
        qrels_va: pd.DataFrame | None = None,
    ) -> None:
        """Train on results and qrels. In a pipeline, ``(bm25 >> reranker).fit(...)`` trains on BM25's results.

        For each query, the relevant results compete with its other results, judged or not. A query without relevant
        results takes the documents judged relevant from other queries' results or from the recipe's ``text``, or is
        left out; a warning counts these queries. Losses are logged (INFO), or shown in a progress bar if ``verbose``.
        With validation data, nDCG@10 is measured every ``eval_steps``, the best checkpoint is kept, and ``patience``
        stops training early.

        Afterwards the reranker scores with the new adapter. It is in the recipe's ``output_dir``, beside the run's
        checkpoints; by default, alone in a new folder below ``~/.pyterrier/llmrerank/trained``, which stays until you
        delete it. :meth:`save` writes a copy elsewhere. Another fit starts from the new adapter: RankLLaMA continues
        to train it, Matroyshka adds another one. Texts are cut to the lengths in the recipe. A reranker that was
        fitted equals only itself.

        Args:
            topics_or_res_tr: results with texts, in the columns that :meth:`transform` takes. A column ``teacher``, if
                present, holds another model's scores: RankLLaMA learns from them if its recipe sets ``teacher_weight``
                or ``absolute_margin``, a Matroyshka if its ``train_method`` ends in ``_teacher``.
            qrels_tr: columns ``qid``, ``docno`` and ``label``.
            topics_or_res_va: results to validate on; give it together with ``qrels_va``.
            qrels_va: their qrels.

        Raises:
            ValueError: a frame is invalid, or leaves nothing to train on.
            FileExistsError: the recipe's ``output_dir`` is not empty.
            FloatingPointError: the loss is not finite; names the step, learning rate and queries.
        """
        from .training.fit import Frames

        if (topics_or_res_va is None) != (qrels_va is None):
            given, missing = ("topics_or_res_va", "qrels_va")[:: 1 if qrels_va is None else -1]
            raise ValueError(f"{given} is given without {missing}; expected both or neither.")
        for name, results in (("topics_or_res_tr", topics_or_res_tr), ("topics_or_res_va", topics_or_res_va)):
            if results is not None:
                check_columns(name, results, ["qid", "query", "docno", self.text_field])
                check_rows(results, self.text_field)
        validation = None
        if topics_or_res_va is not None and qrels_va is not None:
            validation = Frames(topics_or_res_va, qrels_va, self._bodies, self.text_field)
        if self._held is not None:  # its memory is free for the copy that is trained
            self._held.leave(self)
            self._held = None
        adapter = self._train(Frames(topics_or_res_tr, qrels_tr, self._bodies, self.text_field), validation)
        self._switch_to(absolute(str(adapter)))

    @abstractmethod
    def save(self, folder: str | Path, *, merged: bool = False) -> Any:
        """Write the trained model into a new or empty folder."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        merged: bool = False,
        datasets: Sequence[str] | None = None,
        license: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the trained model, as :meth:`save` writes it, with a model card.

        The repository then opens by its id alone.

        Args:
            repo_id: the repository, ``"owner/name"``, or ``"name"`` for one of your own; created if it does not exist.
            private: whether a new repository is private; None for the hub's default.
            merged: as for :meth:`save`.
            datasets: hub ids or names of the training data, for the card; None keeps the card's.
            license: licence of the model, as the hub abbreviates it, for the card; None keeps the card's.
            token: token of the hub; None for the one that the hub's client is logged in with.

        Returns:
            The URL of the repository.

        Raises:
            ValueError: the base is a folder on this machine, so that the adapter could not be opened elsewhere; or as
                :meth:`save`.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        import tempfile

        from .checkpoints.cards import Stated
        from .checkpoints.uploading import upload

        stated = Stated(datasets or (), license=license)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.save(folder, merged=merged)
            return upload(folder, repo_id, type(self).__name__, stated, private=private, token=token)

    # -- weights: one copy for all rerankers, or one per device

    def scorer(self) -> Scorer:
        """Return the object that scores pairs for this reranker. It opens files only when they are needed.

        As long as this reranker lives, the weights stay in memory, as deep as it needs them.
        """
        from .engine.scoring import Scorer

        return Scorer(self._replicas(), self._shape, self._encode, self.batch_size)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the model's tokenizer, for ``pt.text.sliding(..., tokenizer=...)``; reads no weights.

        Padding, truncation and tokens that are set on it change no scores.

        Raises:
            ValueError: the model is invalid.
            FileNotFoundError: the model does not exist.
            ConnectionError: the hub cannot be reached.
        """
        return self.scorer().checkpoint.public_tokenizer

    def _weights(self) -> Weights:
        """Return the weights on the first device."""
        return self._replicas()[0]

    def _replicas(self) -> tuple[Weights, ...]:
        """Return the weights for each device, shared with all living rerankers that name the same weights."""
        from .engine.devices import resolve_devices, resolve_dtype
        from .replicas import Replicas

        places = resolve_devices(self.device)
        dtype = resolve_dtype(self.dtype, *places)
        openers = [opener for opener in (self._checkpoint(), self._overlay_checkpoint()) if opener is not None]
        named = Replicas(openers, [(place, dtype, self.quantization, self.torch_compile) for place in places])
        with _LOCK:
            if self._held is None or self._held.key != named.key:
                named.join(self, self._held)
                self._held = named
            return self._held.weights

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Return {}: PyTerrier would mistake an empty tuple among the arguments for a list of transformers."""
        return {}

    def _repr_value(self, name: str) -> Any:
        return shortest(self.model) if name == "model" else super()._repr_value(name)
