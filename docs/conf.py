"""The documentation site. ``sphinx-build -W docs .build/site`` builds it without a network; any
warning is an error.
"""

from __future__ import annotations

import re

from stablelora_kernels import __version__

project = "stablelora-kernels"
author = "the stablelora-kernels authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Strings in docstrings keep their quotes.
smartquotes_action = "De"
highlight_language = "text"

# Every reference must lead somewhere. There is no intersphinx, since its inventories are fetched:
# what others define stays without a link.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|collections|os|contextlib|typing|pathlib|matplotlib)\..*"),
    (
        r"py:.*",
        r"(Tensor|Any|Callable|Iterable|Iterator|Mapping|NoReturn|Number|Params|Path|QuantizedWeight|Sequence|Stored|TrainingArguments)",
    ),
]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 50
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_heading_anchors = 3

pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = f"stablelora-kernels {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
# The search finds names; the index of two columns outgrows a phone.
html_use_index = html_domain_indices = False
html_show_sphinx = html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"


def _show_signature(app, what, name, obj, options, signature, return_annotation):
    """A dataclass's ``field(default_factory=dict)`` as ``{}``; Sphinx cannot parse what Python
    prints for it.
    """
    if signature:
        for kind, empty in (("dict", "{}"), ("list", "[]")):
            signature = re.sub(rf"({kind}\[[^=]*\]) = <factory>", rf"\1 = {empty}", signature)
    return signature, return_annotation


def setup(app):
    app.connect("autodoc-process-signature", _show_signature)
