"""``reranker.json``: the file by which a saved reranker describes itself, and opens with no other argument.

Every field is checked, and paths in it must be inside its own folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from .. import __version__
from ..errors import short
from ..values import RATIOS
from .input_format import InputFormat, check_name
from .json_files import read_json
from .locate import HUB_ID, below, is_hub_id

FILE = "reranker.json"

#: The version of the file's format. A newer version is refused, because it may have settings that scores depend on.
FORMAT_VERSION = 1

#: The kinds of rerankers, and the classes that open them.
KINDS = {"rankllama": "RankLLaMAReranker", "matroyshka": "MatroyshkaReranker"}

#: The kind of one depth of a Matroyshka that is exported as a plain classifier. No class here opens it: RankLLaMA would
#: give it other inputs than in training, and Matroyshka needs layer-wise heads.
EXPORTED = "exported-matroyshka"

#: The fields that only one kind of reranker has, by the kind that lacks them.
NOT_OF = {
    "rankllama": {"start_layer", "layer_sep", "prompt", "token_adapters", "max_length"},
    "matroyshka": {"input_format", "passage_max_length"},
}

#: The fields that say how much of a text is read. A file leaves out a field that is None.
LENGTHS = ("query_max_length", "passage_max_length", "max_length")

#: The usual number of tokens of a Matroyshka's pair; a query usually has three quarters of it.
MAX_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Description:
    """Describes the parts of a reranker and the settings that it was trained with.

    Args:
        kind: ``rankllama`` or ``matroyshka``; :data:`EXPORTED` is written, and refused when it is read.
        base: the model below the adapters: a hub id, an absolute path or the bundled model's name; None where the
            folder itself holds the model.
        layers: decoder layers of the base; None if unknown.
        start_layer: the shallowest layer with a head; None for the base's own.
        layer_sep: layers from one head to the next; None for the base's own.
        prompt: the question that ends every input; None for the usual one, and for RankLLaMA.
        input_format: the format of a RankLLaMA's input; None if it is not known, and for Matroyshka.
        query_max_length: tokens kept of a query; None for the usual number.
        passage_max_length: tokens kept of a RankLLaMA's passage; None for the usual number, and for Matroyshka.
        max_length: tokens kept of a Matroyshka's pair; None for the usual number, and for RankLLaMA.
        adapters: folders of the adapters to merge, in this order; ``.`` is the folder itself.
        token_adapters: folders of token adapters by ratio, ascending.
    """

    kind: str
    base: str | None = None
    layers: int | None = None
    start_layer: int | None = None
    layer_sep: int | None = None
    prompt: str | None = None
    input_format: InputFormat | None = None
    query_max_length: int | None = None
    passage_max_length: int | None = None
    max_length: int | None = None
    adapters: tuple[str, ...] = ()
    token_adapters: tuple[tuple[int, str], ...] = ()

    @classmethod
    def read(cls, folder: Path, kind: str, argument: str) -> Description | None:
        """Read and check the description in a folder.

        Args:
            folder: the folder of the model.
            kind: the kind of reranker that is to open it.
            argument: the caller's argument and its value, for messages.

        Returns:
            The description; None if the folder has none.

        Raises:
            ValueError: the file is of another kind, of an exported model or of a newer version, has an unknown or
                missing field, a value that is not allowed, or names a path outside its folder.
            FileNotFoundError: the folder of an adapter is missing.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        content = read_json(path)
        reader = _Reader(path, content, argument)
        version: int | None = reader.get("format_version", int, least=1)
        if version is None or version > FORMAT_VERSION:
            raise ValueError(
                f"{argument}: {path} has format_version {short(content.get('format_version'))}; this release of "
                f"pyterrier_llmrerank reads up to {FORMAT_VERSION}."
            )
        if unknown := sorted(content.keys() - _FIELDS):
            raise ValueError(f"{argument}: {path} has an unknown field {short(unknown[0])}.")
        found = reader.get("kind", str)
        if found == EXPORTED:
            raise ValueError(
                f"{argument}: {path} describes one depth of a Matroyshka, exported as a plain classifier for other "
                "programs; its README.md says how they make its input. Allowed here: the model that it was exported "
                "from, with MatroyshkaReranker(model, cutoff=...)."
            )
        if found not in KINDS:
            raise ValueError(f"{argument}: kind in {path} is {short(found)}; allowed: {', '.join(KINDS)}.")
        if found != kind:
            raise ValueError(f"{argument}: {path} describes a {found} model; open it with {KINDS[found]}.")
        return cls(
            kind=found,
            base=reader.base(),
            layers=reader.get("layers", int, least=1),
            start_layer=reader.get("start_layer", int, least=1),
            layer_sep=reader.get("layer_sep", int, least=1),
            prompt=reader.get("prompt", str),
            input_format=reader.input_format(),
            query_max_length=reader.get("query_max_length", int, least=1),
            passage_max_length=reader.get("passage_max_length", int, least=1),
            max_length=reader.get("max_length", int, least=1),
            adapters=reader.adapters(),
            token_adapters=reader.token_adapters(),
        ).check_fields(path, argument)

    def check_fields(self, path: Path, argument: str) -> Description:
        """Return the description, or raise ValueError if its fields contradict each other."""
        for name in sorted(NOT_OF[self.kind]):
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(f"{argument}: {path} has {name}, which no {self.kind} model has.")
        if self.kind == "rankllama":
            wanted = () if self.base is None else (".",)
            if self.adapters != wanted:
                raise ValueError(
                    f"{argument}: adapters in {path} is {list(self.adapters)}; a rankllama model "
                    f"{'without' if self.base is None else 'with'} a base has {list(wanted)}."
                )
        elif self.base is None and "." in self.folders:
            raise ValueError(f"{argument}: {path} has no base for the adapter beside it.")
        return self

    def check_layers(self, layers: int, argument: str) -> None:
        """Raise ValueError unless the base has as many layers as the description says."""
        if self.layers not in (None, layers):
            raise ValueError(f"{argument}: {FILE} says that the base has {self.layers} layers, but it has {layers}.")

    @property
    def folders(self) -> tuple[str, ...]:
        """The names of all adapters' folders."""
        return (*self.adapters, *dict(self.token_adapters).values())

    def write(self, folder: Path) -> None:
        """Write the description into a folder.

        Raises:
            OSError: it cannot be written.
        """
        content = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "base": self.base,
            "layers": self.layers,
            "start_layer": self.start_layer,
            "layer_sep": self.layer_sep,
            "prompt": self.prompt,
            **({} if self.input_format is None else self.input_format.settings()),
            **{name: value for name in LENGTHS if (value := getattr(self, name)) is not None},
            "adapters": list(self.adapters),
            "token_adapters": {str(ratio): name for ratio, name in self.token_adapters},
            "package_version": __version__,
        }
        (folder / FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_DEFAULTS = {name: field.default for name, field in Description.__dataclass_fields__.items()}

#: All fields that a file may have.
_FIELDS = {"format_version", "package_version", *Description.__dataclass_fields__, *InputFormat().settings()}


def read_description(model: str, folder: Path, kind: str, argument: str) -> Description | None:
    """Read a model's description, with folder names resolved to paths or hub references.

    Args:
        model: the model as its user names it: a folder or a hub id.
        folder: the local folder with its files.
        kind: the kind of reranker that is to open it.
        argument: the caller's argument and its value, for messages.

    Returns:
        The description; None if the folder has none.

    Raises:
        ValueError: as :meth:`Description.read`, or a folder is a link to a place outside the model's folder.
        FileNotFoundError: a folder is missing.
    """
    own = Description.read(folder, kind, argument)
    if own is None:
        return None
    for name in own.folders:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{argument}: {folder / FILE} names {name!r}, a link to a folder outside its own.")
        if not is_hub_id(model) and not (folder / name).is_dir():  # a hub model's may not be downloaded yet
            raise FileNotFoundError(f"{argument}: {folder / FILE} names the folder {name!r}, which is missing.")
    return replace(
        own,
        base=model if own.base is None else own.base,
        adapters=tuple(below(model, name) for name in own.adapters),
        token_adapters=tuple((ratio, below(model, name)) for ratio, name in own.token_adapters),
    )


class _Reader:
    """Reads the fields of a description, and checks each."""

    def __init__(self, path: Path, content: Mapping[str, Any], argument: str) -> None:
        self.path, self.content, self.argument = path, content, argument

    def refusal(self, name: str, allowed: str) -> ValueError:
        value = short(self.content.get(name))
        return ValueError(f"{self.argument}: {name} in {self.path} is {value}; allowed: {allowed}.")

    def get(self, name: str, kind: type, least: int | None = None) -> Any:
        value = self.content.get(name)
        if value is not None and (type(value) is not kind or (kind is int and cast(int, value) < (least or 0))):
            kinds = {str: "a string", bool: "true or false"}
            raise self.refusal(name, kinds.get(kind, f"an integer of at least {least}"))
        return value

    def base(self) -> str | None:
        base: str | None = self.get("base", str)
        if base is None or Path(base).is_absolute() or HUB_ID.fullmatch(base):
            return base
        raise self.refusal("base", "a hub id, an absolute path or null")

    def input_format(self) -> InputFormat | None:
        given = {name: self.content[name] for name in InputFormat().settings() if self.content.get(name) is not None}
        if not given:
            return None
        try:
            check_name("input_format", given.get("input_format"))
            for name in ("query_prefix", "passage_prefix"):
                self.get(name, str)
            self.get("append_eos", bool)
            return InputFormat(given.pop("input_format"), **given)
        except ValueError as error:
            raise ValueError(f"{self.argument}: in {self.path}, {error}") from None

    def adapters(self) -> tuple[str, ...]:
        names = self.content.get("adapters", [])
        if not isinstance(names, list):
            raise self.refusal("adapters", "a list of folders")
        return tuple(self.folder("adapters", name) for name in names)

    def token_adapters(self) -> tuple[tuple[int, str], ...]:
        by_ratio = self.content.get("token_adapters", {})
        ratios = [str(ratio) for ratio in RATIOS if ratio > 1]
        if not isinstance(by_ratio, dict) or not by_ratio.keys() <= set(ratios):
            raise self.refusal("token_adapters", f"an object with a folder for ratios among {', '.join(ratios)}")
        pairs = [(int(ratio), self.folder("token_adapters", name)) for ratio, name in by_ratio.items()]
        return tuple(sorted(pairs))

    def folder(self, field: str, name: object) -> str:
        """Return the name of a folder; ValueError unless it is the description's own folder or below it."""
        allowed = "names of folders below its own"
        if not isinstance(name, str) or not 0 < len(name) < 256:
            raise self.refusal(field, allowed)
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name or str(parts) != name:
            raise self.refusal(field, allowed)
        return name
