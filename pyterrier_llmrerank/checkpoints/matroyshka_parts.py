"""The parts of a Matroyshka reranker, assembled from arguments and from the descriptions of model and adapters."""

from __future__ import annotations

import filecmp
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from . import bundled
from .description import FILE, MAX_LENGTH, Description, read_description
from .identity import identity
from .locate import adapter_folder, folder_of, is_hub_id, portable

#: An argument and its value for messages, and the description that it leads to.
Described = tuple[str, Description]


class Assembly:
    """Assembles the parts of a Matroyshka reranker: given values win over descriptions of the model and its adapters.

    Weights, inputs, saved forms and training all take their parts from here. They are assembled again only where a
    description has changed; files from the hub are looked up once.

    Args:
        given: the user's arguments; its base is the model as the user names it. Adapters replace the model's own and
            their token adapters.
        argument: the caller's argument for the model and its value, for messages.
    """

    def __init__(self, given: Description, argument: str) -> None:
        self.given, self.argument = given, argument
        self._model = bundled.base(str(given.base))
        self._fetched: dict[str, Path] = {}  # by reference
        self._known: dict[tuple[bool, bool], tuple[Hashable, Description]] = {}

    def parts(self, *, fetch: bool = False, full_width: bool = False) -> Description:
        """Return the parts.

        Args:
            fetch: whether to download models and adapters from the hub for their descriptions; if not, descriptions on
                the hub are left out.
            full_width: whether the reranker runs at full width, without a token adapter.

        Raises:
            ValueError: adapters were trained with a ``start_layer`` or ``layer_sep`` that differs from the given one,
                with heads, prompts or lengths that differ between them or from the model's, or on top of other
                adapters; or as :func:`read_description`.
            FileNotFoundError: as :func:`read_description`.
        """
        places = [Path(self._model).expanduser(), *(self._local(name) for name in self.given.folders)]
        state = tuple(None if place is None else identity(str(place / FILE), self._model) for place in places)
        known = self._known.get((fetch, full_width))
        if known is None or known[0] != state:
            known = self._known[fetch, full_width] = state, self._assemble(fetch, full_width)
        return known[1]

    def _assemble(self, fetch: bool, full_width: bool) -> Description:
        folder: Path | None = Path(self._model).expanduser()
        if is_hub_id(self._model):
            folder = self._fetch(self._model) if fetch else None
        own = None
        if folder is not None:
            own = read_description(str(self.given.base), folder, "matroyshka", self.argument)
        parts = self.given if own is None else self._over(own)
        places = [("adapters", name, place) for place, name in enumerate(parts.adapters if self.given.adapters else ())]
        if self.given.token_adapters:
            places += [("token_adapters", name, len(parts.adapters)) for _, name in parts.token_adapters]
        described: dict[str, list[Described]] = {"adapters": [], "token_adapters": []}
        last: int | None = None  # the place of the last adapter that was trained over all before it
        for role, name, place in places:
            argument = f"{role}: {name!r}"
            found = self._local(name)
            if found is None and fetch:
                found = self._fetch(name)
            if found is not None and (found / "adapter_config.json").is_file():
                adapter = Description.read(found, "matroyshka", argument)
                if adapter is not None:
                    over = self._check_place(adapter, found, parts.adapters[:place], str(parts.base), argument)
                    if over and role == "adapters":
                        last = len(described[role])
                    described[role].append((argument, adapter))
        parts = self._agreed(parts, [*described["adapters"], *described["token_adapters"]])
        merged = described["adapters"][last:]  # those before it may have been trained with other lengths
        if own is not None and last is None and not (own.adapters and merged):  # its own adapters are not replaced
            merged = [(self.argument, own), *merged]
        if full_width and not merged and described["token_adapters"]:
            merged = [(f"{self.argument} at full width", Description(kind="matroyshka"))]
        return self._with_lengths(parts, [*merged, *described["token_adapters"]])

    def _over(self, own: Description) -> Description:
        """Return the model's description with the given values in place of its own."""
        given = self.given
        adapters, token_adapters = own.adapters, own.token_adapters
        if given.adapters:
            adapters, token_adapters = tuple(map(self._found, given.adapters)), ()
        elif own.adapters:
            for name in ("start_layer", "layer_sep"):
                value, trained = getattr(given, name), getattr(own, name)
                if value is not None and trained is not None and value != trained:
                    raise ValueError(
                        f"{name}={value}: {self.argument} was trained with {name} {trained}; allowed: {trained}, or "
                        "adapters of your own, or MatroyshkaReranker.untrained."
                    )
        if given.token_adapters:
            token_adapters = tuple((ratio, self._found(name)) for ratio, name in given.token_adapters)
        names = ("start_layer", "layer_sep", "prompt", "query_max_length", "max_length")
        values = {name: value for name in names if (value := getattr(given, name)) is not None}
        return replace(own, adapters=adapters, token_adapters=token_adapters, **values)

    def _agreed(self, parts: Description, described: Sequence[Described]) -> Description:
        """Return the parts with the heads and the prompt of described adapters. A given prompt settles a conflict."""
        for name in ("layers", "start_layer", "layer_sep", "prompt"):
            trained = [(place, value) for place, own in described if (value := getattr(own, name)) is not None]
            explicit = getattr(self.given, name)
            if explicit is not None:
                for place, value in trained if name != "prompt" else ():
                    if value != explicit:
                        raise ValueError(
                            f"{name}={explicit}: {place} was trained with {name} {value}; allowed: {value}."
                        )
            elif trained:
                place, value = trained[0]
                for other, differing in [*trained[1:], (self.argument, getattr(parts, name))]:
                    if differing not in (None, value):
                        raise ValueError(
                            f"{place} was trained with {name} {value!r}, but {other} with {differing!r}; the two must "
                            "agree."
                        )
                parts = replace(parts, **{name: value})
        return parts

    def _with_lengths(self, parts: Description, described: Sequence[Described]) -> Description:
        """Return the parts with the lengths on which all descriptions agree; given ones settle a conflict."""
        if not described:
            return parts
        place, lengths = described[0][0], self._lengths(described[0][1])
        for other, own in described[1:]:
            if (differing := self._lengths(own)) != lengths:
                raise ValueError(
                    f"{place} has query_max_length={lengths[0]} and max_length={lengths[1]}, but {other} has "
                    f"{differing[0]} and {differing[1]}; give query_max_length and max_length, or the base that they "
                    "were trained on."
                )
        own = described[0][1]
        return replace(
            parts,
            query_max_length=self.given.query_max_length or own.query_max_length,
            max_length=self.given.max_length or own.max_length,
        )

    def _lengths(self, own: Description) -> tuple[int, int]:
        """Return the lengths of a query and a pair that a description gives, with given values in their place."""
        longest = self.given.max_length or own.max_length or MAX_LENGTH
        return self.given.query_max_length or own.query_max_length or longest * 3 // 4, longest

    def _check_place(self, own: Description, folder: Path, before: Sequence[str], base: str, argument: str) -> bool:
        """Raise ValueError if an adapter is to be merged over other adapters than in training.

        A token adapter may be over more of them, such as a layer adapter. Over another base, their number may differ.
        Return whether it was trained over all of them: not known over another base.

        Args:
            own: the description of the adapter.
            folder: the folder of the adapter, perhaps with copies of the adapters below it.
            before: the adapters that are merged before it.
            base: the base that they are merged into.
            argument: the caller's argument and its value, for messages.
        """
        if own.base != portable(base):
            return False
        merged = [self._local(name) or self._fetched.get(name) for name in before]
        if "." in own.adapters:
            trained = own.adapters[: own.adapters.index(".")]
            if len(before) != len(trained):
                raise ValueError(
                    f"{argument} was trained on this base with {len(trained)} adapters before it, but here it has "
                    f"{len(before)}; give all of them in order, or its folder as model."
                )
            for name, other, given in zip(trained, merged, before, strict=True):
                if not _may_be_same(folder / name, other):
                    raise ValueError(
                        f"{argument} was trained on this base over {str(folder / name)!r}, of other weights than "
                        f"{given!r}; give its folder as model."
                    )
            return True
        rest = iter(merged)
        if not all(any(_may_be_same(folder / name, other) for other in rest) for name in own.adapters):
            raise ValueError(
                f"{argument} was trained on this base over {len(own.adapters)} adapters, which are not in order among "
                f"the {len(before)} here: {list(before)}; allowed: at least copies of the adapters in {str(folder)!r}."
            )
        return len(own.adapters) == len(before)

    def _local(self, name: str) -> Path | None:
        """Return the folder of an adapter: below the model's own, or at its path; None if it is on the hub."""
        paths = Path(self._model).expanduser() / name, Path(name).expanduser()
        return next((path for path in paths if path.is_dir()), None)

    def _fetch(self, name: str) -> Path:
        if name not in self._fetched:
            is_model = name == self._model
            self._fetched[name] = folder_of(name, "model") if is_model else adapter_folder(name, str(self.given.base))
        return self._fetched[name]

    def _found(self, name: str) -> str:
        """Resolve the name of an adapter below the model's own folder, since its base does not lead there."""
        if is_hub_id(self._model):
            return str(self._fetch(name))
        own = Path(self._model).expanduser() / name
        return str(own) if own.is_dir() else name


def _may_be_same(copy: Path, other: Path | None) -> bool:
    """Tell whether two adapters have the same weights; True unless both are on this machine."""
    if other is None or not copy.is_dir():
        return True
    copied, others = ({file.name for file in folder.glob("adapter_model.*")} for folder in (copy, other))
    names = copied & others
    return not names or all(filecmp.cmp(copy / name, other / name, shallow=False) for name in names)


def token_adapter_for(token_adapters: Sequence[tuple[int, str]], ratio: int) -> tuple[str, ...]:
    """Return the token adapter for a ratio, else for the next lower one, as a tuple of at most one."""
    return tuple([name for own, name in sorted(token_adapters) if own <= ratio][-1:])
