"""What Sphinx needs to build the pages by themselves; what is set here is as in PyTerrier's documentation."""

project = "pyterrier_llmrerank"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autoclass_content = "both"
autodoc_typehints = "description"
autodoc_inherit_docstrings = False
autodoc_default_options = {"member-order": "bysource"}

# References to what is described here have to be right; other packages' inventories would have to be downloaded.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyterrier_llmrerank).*")]
