"""Matroyshka rerankers: one language model, trained to be cut off at any depth and compressed to any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, replace
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import pyterrier as pt

from . import shapes
from .checkpoints import bundled
from .checkpoints.description import Description
from .checkpoints.locate import absolute, is_hub_id, require, shortest
from .checkpoints.matroyshka_parts import Assembly, token_adapter_for
from .engine.inputs import PROMPT, MatroyshkaInputs
from .features import PAPER, AtDepth, MatroyshkaFeatures
from .frames import sigmoid
from .options import Converted, Option, with_options
from .reranker import LLMReranker, check_model, recipe_of
from .scores import Scores
from .shapes import MatroyshkaShape
from .values import (
    as_bool,
    check_folders,
    check_folders_by_ratio,
    check_layers,
    check_positive,
    check_string,
    one_of,
    optional,
)

if TYPE_CHECKING:
    from .checkpoints.checkpoint import Checkpoint
    from .checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
    from .engine.shape import Shape
    from .training.fit import Frames
    from .training.matroyshka import MatroyshkaTraining


@with_options
class MatroyshkaReranker(LLMReranker):
    r"""Rerank with a Matroyshka Re-Ranker (Liu et al., 2025: Fitting Into Any Shape).

    The input is ``<s> A: {query}\n B: {passage}\n {prompt}``. The head of the cutoff layer scores the hidden state of
    its last token.

    Raises:
        ValueError: an argument is not allowed, or a local checkpoint does not allow it.
        FileNotFoundError: a local checkpoint does not exist. Models on the hub are looked up on first use.
        ImportError: a package that an option needs is not installed.

    >>> from pyterrier_llmrerank import MatroyshkaReranker
    >>> deep = MatroyshkaReranker()
    >>> deep.at(cutoff=16, compress_layers=[8], compress_ratio=2)
    MatroyshkaReranker('BAAI/Matroyshka-ReRanker-passage', cutoff=16, compress_layers=(8,), compress_ratio=2)
    """

    schematic: ClassVar = {"label": "Matroyshka", "help_url": PAPER}
    SHAPE: ClassVar = ("cutoff", "compress_layers", "compress_ratio", "prune")

    model: Option[str] = Option(
        default="BAAI/Matroyshka-ReRanker-passage",
        check=check_model,
        help="a layer-wise checkpoint (``cost_wise_*``), a causal language model with ``adapters`` and "
        "``start_layer``, or ``smollm2-135m``, the small model that comes with this package. It is a folder, "
        '``.gguf`` file or hub id, which may include a revision (``"owner/name@v1"``); paths are kept absolute. '
        "``smollm2-135m`` is SmolLM2-135M-Instruct with the package's adapter.",
    )
    _: KW_ONLY
    adapters: Converted[str | Sequence[str], tuple[str, ...]] = Converted(
        default=(),
        check=check_folders,
        help="LoRA folders, merged in the order given. Each is a path, a folder below the model's own "
        '(``"compensate/layer/full"``) or a hub id. The default is the adapters in the model\'s '
        "``reranker.json``, if it has one. A ``reranker.json`` beside an adapter gives prompt, heads and lengths.",
        shell="LoRA folders, merged in the order given: ``--adapters FIRST --adapters SECOND``.",
    )
    token_adapters: Converted[Mapping[int, str] | Sequence[tuple[int, str]], tuple[tuple[int, str], ...]] = Converted(
        default=(),
        check=check_folders_by_ratio,
        help="token adapters by ratio, ``{2: folder, 4: folder}``. In a shape with ``compress_layers``, "
        "the adapter for its ratio, or else for the next lower ratio, is laid over the shared weights. The default is "
        "the adapters in the model's ``reranker.json``, if it has one. They are kept as a tuple of pairs, and the "
        "reranker's ``repr`` shows the one in use.",
        shell="token adapters by ratio: ``--token-adapters 2:FOLDER --token-adapters 4:FOLDER``.",
    )
    cutoff: Converted[int | Sequence[int] | None, int | tuple[int, ...] | None] = Converted(
        default=None,
        check=shapes.check_cutoff,
        help="the layer after which passages are scored, or several; None for the deepest layer with a head. Here and "
        "in all other arguments, layer ``n`` is the n-th layer, counted from 1: ``cutoff=16`` runs 16 layers. Deeper "
        "layers are not kept in memory unless another reranker needs them. With several, ``cutoff=[8, 16]``, ``score`` "
        "is the deepest's, and each has a column, ``score_8`` and ``score_16``; all are computed in one pass.",
        shell="the layer after which passages are scored, counted from 1: ``--cutoff 16`` runs 16 layers; by default, "
        "the deepest layer with a head.",
    )
    compress_layers: Converted[int | Sequence[int], tuple[int, ...]] = Converted(
        default=(),
        check=lambda name, value: check_layers(name, value, 0),
        help="the layers after which the passage's hidden states are pooled, counted as in ``cutoff``: with "
        "``compress_layers=[8]``, 8 layers run at full width, and the ninth is the first on pooled states. (The "
        "original programs count layers from 0 and pool before a layer; their numbers are the same.) The score of the "
        "same layer is read before the pooling. 0 and layers from the cutoff on have no effect.",
        shell="the layers after which the passage's hidden states are pooled, counted from 1: ``--compress-layers 8 "
        "--compress-layers 16``.",
    )
    compress_ratio: Option[int] = Option(
        default=1,
        check=shapes.check_compress_ratio,
        help="hidden states that are pooled into one each time: 1 (off), 2, 4 or 8. Larger powers of two, up to 64, "
        "work too, but models are not trained for them.",
    )
    prune: Converted[Mapping[int, int] | Sequence[tuple[int, int]], tuple[tuple[int, int], ...]] = Converted(
        default=(),
        check=shapes.check_prune,
        help="a cascade: after a layer (the key, counted as in ``cutoff``), only this many candidates of each query "
        "(the value) survive, the best by the layer's score. With ``prune={8: 50, 16: 20}``, all candidates run "
        "through 8 layers, 50 through 16, and 20 to the cutoff. Survivors reuse their hidden states and get the same "
        "score as without a cascade. Dropped passages rank below all survivors, in order of their last score. To "
        "that end, the score is lowered before ``normalize``, by the same amount for all passages that a query loses "
        "at a layer, so that the best of them is 1 below the lowest passage that went deeper. The ``score`` of a "
        "cascade is therefore for ranking only. The columns ``score_8`` and ``score_16`` have the scores as they were; "
        "``exit_layer`` is the last layer that a passage ran through, and its scores beyond are NaN. Layers are "
        "shallower than the cutoff and have heads; the numbers must not increase with depth. They are kept as a tuple "
        "of pairs.",
        shell="a cascade: with ``--prune 8:50 --prune 16:20``, the best 50 candidates of each query survive layer 8, "
        "and the best 20 survive layer 16.",
    )
    prompt: Option[str | None] = Option(
        default=None,
        check=optional(check_string),
        help="the question that ends every input; None for the one in the model's ``reranker.json``, or else the "
        "original one.",
    )
    query_max_length: Option[int | None] = Option(
        default=None,
        check=optional(check_positive),
        help="tokens kept of ``A: {query}``; None for the value in ``reranker.json``, or three quarters of "
        "``max_length``.",
    )
    max_length: Option[int | None] = Option(
        default=None,
        check=optional(check_positive),
        help="tokens kept of ``B: {passage}``; None for the value in ``reranker.json``, or 512. Query and passage "
        "together have at most this number of tokens plus the number of tokens after the passage.",
    )
    normalize: Option[bool] = Option(
        default=False,
        check=as_bool,
        help="return the sigmoid of the scores, between 0 and 1. Ranks still follow the logits. A warning "
        "says if different logits become equal in float32, which evaluators use.",
    )
    released: Option[bool] = Option(
        default=False,
        check=as_bool,
        help="reproduce the released inference code as it runs on one pair at a time; for comparisons with published "
        "runs only. The i-th cutoff is read by the i-th head instead of the head trained for that layer, and the first "
        "pooling is weighted by a padding token. Where padding is masked, attention runs on SDPA whatever "
        "``attn_implementation`` says.",
    )
    start_layer: Option[int | None] = Option(
        default=None,
        check=optional(check_positive),
        help="the shallowest layer with a head, for a causal language model without layer-wise heads; its heads start "
        "as the LM head's row for ``Yes``. None for the value in ``reranker.json`` or the checkpoint; a plain model "
        "then has one head, at its last layer.",
    )
    layer_sep: Option[int | None] = Option(
        default=None,
        check=optional(check_positive),
        help="the distance between consecutive layers with heads; None for the value in ``reranker.json`` or the "
        "checkpoint, or 1 for a plain model.",
    )
    training: Option[MatroyshkaTraining | None] = Option(
        default=None,
        check=recipe_of("DistillTraining", "CompensateTraining"),
        help="the recipe that :meth:`fit` trains by: ``DistillTraining`` (the default, with the original settings) or "
        "``CompensateTraining``. The result is appended to ``adapters``.",
    )

    # Without an annotation, which would make it an option.
    _known_assembly = cast("Assembly | None", None)

    def __post_init__(self) -> None:
        source = self._source()
        vars(self).update(  # not an assignment, which would count as a change of the reranker
            adapters=tuple(absolute(name, source) for name in self.adapters),
            token_adapters=tuple((ratio, absolute(name, source)) for ratio, name in self.token_adapters),
        )
        self.shape.check_stages(self.deepest())
        if self.released and self.prune:
            raise ValueError(
                f"prune={dict(self.prune)}: released=True reads the heads of layers other than the cutoffs; "
                "allowed: no cascade."
            )
        require(self.model, "model")
        for role, names in {"adapters": self.adapters, "token_adapters": dict(self.token_adapters).values()}.items():
            for name in names:
                if not (Path(source).expanduser() / name).is_dir():
                    require(name, role)
        parts = self._parts()
        self._check_training(parts)
        self.shape.warn_without_effect()
        self._check_early(parts)

    @classmethod
    def untrained(cls, base: str, *, start_layer: int | None = None, **options: Any) -> MatroyshkaReranker:
        """Make a reranker from a causal language model, to be trained by :meth:`fit`.

        Until then, its score is the logit of the token ``Yes``.

        Args:
            base: a folder, ``.gguf`` file or hub id; ``"smollm2-135m"`` is the small model without its adapter.
            start_layer: the shallowest layer to have a head; None for the one in ``training``, or 4.
            options: any other arguments of the constructor; ``training`` holds the training settings.

        Raises:
            ValueError: as for the constructor.
            FileNotFoundError: as for the constructor.

        >>> from pyterrier_llmrerank import MatroyshkaReranker
        >>> MatroyshkaReranker.untrained("mistralai/Mistral-7B-v0.1").start_layer
        4
        """
        training = options.get("training")
        return cls(bundled.base(str(base)), start_layer=start_layer or getattr(training, "start_layer", 4), **options)

    def _check_training(self, parts: Description) -> None:
        """Raise ValueError if the recipe and the other arguments disagree."""
        if self.training is None:
            return
        fields = type(self.training).__dataclass_fields__
        for name in ("start_layer", "layer_sep", "prompt"):
            own, other = getattr(parts, name), getattr(self.training, name)
            own = PROMPT if name == "prompt" and own is None else own
            if other not in (own, fields[name].default) and own is not None:
                raise ValueError(f"{name}={own!r}, but training has {other!r}; the two must agree.")

    def _check_early(self, parts: Description) -> None:
        """Raise ValueError if the model does not allow the shape, as far as this shows without a download."""
        if parts.layers is not None and parts.start_layer is not None:
            if parts.start_layer > parts.layers:
                raise ValueError(f"start_layer={parts.start_layer}: model={self.model!r} has {parts.layers} layers.")
            heads = range(parts.start_layer, parts.layers + 1, parts.layer_sep or 1)
            self.shape.check_layers(f"model={self.model!r}", heads, parts.layers)
        if self._is_local(parts):
            self._shape(self._weights().checkpoint)

    @property
    def shape(self) -> MatroyshkaShape:
        """The arguments that choose the depth, the width and the cascade."""
        return MatroyshkaShape(self.cutoff, self.compress_layers, self.compress_ratio, self.prune)

    def at(
        self,
        *,
        cutoff: int | Sequence[int] | EllipsisType | None = ...,
        compress_layers: int | Sequence[int] | EllipsisType = ...,
        compress_ratio: int | EllipsisType = ...,
        prune: Mapping[int, int] | Sequence[tuple[int, int]] | EllipsisType = ...,
        normalize: bool | EllipsisType = ...,
    ) -> MatroyshkaReranker:
        """Return this reranker in another shape, over the same weights in memory.

        The token adapter for the new shape is laid over the weights. Adapters in ``adapters`` stay merged.

        Args:
            cutoff: as for the constructor, like the arguments below; ``...``, the default, keeps the present value.
            compress_layers: as for the constructor.
            compress_ratio: as for the constructor.
            prune: as for the constructor.
            normalize: as for the constructor.

        Raises:
            ValueError: a value is not allowed.

        >>> from pyterrier_llmrerank import MatroyshkaReranker
        >>> MatroyshkaReranker().at(prune={8: 50, 16: 20})
        MatroyshkaReranker('BAAI/Matroyshka-ReRanker-passage', prune={8: 50, 16: 20})
        """
        shape = {
            "cutoff": cutoff,
            "compress_layers": compress_layers,
            "compress_ratio": compress_ratio,
            "prune": prune,
            "normalize": normalize,
        }
        changed = {name: value for name, value in shape.items() if value is not ...}
        self._replicas()  # opens nothing yet, but lets the shapes share one copy from now on
        other = type(self)(**{**self.arguments(), **changed})
        other._known_assembly = self._assembly()  # the hub is asked once
        return other

    def depths(self) -> dict[int, pt.Transformer]:
        """Return a pipeline for each cutoff; all start with the same pass. A single cutoff gives the reranker itself.

        An experiment that shares common prefixes of pipelines makes the pass once:
        ``pt.Experiment([bm25 >> depth for depth in m.at(cutoff=[8, 16, 24]).depths().values()], ..., plan="tree")``.
        The time that it reports for each pipeline (``mrt``) is then that of the whole pass. The pass is the first
        stage of each pipeline, and may be cached (``pyterrier_caching.KeyValueCache``). With ``normalize``, the pass
        returns logits and the second stage their sigmoid.

        Raises:
            ValueError: the reranker has a cascade, in which not every candidate reaches every depth.

        >>> from pyterrier_llmrerank import MatroyshkaReranker
        >>> MatroyshkaReranker(cutoff=[8, 16]).depths()[16][1]
        AtDepth(16, (8, 16))
        """
        if self.prune:
            raise ValueError(f"prune={dict(self.prune)}: not every candidate reaches every depth; allowed: no cascade.")
        if not isinstance(self.cutoff, tuple):
            return {self.cutoffs()[0]: self}
        logits = self
        if self.normalize:  # each depth is ranked by logits
            logits = self.at(normalize=False)
            logits._usage_parent = self
        return {layer: logits >> AtDepth(layer, self.cutoff, self.normalize) for layer in self.cutoff}

    def fuse_feature_union(self, other: pt.Transformer, is_left: bool) -> pt.Transformer | None:
        """Compute ``self ** other`` in one pass if only ``cutoff`` differs. PyTerrier calls it to compile pipelines."""
        if isinstance(self.cutoff, tuple):
            return None
        return MatroyshkaFeatures([self]).fuse_feature_union(other, is_left)

    def cutoffs(self) -> tuple[int, ...]:
        """Return the cutoff layers, ascending; the model's last layer with a head if ``cutoff`` is None."""
        if self.cutoff is None:
            return (self._weights().checkpoint.head_layers[-1],)
        return self.shape.cutoffs

    def deepest(self) -> int | None:
        """Return the deepest cutoff; None for the model's last layer."""
        return self.shape.deepest

    def _checkpoint(self) -> partial[Any]:
        from .checkpoints.matroyshka_checkpoint import open_assembled

        return partial(open_assembled, *self._named_weights(), assembly=self._assembly())

    def _overlay_checkpoint(self) -> partial[Any] | None:
        from .checkpoints.matroyshka_checkpoint import open_assembled

        named: Any = self._token_adapter(self._parts())
        if not named and self.shape.pools() and is_hub_id(self._source()) and not self.adapters:
            named = self.compress_ratio  # the model may have its own adapter for this ratio
        if not named:
            return None
        return partial(
            open_assembled, *self._named_weights(), named, assembly=self._assembly(), ratio=self.compress_ratio
        )

    def _token_adapter(self, parts: Description) -> tuple[str, ...]:
        """Return the token adapter for the shape, if there is one.

        It does not depend on the cutoff, so that a layer's score is the same in deeper passes.
        """
        return token_adapter_for(parts.token_adapters, self.compress_ratio) if self.shape.pools() else ()

    def __repr__(self) -> str:
        call, source, parts = super().__repr__(), self._source(), self._parts()
        names = (*parts.adapters, *self._token_adapter(parts))
        if not self.token_adapters and (self.adapters or parts.base == source or names == (source,)):
            return call
        folder = Path(source).expanduser()
        own = {name: str(Path(name).relative_to(folder)) for name in names if folder in Path(name).parents}
        own[source] = folder.name
        return f"{call} over {', '.join(own.get(name) or shortest(name, source) for name in names) or 'no adapter'}"

    def _repr_value(self, name: str) -> Any:
        if name == "adapters":
            return tuple(shortest(adapter, self.model) for adapter in self.adapters)
        if name == "token_adapters":
            return {ratio: shortest(adapter, self.model) for ratio, adapter in self.token_adapters} or ()
        return dict(self.prune) or () if name == "prune" else super()._repr_value(name)

    def _source(self) -> str:
        """Return the folder, ``.gguf`` file or hub id of the model."""
        return bundled.reranker(self.model, "matroyshka")

    def _parts(self, *, fetch: bool = False) -> Description:
        """Return the parts of this reranker, from its arguments and from descriptions.

        Args:
            fetch: download models and adapters from the hub to read their descriptions, which are left out otherwise.
        """
        return self._assembly().parts(fetch=fetch, full_width=not self.shape.pools())

    def _assembly(self) -> Assembly:
        """Return the assembly of the parts, the same object until an argument changes."""
        given = Description(
            kind="matroyshka", base=self._source(), adapters=self.adapters, token_adapters=self.token_adapters,
            start_layer=self.start_layer, layer_sep=self.layer_sep, prompt=self.prompt,
            query_max_length=self.query_max_length, max_length=self.max_length,
        )  # fmt: skip
        if self._known_assembly is None or self._known_assembly.given != given:
            self._known_assembly = Assembly(given, f"model={self.model!r}")
        return self._known_assembly

    def _named_weights(self) -> tuple[Any, ...]:
        """Return values that are equal for equal weights, as far as these are known without a download.

        They are the base model, the adapters to merge, ``start_layer`` and ``layer_sep``, and the token adapters on the
        hub, since their descriptions may name the layers with heads.
        """
        parts = self._parts()
        unknown = tuple(name for _, name in parts.token_adapters if is_hub_id(name))
        return cast(str, parts.base), parts.adapters, parts.start_layer, parts.layer_sep, unknown

    def _is_local(self, parts: Description) -> bool:
        """Return whether the checkpoint can be opened without downloading or converting anything."""
        model = Path(cast(str, parts.base)).expanduser()
        return model.is_dir() and all(not is_hub_id(name) or (model / name).is_dir() for name in parts.folders)

    def _shape(self, checkpoint: Checkpoint) -> Shape:
        from .engine.shape import Shape

        self._parts(fetch=True).check_layers(checkpoint.layers, f"model={self.model!r}")
        self._check_layerwise(checkpoint)
        with_head = checkpoint.head_layers
        cutoffs = self.shape.check_layers(checkpoint.argument, with_head, checkpoint.layers)
        pools = self.shape.pools(cutoffs[-1])
        if pools:
            checkpoint.require_layerwise("compress_ratio", self.compress_ratio, "1, no compression")
        if self.prune:
            checkpoint.require_layerwise("prune", dict(self.prune), "no cascade")
        read, pad_id = tuple(sorted({*cutoffs, *dict(self.prune)})), None
        heads = tuple(with_head.index(layer) for layer in read)
        if self.released:
            heads = tuple(range(len(cutoffs)))
            pad_id = cast("MatroyshkaCheckpoint", checkpoint).pad_id() if pools else None
        return Shape(
            read, heads, self.compress_layers, self.compress_ratio, pad_id, self.prune, self.attn_implementation
        )

    def _inputs(self) -> MatroyshkaInputs:
        """Return the encoding, with settings from arguments, else descriptions, else the original program."""
        parts = self._parts(fetch=True)
        prompt = PROMPT if parts.prompt is None else parts.prompt
        return MatroyshkaInputs(prompt, parts.query_max_length, parts.max_length or MatroyshkaInputs.max_length)

    def _recipe(self) -> MatroyshkaTraining:
        """Return the recipe in ``training``, with this reranker's heads and prompt."""
        from .training.matroyshka import DistillTraining

        recipe, parts = self.training or DistillTraining(), self._parts(fetch=True)
        start = recipe.start_layer if parts.start_layer is None else parts.start_layer
        step = recipe.layer_sep if parts.layer_sep is None else parts.layer_sep
        return replace(
            recipe, start_layer=start, layer_sep=step, prompt=PROMPT if parts.prompt is None else parts.prompt
        )

    def _train(self, training: Frames, validation: Frames | None) -> Path:
        from .training.fit import fit

        recipe, parts = self._recipe(), self._parts(fetch=True)
        merged = replace(parts, adapters=(*parts.adapters, *self._token_adapter(parts)), token_adapters=())
        return fit(
            recipe, lambda: recipe.open_parts(merged, f"model={self.model!r}"), training, validation,
            device=self.device, dtype=self.dtype, verbose=self.verbose,
        )  # fmt: skip

    def _switch_to(self, adapter: str) -> None:
        from .checkpoints.matroyshka_checkpoint import is_layer_wise

        recipe, parts = self._recipe(), self._parts(fetch=True)
        self.model, self.prompt = cast(str, parts.base), parts.prompt
        self.query_max_length, self.max_length = parts.query_max_length, parts.max_length
        if not is_layer_wise(self.model):
            self.start_layer, self.layer_sep = recipe.start_layer, recipe.layer_sep
        self.adapters, self.token_adapters = (*parts.adapters, *self._token_adapter(parts), adapter), ()

    def save(
        self, folder: str | Path, *, merged: bool = False, cutoff: int | None = None, form: str | None = None
    ) -> list[Path]:
        """Write the trained model, in the form that the original programs, PEFT and the constructor open.

        A file ``reranker.json`` at the top describes it, with ``start_layer``, ``layer_sep`` and ``prompt``, so that
        ``MatroyshkaReranker(folder)`` opens it.

        Args:
            folder: a new or an empty folder.
            merged: write one layer-wise model (``cost_wise_*``) with all adapters merged in, rather than the
                PEFT adapters. Weights are in ``dtype`` and not quantised; heads are in fp32.
            cutoff: the depth of a sequence classifier; None for the reranker's own, if it has one.
            form: ``"sequence-classification"`` writes one depth as a plain ``*ForSequenceClassification`` with one
                label, which other programs open and serve; it needs ``merged=True``. Its tokenizer makes the ids of a
                pair, and its card says how. It has full width and no cascade.

        Returns:
            The folders of the adapters that this shape uses, in order: they open as ``adapters`` too. A single adapter
            is in the folder itself, several in numbered folders below it, token adapters in ``token-<ratio>``.
            Empty if ``merged``.

        Raises:
            FileExistsError: the folder is not empty.
            ValueError: there is no adapter to write, the depth has no head, or an argument needs another; or, for
                ``merged``, the model does not support layer-wise execution; or, for ``form``, the model's tokenizer
                gives other ids in transformers.
        """
        one_of("sequence-classification")("form", form)
        if form is not None and not merged:
            raise ValueError(f"form={form!r} writes a merged model; give merged=True too.")
        if cutoff is not None and form is None:
            raise ValueError(f"cutoff={cutoff!r}: adapters and layer-wise models keep all depths; allowed: None.")
        if form is not None and cutoff is None and isinstance(self.cutoff, tuple) and len(self.cutoff) > 1:
            raise ValueError(f"form={form!r} writes one depth, but the cutoffs are {self.cutoff}; give one as cutoff.")
        target, parts = Path(folder).expanduser(), self._parts(fetch=True)
        parts = replace(parts, prompt=PROMPT if parts.prompt is None else parts.prompt)
        if not merged:
            return self._save_adapters(target, parts)
        from .merged_models import write_depth, write_layer_wise

        if form is None:
            write_layer_wise(self._weights(), parts, target)
        else:  # at full width, which has no token adapter
            layer = self.deepest() if cutoff is None else cutoff
            depth = self.at(cutoff=layer, compress_layers=(), compress_ratio=1, prune=())
            _ = depth.scorer().shape  # raises if the depth has no head
            write_depth(depth._weights(), depth.cutoffs()[0], depth._inputs(), parts.base, target)
        return []

    def _save_adapters(self, folder: Path, parts: Description) -> list[Path]:
        """Write the adapters in ``parts``, and return the folders of the adapters that this shape uses."""
        from .checkpoints.saving import all_or_nothing, write_adapters

        if not parts.folders:
            raise ValueError("adapters=(): there is no adapter to write; allowed: merged=True.")
        with all_or_nothing(folder):
            saved = write_adapters(parts, folder)
        return [folder / name for name in (*saved.adapters, *self._token_adapter(saved))]

    def _columns(self, scores: Scores) -> dict[str, np.ndarray]:
        layers = sorted({*(self.cutoff if isinstance(self.cutoff, tuple) else ()), *dict(self.prune)})
        columns = {"score": scores.final, **{f"score_{layer}": scores.by_layer[layer] for layer in layers}}
        return columns | ({"exit_layer": scores.exit_layer} if self.prune and scores.exit_layer is not None else {})

    def _at_cutoffs(self, scores: Scores) -> np.ndarray:
        shallower = self.cutoff[:-1] if isinstance(self.cutoff, tuple) else ()
        return np.stack([*(scores.by_layer[layer] for layer in shallower), scores.final])

    def _finish(self, logits: np.ndarray) -> np.ndarray:
        return sigmoid(logits) if self.normalize else logits
