"""A chapter as slides that need no network: reveal.js lies beside them, and formulas are MathML."""

import importlib.resources
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbconvert import SlidesExporter
from nbformat import NotebookNode

# nbconvert's template loads its scripts with RequireJS, and formulas with MathJax, from servers
_TEMPLATE = """
{%- extends 'reveal/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock html_head_js -%}
{%- block html_head_js_mathjax -%}{%- endblock html_head_js_mathjax -%}
{%- block jupyter_widgets -%}{%- endblock jupyter_widgets -%}
{%- block html_head_css -%}
<style>
.reveal .slides section section { max-height: 700px; overflow-y: auto; }
.reveal .slides :is(h1, h2, h3, h4) { text-transform: none; }
</style>
{%- endblock html_head_css -%}
{%- block footer_js -%}
<script src="reveal/dist/reveal.js"></script>
<script src="reveal/plugin/notes/notes.js"></script>
<script>Reveal.initialize({history: true, slideNumber: true, plugins: [RevealNotes], width: 960, height: 700});</script>
{%- endblock footer_js -%}
"""

_LINK = re.compile(r"\]\((\w+)\.(?:ipynb|md)\b")  # to a source of the site


def with_slides(notebook: NotebookNode) -> NotebookNode:
    """The notebook with its cells as slides: one for each heading, and one below it for each figure."""
    made = nbformat.from_dict(notebook)
    for cell in made.cells:
        kind = "-"
        if cell.cell_type == "markdown":
            kind = (
                "slide"
                if cell.source.startswith(("# ", "## "))
                else "subslide"
                if "\n### " in f"\n{cell.source}"
                else "-"
            )
        elif any("image/png" in output.get("data", {}) for output in cell.outputs):
            kind = "subslide"
        cell.metadata["slideshow"] = {"slide_type": kind}
    return made


def write_slides(notebook: NotebookNode, file: Path) -> None:
    """Write a chapter as slides, and reveal.js into the folder `reveal` beside them.

    The pages of the site, to which its links lead, are one folder above.
    """
    made = with_slides(notebook)
    for cell in made.cells:
        if cell.cell_type == "markdown":
            cell.source = with_formulas(_LINK.sub(r"](../\1.html", cell.source))
    exporter = SlidesExporter(
        reveal_url_prefix="reveal",
        reveal_theme="white",  # its fonts are files; others load theirs from a server
        template_file="offline.html.j2",
        extra_loaders=[DictLoader({"offline.html.j2": _TEMPLATE})],
    )
    text, _ = exporter.from_notebook_node(made)
    file.write_text(text)
    scripts = importlib.resources.files("sphinx_revealjs") / "_static" / "revealjs"
    with importlib.resources.as_file(scripts) as folder:
        for part in ("dist", "plugin/notes"):
            shutil.copytree(folder / part, file.parent / "reveal" / part, dirs_exist_ok=True)


def with_formulas(markdown: str) -> str:
    """Markdown whose formulas, between one or two dollars, are MathML."""
    parser = MarkdownIt("commonmark").use(dollarmath_plugin)
    done, rest = "", markdown
    for block, latex in list(_formulas(parser.parse(markdown))):
        mark = "$$" if block else "$"
        before, found, rest = rest.partition(f"{mark}{latex}{mark}")
        assert found, f"the formula {latex} is not where Markdown sees it"
        done += before + as_mathml(latex, block)
    return done + rest


def _formulas(tokens: Sequence[Token]) -> Iterator[tuple[bool, str]]:
    """(whether it is a block, LaTeX) of each formula."""
    for token in tokens:
        if token.type in ("math_inline", "math_block"):
            yield token.type == "math_block", token.content
        yield from _formulas(token.children or ())


def as_mathml(latex: str, block: bool) -> str:
    """A formula as MathML, without characters that mean something in Markdown."""
    made = convert(latex.strip(), display="block" if block else "inline")
    for character in "*_|`[]":
        made = made.replace(character, f"&#{ord(character)};")
    return made
