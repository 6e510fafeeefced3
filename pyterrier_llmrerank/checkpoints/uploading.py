"""Upload saved rerankers to the hub, with their model cards."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from .cards import Stated, hub_card
from .description import FILE
from .json_files import read_json
from .locate import is_hub_id


def upload(
    folder: Path, repo_id: str, name: str, stated: Stated, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a saved reranker, in place of all files in its repository.

    Args:
        folder: the folder of the saved reranker; its model card is written or completed.
        repo_id: the repository, ``"owner/name"``, or ``"name"`` for one of the user's own; created if it does not
            exist.
        name: the class that opens the reranker.
        stated: the user's facts about it.
        private: whether a new repository is private; None for the hub's default.
        token: token of the hub; None for the one that the hub's client is logged in with.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: the base is a local folder, so that the reranker could not be opened elsewhere.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
    """
    _check_base(folder, repo_id)
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)  # the URL has the full id
    _complete_card(folder, url.repo_id, name, stated)
    api.upload_folder(  # replaces an earlier model with all its files
        repo_id=url.repo_id, folder_path=folder, commit_message="Upload a reranker", delete_patterns="*"
    )
    return str(url)


def _check_base(folder: Path, repo_id: str) -> None:
    """Raise ValueError if a saved reranker opens on this machine alone, because its base is a local folder."""
    base = read_json(folder / FILE)["base"]
    if base is not None and not is_hub_id(base):
        raise ValueError(
            f"repo_id={repo_id!r}: the base {base!r} exists only on this machine; allowed: a base on the hub, or "
            "merged=True."
        )


def _complete_card(folder: Path, repo_id: str, name: str, stated: Stated) -> None:
    """Write the model card of a saved reranker, or complete an existing card. ``repo_id`` is ``"owner/name"``."""
    description, path = read_json(folder / FILE), folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else None
    path.write_text(hub_card(card, description["kind"], name, description["base"], repo_id, stated), encoding="utf-8")
