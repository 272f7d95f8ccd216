"""Sphinx's settings of the documentation site, for `python -m tools.course.site`."""

from docutils import nodes
from latex2mathml.converter import convert

import dimaskdino

project = "DI-MaskDINO"
release = dimaskdino.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "pydata_sphinx_theme"
html_title = "DI-MaskDINO"
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
autodoc_typehints = "none"  # jaxtyping's shapes are long; the docstrings have them too
autodoc_member_order = "bysource"
napoleon_use_rtype = False
nb_execution_mode = "off"  # the chapters have their outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"  # needs no script
myst_heading_anchors = 3


def setup(app):
    def renderer(display, before="", after=""):
        def visit(translator, node):
            translator.body.append(f"{before}{convert(node.astext().strip(), display=display)}{after}")
            raise nodes.SkipNode

        return visit, None

    block = renderer("block", '<div class="math" style="margin: 1em 0">', "</div>")
    app.add_html_math_renderer("mathml", renderer("inline"), block)
