"""The parts of a Matroyshka reranker, assembled from arguments and from the descriptions of model and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .description import Description, read_description
from .locate import adapter_folder, is_hub_id


def assemble(given: Description, folder: Path | None, argument: str, *, fetch: bool = False) -> Description:
    """Return the parts of a Matroyshka reranker: given values win over the descriptions of the model and its adapters.

    Args:
        given: the user's arguments; its base is the model as the user names it. Adapters replace the model's own and
            their token adapters.
        folder: the local folder with the model's files; None if it is not to be downloaded.
        argument: the caller's argument and its value, for messages.
        fetch: download adapters from the hub to read their descriptions.

    Raises:
        ValueError: adapters were trained with a ``start_layer`` or ``layer_sep`` that differs from the given one, with
            heads or prompts that differ between them or from the model's, or on top of other adapters; or as
            :func:`read_description`.
        FileNotFoundError: as :func:`read_description`.
    """
    model = str(given.base)
    own = None if folder is None else read_description(model, folder, "matroyshka", argument)
    parts = given if own is None else _over(own, given, argument)
    places = [("adapters", name, place) for place, name in enumerate(parts.adapters if given.adapters else ())]
    if given.token_adapters:
        places += [("token_adapters", name, len(parts.adapters)) for _, name in parts.token_adapters]
    described = []
    for role, name, place in places:
        if (adapter := _adapter_description(name, model, f"{role}: {name!r}", fetch)) is not None:
            adapter.check_place(place, str(parts.base), f"{role}: {name!r}")
            described.append((f"{role}: {name!r}", adapter))
    return _with_adapters(parts, given, described, argument)


def _over(own: Description, given: Description, argument: str) -> Description:
    """Return a model's description with the given values in place of its own; arguments as for :func:`assemble`."""
    model = str(given.base)
    adapters, token_adapters = own.adapters, own.token_adapters
    if given.adapters:
        adapters, token_adapters = tuple(_found(name, model) for name in given.adapters), ()
    elif own.adapters:
        for name in ("start_layer", "layer_sep"):
            value, trained = getattr(given, name), getattr(own, name)
            if value is not None and trained is not None and value != trained:
                raise ValueError(
                    f"{name}={value}: {argument} was trained with {name} {trained}; allowed: {trained}, or adapters "
                    "of your own, or MatroyshkaReranker.untrained."
                )
    if given.token_adapters:
        token_adapters = tuple((ratio, _found(name, model)) for ratio, name in given.token_adapters)
    names = ("start_layer", "layer_sep", "prompt", "query_max_length", "max_length")
    values = {name: value for name in names if (value := getattr(given, name)) is not None}
    return replace(own, adapters=adapters, token_adapters=token_adapters, **values)


def _with_adapters(
    parts: Description, given: Description, described: Sequence[tuple[str, Description]], argument: str
) -> Description:
    """Return the parts with the values that the descriptions of adapters add.

    Args:
        parts: the given values over the model's own description.
        given: as for :func:`assemble`.
        described: the adapters with a description, each with its argument and value for messages.
        argument: as for :func:`assemble`.
    """
    for name in ("layers", "start_layer", "layer_sep", "prompt"):
        trained = [(place, value) for place, own in described if (value := getattr(own, name)) is not None]
        if not trained:
            continue
        place, value = trained[0]
        known = [*trained[1:], *([] if getattr(given, name) is not None else [(argument, getattr(parts, name))])]
        for other, differing in known:
            if differing not in (None, value):
                raise ValueError(
                    f"{place} was trained with {name} {value!r}, but {other} with {differing!r}; the two must agree."
                )
        explicit = getattr(given, name)
        if name != "prompt" and explicit not in (None, value):
            raise ValueError(f"{name}={explicit}: {place} was trained with {name} {value}; allowed: {value}.")
        parts = replace(parts, **{name: value if explicit is None else explicit})
    for name in ("query_max_length", "max_length"):
        values = [value for _, own in described if (value := getattr(own, name)) is not None]
        if values and getattr(given, name) is None:
            parts = replace(parts, **{name: values[-1]})
    return parts


def _adapter_description(name: str, model: str, argument: str, fetch: bool) -> Description | None:
    """Read the description beside an adapter; None if there is none, or if it would have to be downloaded.

    Args:
        name: a folder, a hub id, or the name of a folder below the model's own.
        model: the model that the adapter belongs to.
        argument: the caller's argument and its value, for messages.
        fetch: download it.
    """
    local = next((path for path in (Path(model).expanduser() / name, Path(name).expanduser()) if path.is_dir()), None)
    if local is None and not fetch:
        return None
    folder = adapter_folder(name, model) if local is None else local
    return Description.read(folder, "matroyshka", argument) if (folder / "adapter_config.json").is_file() else None


def _found(name: str, model: str) -> str:
    """Resolve an adapter in a folder below the model's own, which cannot be found from its base."""
    if is_hub_id(model):
        return str(adapter_folder(name, model))
    own = Path(model).expanduser() / name
    return str(own) if own.is_dir() else name


def token_adapter_for(token_adapters: Sequence[tuple[int, str]], ratio: int) -> tuple[str, ...]:
    """Return the token adapter for a ratio, else for the next lower one, as a tuple of at most one."""
    return tuple([name for own, name in sorted(token_adapters) if own <= ratio][-1:])
