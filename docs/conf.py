"""Sphinx configuration."""

import sclightning

project = "sclightning"
author = "The sclightning developers"
release = sclightning.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
html_theme = "furo"
exclude_patterns = ["_build"]
# Names of type variables and of third-party types that no page of ours describes.
suppress_warnings = ["ref.python"]
