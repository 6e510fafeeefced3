"""RankLLaMA: a Llama with LoRA and one linear head, fine-tuned to score a query and a document."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import KW_ONLY, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pandas as pd

from .checkpoints import bundled
from .checkpoints.description import FILE, Description, read_description
from .checkpoints.identity import identity
from .checkpoints.input_format import TEVATRON_2023, InputFormat, check_name
from .checkpoints.locate import absolute, folder_of, is_hub_id, named_base, portable, require, shortest
from .engine.inputs import Encoding, RankLLaMAInputs, inputs_of
from .frames import row_name
from .options import Option, with_options
from .reranker import LLMReranker, check_model, recipe_of
from .values import as_bool, check_column, check_positive, check_string, optional, problem_of

if TYPE_CHECKING:
    from .checkpoints.checkpoint import Checkpoint
    from .checkpoints.rankllama_checkpoint import RankLLaMACheckpoint
    from .engine.shape import Shape
    from .training.fit import Frames
    from .training.rankllama import RankLLaMATraining


#: The names of the arguments for the input format.
FORMAT = tuple(InputFormat().settings())

#: The usual numbers of tokens, by the arguments for them.
LENGTHS = {name: getattr(RankLLaMAInputs, name) for name in ("query_max_length", "passage_max_length")}


@with_options
class RankLLaMAReranker(LLMReranker):
    """Rerank with RankLLaMA (Ma et al., 2023: Fine-Tuning LLaMA for Multi-Stage Text Retrieval).

    The input is ``<s> query: {query}<s> document: {title} {text}``, or another ``input_format``. A linear head scores
    the hidden state of its last token after the last layer.

    Raises:
        ValueError: an argument is not allowed.
        FileNotFoundError: a local checkpoint does not exist. Models on the hub are looked up on first use.
        ImportError: a package that an option needs is not installed; raised on first use.

    >>> from pyterrier_llmrerank import RankLLaMAReranker
    >>> RankLLaMAReranker(passage_max_length=256)
    RankLLaMAReranker('castorini/rankllama-v1-7b-lora-passage', passage_max_length=256)
    """

    schematic: ClassVar = {"label": "RankLLaMA", "help_url": "https://arxiv.org/abs/2310.08319"}

    model: Option[str] = Option(
        default="castorini/rankllama-v1-7b-lora-passage",
        check=check_model,
        help="a PEFT ``SEQ_CLS`` adapter with its score head, a merged ``*ForSequenceClassification`` model, or "
        "``smollm2-135m``, the small adapter that comes with this package. It is a folder or a hub id, which may "
        'include a revision (``"owner/name@v1"``); paths are kept absolute.',
    )
    _: KW_ONLY
    base_model: Option[str | None] = Option(
        default=None,
        check=optional(check_model),
        help="a base (folder, ``.gguf`` file or hub id) to use in place of the one that the adapter names.",
    )
    input_format: Option[str | None] = Option(
        default=None,
        check=optional(check_name),
        help='the form in which the model reads a pair. ``"tevatron-2023"`` is RankLLaMA\'s first form, and '
        '``"tevatron-2024"`` the one string that Tevatron has made since 2024: ``<s> {query_prefix} {query} '
        '{passage_prefix} {title} {text}``. ``"qwen3-reranker"`` is the prompt of Qwen3-Reranker\'s sequence '
        "classifiers. Any other prompt is a template with ``{query}``, perhaps ``{title}``, and ``{text}``. None is "
        'the format in the model\'s ``reranker.json``, or else ``"tevatron-2023"``.',
        shell="the form in which the model reads a pair: ``tevatron-2023``, ``tevatron-2024``, ``qwen3-reranker`` or a "
        "template, such as ``'Query: {query} Document: {text}'``; by default, the model's own, or else "
        "``tevatron-2023``.",
    )
    query_prefix: Option[str | None] = Option(
        default=None,
        check=optional(check_string),
        help='text before the query in Tevatron\'s formats; None for the one in ``reranker.json``, or ``"query: "``.',
    )
    passage_prefix: Option[str | None] = Option(
        default=None,
        check=optional(check_string),
        help="text before the passage in Tevatron's formats; None for the one in ``reranker.json``, or "
        '``"document: "``.',
    )
    append_eos: Option[bool | None] = Option(
        default=None,
        check=optional(as_bool),
        help="append the tokenizer's end token to the input, in all formats but ``tevatron-2023``; None for the value "
        "in ``reranker.json``, or else no end token.",
    )
    query_max_length: Option[int | None] = Option(
        default=None,
        check=optional(check_positive),
        help="tokens kept of ``query: {query}``, not counting ``<s>``; None for the value in ``reranker.json``, or 32.",
    )
    passage_max_length: Option[int | None] = Option(
        default=None,
        check=optional(check_positive),
        help="tokens kept of ``document: {title} {text}``, not counting ``<s>``; None for the value in "
        "``reranker.json``, or 164. The whole input has at most "
        "``query_max_length + passage_max_length - 2`` tokens, counting both ``<s>``; the query is cut to fit. The "
        "document checkpoint was trained with 2048. In the other formats, query and passage share "
        "``query_max_length + passage_max_length`` tokens, and the end of the passage is cut to fit. In "
        "``tevatron-2024``, prefixes and special tokens count too; in a template, its own text does not.",
    )
    title_field: Option[str | None] = Option(
        default="title",
        check=optional(check_column),
        help="a column with titles; None to read no titles. Frames without the column, and rows in which it is None or "
        "NaN, have no title.",
        shell="the field with titles.",
    )
    url_field: Option[str | None] = Option(
        default=None,
        check=optional(check_column),
        help="a column with URLs, which precede the title; None to read no URLs. The document checkpoint reads them. "
        "Missing values are treated as in ``title_field``.",
        shell="a field with URLs, which precede the title; by default, none.",
    )
    training: Option[RankLLaMATraining | None] = Option(
        default=None,
        check=recipe_of("RankLLaMATraining"),
        help="the recipe that :meth:`fit` trains by; None for the original settings.",
    )

    # Without an annotation, which would make it an option.
    _known_description = cast("tuple[Hashable, Description | None] | None", None)

    def __post_init__(self) -> None:
        require(self.model, "model")
        if self.base_model is not None:
            require(self.base_model, "base_model")
        self._look_up_model()
        if self.input_format is not None or not is_hub_id(self._source()):  # fail now, not after a first stage has run
            self._checked(self._chosen(self.named_format)[0])

    def _look_up_model(self) -> None:
        """Keep the base and the input format that a local model names."""
        #: The base that the adapter names. A relative path is resolved now, not when the base is opened.
        self.named_base = named_base(self._source())
        #: The base in the form that is stored and compared.
        self.portable_base = None if self.named_base is None else portable(self.named_base)
        #: The input format that a local model names; None if it names none.
        self.named_format = None if is_hub_id(self._source()) else self._described_format()

    def _described_format(self) -> InputFormat | None:
        """Return the input format in the model's description; a hub model is downloaded."""
        return own.input_format if (own := self._description()) is not None else None

    def _description(self) -> Description | None:
        """Return the model's description; None if it has none. A hub model is downloaded.

        The file is read again only if it has changed. A hub model is looked up once, like its weights.
        """
        source = self._source()
        state = None if is_hub_id(source) else identity(str(Path(source).expanduser() / FILE), source)
        if self._known_description is None or self._known_description[0] != (source, state):
            folder = folder_of(source, "model") if is_hub_id(source) else Path(source).expanduser()
            argument = f"model={self.model!r}"
            own = read_description(self.model, folder, "rankllama", argument) if folder.is_dir() else None
            self._known_description = (source, state), own
        return self._known_description[1]

    def _lengths(self) -> dict[str, Any]:
        """Return the lengths in use by their arguments; None for the usual ones."""
        own = self._description() or Description(kind="rankllama")
        return {name: getattr(self, name) or getattr(own, name) for name in LENGTHS}

    def _given_format(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FORMAT}

    def _form(self) -> InputFormat:
        """Return the input format in use; a hub model is downloaded for its description."""
        return self._checked(self._chosen(self._described_format())[0])

    def _chosen(self, own: InputFormat | None) -> tuple[InputFormat, Mapping[str, Any]]:
        """Return the input format, and the arguments by which ``repr`` names it.

        Args:
            own: the model's own format, which the arguments change; None if it has none.
        """
        return _chosen(tuple(self._given_format().items()), own)

    def _checked(self, form: InputFormat) -> InputFormat:
        """Return an input format; ValueError if it has no place for URLs that are to be read."""
        if self.url_field is not None and form.name != TEVATRON_2023:
            raise ValueError(f"url_field={self.url_field!r}: input_format {form.name!r} reads no URLs; allowed: None.")
        return form

    @classmethod
    def untrained(cls, base: str, **options: Any) -> RankLLaMAReranker:
        """Make a reranker from a causal language model, to be trained by :meth:`fit` before it can score.

        Args:
            base: a folder, ``.gguf`` file or hub id; ``"smollm2-135m"`` is the small model without its adapter.
            options: any other arguments of the constructor; ``training`` holds the training settings.

        Raises:
            ValueError: as for the constructor; or ``base`` is an adapter.
            FileNotFoundError: as for the constructor.

        >>> from pyterrier_llmrerank.training import RankLLaMATraining
        >>> RankLLaMAReranker.untrained("meta-llama/Llama-2-7b-hf", training=RankLLaMATraining(group_size=8))
        RankLLaMAReranker('meta-llama/Llama-2-7b-hf', training=RankLLaMATraining(group_size=8))
        """
        if (Path(base).expanduser() / "adapter_config.json").is_file():
            raise ValueError(f"base={str(base)!r} is an adapter, which is trained already; give it to the constructor.")
        training = options.get("training")
        given = {name: getattr(training, name, None) for name in FORMAT}
        return cls(bundled.base(str(base)), **{**given, **options})

    def _checkpoint(self) -> partial[Any]:
        from .checkpoints.rankllama_checkpoint import RankLLaMACheckpoint

        return partial(RankLLaMACheckpoint, *self._checkpoint_arguments())

    def _source(self) -> str:
        """Return the folder, ``.gguf`` file or hub id of the model."""
        return bundled.reranker(self.model, "rankllama")

    def _checkpoint_arguments(self) -> tuple[str, str | None]:
        """Return the model and its base."""
        return self._source(), self.base_model or self.named_base

    def _shape(self, checkpoint: Checkpoint) -> Shape:
        from .engine.shape import Shape

        self._check_layerwise(checkpoint)
        return Shape(cutoffs=(checkpoint.layers,), heads=(0,), attn_implementation=self.attn_implementation)

    def deepest(self) -> int | None:
        """Return None: all layers are run."""
        return None

    def _inputs(self) -> Encoding:
        lengths = self._lengths()
        return inputs_of(self._form(), *(lengths[name] or usual for name, usual in LENGTHS.items()))

    def _bodies(self, frame: pd.DataFrame) -> list[str]:
        form = self._form()
        titles, urls = (_optional_texts(frame, field) for field in (self.title_field, self.url_field))
        return [form.body(*parts) for parts in zip(frame[self.text_field], titles, urls, strict=True)]

    def _bare(self, texts: list[str]) -> list[str]:
        form = self._form()
        return [form.body(text) for text in texts]

    def _recipe(self) -> RankLLaMATraining:
        """Return the recipe in ``training``, with this reranker's input format.

        Raises:
            ValueError: the recipe has another format.
        """
        from .training.rankllama import RankLLaMATraining

        recipe, own = self.training or RankLLaMATraining(), self._form().settings()
        for name, value in own.items():
            if (other := getattr(recipe, name)) not in (None, value):
                raise ValueError(f"{name}={value!r}, but training has {other!r}; the two must agree.")
        return recipe if own == InputFormat().settings() else replace(recipe, **own)

    def _train(self, training: Frames, validation: Frames | None) -> Path:
        from .training.fit import fit

        model, base_model = self._checkpoint_arguments()
        recipe = self._recipe()
        return fit(
            recipe, lambda: recipe.open(model, base_model=base_model), training, validation,
            device=self.device, dtype=self.dtype, verbose=self.verbose,
            described={name: length for name in LENGTHS if (length := getattr(self, name)) is not None},
        )  # fmt: skip

    def _base(self) -> str:
        """Return the base of the adapter, or the model itself before training."""
        return cast("RankLLaMACheckpoint", self._checkpoint()()).base

    def _switch_to(self, adapter: str) -> None:
        self.base_model, self.model = absolute(self._base()), adapter

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get("model")
        made = "named_format" in vars(self)
        if made and name in FORMAT and not is_hub_id(self._source()):  # raise before the value is set
            InputFormat.chosen({**self._given_format(), name: value}, self.named_format)
        super().__setattr__(name, value)
        if self.model != before and "named_base" in vars(self):  # another adapter may name another base
            self._look_up_model()

    def equality_key(self) -> dict[str, Any]:
        """Return the arguments, with the values that a local model names: its base, if it is used, and its format."""
        named = {} if self.base_model or self.portable_base is None else {"named_base": self.portable_base}
        return {**self.arguments(), **named, **self._shown_format()}

    def _shown_format(self) -> Mapping[str, Any]:
        """Return the arguments that name the input format; for a hub model, whose own format is unknown, as given."""
        return self._given_format() if is_hub_id(self._source()) else self._chosen(self.named_format)[1]

    def _repr_value(self, name: str) -> Any:
        if name == "base_model" and self.base_model is not None:
            return shortest(self.base_model)
        return self._shown_format().get(name, super()._repr_value(name))

    def _is_adapter(self) -> bool:
        return (folder_of(self._source(), "model") / "adapter_config.json").is_file()

    def save(self, folder: str | Path, *, merged: bool = False) -> None:
        """Write the trained model, in the form that the original programs, PEFT and the constructor open.

        A file ``reranker.json`` describes it, so that ``RankLLaMAReranker(folder)`` opens it.

        Args:
            folder: a new or an empty folder.
            merged: write one ``*ForSequenceClassification`` model, rather than the PEFT ``SEQ_CLS`` adapter
                with its score head. Weights are in ``dtype`` and not quantised; the head is in fp32. Its model card
                says how its input is made.

        Raises:
            FileExistsError: the folder is not empty.
            ValueError: there is no adapter, the model is untrained or, for ``merged``, it does not support layer-wise
                execution.
        """
        from .checkpoints.saving import all_or_nothing, copy_adapter
        from .merged_models import write_rankllama

        weights, target = self._weights(), Path(folder).expanduser()
        described = {"input_format": self._form(), **self._lengths()}
        if merged:
            columns = self.title_field is not None, self.url_field is not None
            description = replace(weights.checkpoint.description(), **described)
            write_rankllama(weights, self._inputs(), columns, description, target)
            return
        checkpoint = weights.checkpoint
        checkpoint.heads(checkpoint.tokenizer())  # raises if the model is untrained
        if not self._is_adapter():
            raise ValueError(f"model={self.model!r} is not an adapter; allowed: merged=True.")
        with all_or_nothing(target):
            copy_adapter(folder_of(self._source(), "model"), target, checkpoint.base, checkpoint.tokenizer())
            replace(checkpoint.description(), base=checkpoint.base, adapters=(".",), **described).write(target)


