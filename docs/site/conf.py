"""Sphinx's settings of the documentation site; `python -m dimaskdino.course.site` uses them."""

import dimaskdino

project = "DI-MaskDINO"
release = dimaskdino.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "pydata_sphinx_theme"
html_title = "DI-MaskDINO"
html_static_path = ["_static"]
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_show_sourcelink = False
default_role = "code"  # docstrings write code as Markdown does
copyright = "the dimaskdino contributors; Apache License 2.0"
autodoc_typehints = "none"  # signatures have jaxtyping's shapes; the docstrings say them too
autodoc_member_order = "bysource"
napoleon_use_rtype = False
nb_execution_mode = "off"  # the chapters were executed before
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
