"""Settings to build the pages by themselves with Sphinx, as in PyTerrier's documentation."""

project = "pyterrier_llmrerank"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autoclass_content = "both"
autodoc_typehints = "description"
autodoc_inherit_docstrings = False
autodoc_default_options = {"member-order": "bysource"}

# References within the package must resolve. Those to other packages need inventories from the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyterrier_llmrerank).*")]