@lru_cache(maxsize=128)
def _chosen(given: tuple[tuple[str, Any], ...], own: InputFormat | None) -> tuple[InputFormat, Mapping[str, Any]]:
    """Return the input format, and the arguments by which ``repr`` names it.

    A default is left out, unless the model would have another value without the argument.
    """
    form = InputFormat.chosen(dict(given), own)
    usual = InputFormat(form.name).settings() | {"input_format": TEVATRON_2023}
    named = InputFormat() if own is None else own
    omitted = (named if form.name == named.name else InputFormat(form.name)).settings() | {"input_format": named.name}
    hidden = {name for name, value in form.settings().items() if value == usual[name] == omitted[name]}
    return form, {name: None if name in hidden else value for name, value in form.settings().items()}


def _optional_texts(frame: pd.DataFrame, field: str | None) -> list[str | None]:
    """Return a column of texts; None for a missing value, and for each row if the column is missing."""
    if field is None or field not in frame.columns:
        return [None] * len(frame)
    values = [None if pd.api.types.is_scalar(value) and pd.isna(value) else value for value in frame[field]]
    for row, value in enumerate(values):
        if value is not None and (problem := problem_of(value)):
            raise ValueError(f"{field!r} is {problem} for {row_name(frame, row)}.")
    return values
