"""Sphinx configuration; build with ``make docs``."""

import rainfusion

project = "rainfusion"
author = "the rainfusion developers"
release = rainfusion.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "rainfusion"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_mock_imports = ["torch"]  # the documentation is built without it
napoleon_google_docstring = True
