"""The command line: ``python -m pyterrier_llmrerank train rankllama|distill|compensate ...``."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 1 where an argument or file is not what is allowed."""
    parser = argparse.ArgumentParser(prog="python -m pyterrier_llmrerank", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a re-ranker; each recipe has a --help of its own")
    train.add_argument("recipe", choices=["rankllama", "distill", "compensate"])
    train.add_argument("options", nargs=argparse.REMAINDER, help="of the recipe")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    # transformers takes options with dashes too; here they have one spelling.
    options = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), o) for o in arguments.options]
    _hub_settings(options)
    try:
        from .training import commands as training
    except ImportError as error:
        print(f"training needs more packages (pip install 'pyterrier-llmrerank[train]'): {error}", file=sys.stderr)
        return 1
    try:
        training.main(arguments.recipe, options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _hub_settings(options: Sequence[str]) -> None:
    """Hand on what the hub's client reads from the environment, when it is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--token")
    parser.add_argument("--cache_dir")
    known, _ = parser.parse_known_args(options)
    for name, value in (("HF_TOKEN", known.token), ("HF_HUB_CACHE", known.cache_dir)):
        if value:
            os.environ[name] = value


if __name__ == "__main__":
    sys.exit(main())
