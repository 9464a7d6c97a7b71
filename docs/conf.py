"""Sphinx settings."""

import tracereward

project = "tracereward"
author = "The tracereward authors"
release = version = tracereward.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tracereward {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_use_ivar = True  # an attribute is documented once, in its class's docstring

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
