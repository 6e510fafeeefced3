"""Settings to build the pages by themselves with Sphinx, as in PyTerrier's documentation.

PyTerrier's documentation has directives of its own. Short ones stand for them here, in which an error in the code of a
schematic or in the name of a related class stops the build. PYTERRIER_DOCS, the docs folder of a clone of PyTerrier,
takes its directives instead.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

import pyterrier as pt
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

for name in ("torchao", "torch.utils._pytree"):  # log missing extras on import
    logging.getLogger(name).setLevel(logging.ERROR)

project = "pyterrier_llmrerank"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autoclass_content = "both"
autodoc_typehints = "description"
autodoc_inherit_docstrings = False
autodoc_default_options = {"member-order": "bysource"}

# References within the package must resolve. Those to other packages need inventories from the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyterrier_llmrerank).*")]


pt.documentation.url_for_class = lambda *_: None  # looks in PyTerrier's inventory, on the network

if original := os.environ.get("PYTERRIER_DOCS"):
    sys.path.append(original)
    extensions += [f"extras.{name}" for name in ("how_to", "related", "schematic", "codeblock_footnotes")]


class HowTo(SphinxDirective):
    """A question as the title of a section, and the answer."""

    has_content = True
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        section = nodes.section(ids=[nodes.make_id(self.arguments[0])])
        section += nodes.title("", self.arguments[0])
        self.state.nested_parse(self.content, self.content_offset, section)
        return [section]


class Related(SphinxDirective):
    """The name of a class or function whose reference links back to this section; shows nothing here."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, *names = self.arguments[0].split(".")
        found: Any = importlib.import_module(module)
        for name in names:
            found = getattr(found, name)
        return []


class Schematic(SphinxDirective):
    """A drawing of the pipeline that the last line of some code makes, with the code after ``# FOLD``."""

    has_content = True
    option_spec = {"input_columns": str.split, "show_code": lambda _: True}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        *before, last = "\n".join(self.content).strip().splitlines()
        names: dict[str, Any] = {"pt": pt}
        exec("\n".join(before), names)
        columns = [name.strip(",") for name in self.options.get("input_columns", [])]
        shown = "\n".join([*before, last]).split("# FOLD")[-1].strip()
        drawn = nodes.raw("", pt.schematic.draw(eval(last, names), input_columns=columns or None), format="html")
        return [nodes.literal_block(shown, shown, language="python"), drawn]


def setup(app: Sphinx) -> None:
    if original:
        app.config.templates_path.append(f"{original}/_templates")
        return
    for name, directive in {"how-to": HowTo, "related": Related, "schematic": Schematic}.items():
        app.add_directive(name, directive)
