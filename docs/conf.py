"""Configuration of the documentation.

Build: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import build_sources  # noqa: E402
import ppl_vae  # noqa: E402

project = "ppl_vae"
author = "the ppl_vae developers"
copyright = f"2026, {author}"
release = version = getattr(ppl_vae, "__version__", "0.1.0")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
highlight_language = "none"

# Every reference to the package has a target. Other libraries are named without links, since the
# inventories that links need come from a network.
nitpicky = True
OTHERS = (
    "abc|collections|contextlib|jaxtyping|matplotlib|numpy|pandas|pathlib|pyro|rich|sklearn|torch"
)
nitpick_ignore_regex = [
    ("py:.*", rf"({OTHERS})\..*"),
    ("py:class", "Tensor|ndarray"),  # inside the annotations of jaxtyping
    ("py:class", r"dict\[int"),  # a part of the type of a private field
    # Type variables.
    ("py:(class|obj)", r"ppl_vae\.(lineage\.stage\.(Fitted|AnyRow)|models\.storage\.P)"),
]
exclude_patterns = ["_build", "**/GALLERY_HEADER.rst", "sg_execution_times.rst"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
maximum_signature_line_length = 88

# The pages open from disk without a network: MathJax is copied into the built pages, and its SVG
# output needs no fonts.
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"svg": {"fontCache": "global"}, "options": {"enableMenu": False}}

sphinx_gallery_conf = {
    "examples_dirs": "_build/examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "nested_sections": True,
    "within_subsection_order": "build_sources.listed_order",
    "subsection_order": "build_sources.section_order",
    "reset_argv": "build_sources.smoke_arguments",
    "reset_modules": ("matplotlib", "build_sources.reset_pyro"),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "write_computation_times": False,
    "min_reported_time": 1e6,
    "remove_config_comments": True,
    "parallel": False,
}

html_theme = "pydata_sphinx_theme"
html_title = "ppl_vae"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": []}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "navigation_with_keys": False,
}


def setup(app: object) -> None:
    """Write the sources that are generated before a build."""
    build_sources.connect(app)
