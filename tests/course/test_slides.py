"""Chapters as slides (needs the packages of the extra `site`)."""

import re

import nbformat
import pytest
from test_site import executed

pytest.importorskip("latex2mathml", reason="pip install -e '.[site]' for the slides")

from dimaskdino.course.slides import with_formulas, with_slides, write_slides


def test_headings_and_figures_begin_slides():
    kinds = [cell.metadata["slideshow"]["slide_type"] for cell in with_slides(executed()).cells]
    assert kinds == ["slide", "-", "slide", "subslide", "subslide", "-"]


def test_formulas_become_mathml_and_code_stays():
    text = "Costs $a_1 * b$ and `$a$`.\n\n$$\nx = \\frac{1}{2}\n$$\n\n```\necho $b$\n```\n\nAgain $a_1 * b$."
    made = with_formulas(text)
    assert made.count("<msub><mi>a</mi><mn>1</mn></msub>") == 2
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in made
    assert "<mfrac>" in made
    assert "`$a$`" in made
    assert "echo $b$" in made
    assert not re.search(r"[*_]", re.sub(r"`[^`]*`", "", "".join(re.findall(r"<math.*?</math>", made))))


def test_slides_need_no_network(tmp_path):
    notebook = executed()
    notebook.cells.append(nbformat.v4.new_markdown_cell("so $k_1$ it is"))
    write_slides(notebook, tmp_path / "chapter.html")
    text = (tmp_path / "chapter.html").read_text()
    assert text.count("<section>") >= 4
    assert "<msub><mi>k</mi><mn>1</mn></msub>" in text
    wanted = re.findall(r'<(?:script|link)\b[^>]*(?:src|href)="([^"]+)"', text)
    assert any(target.endswith("reveal.js") for target in wanted)
    assert all((tmp_path / target).is_file() for target in wanted)
    for css in tmp_path.rglob("*.css"):
        if css.name in ("reveal.css", "white.css") or "source-sans" in css.name:
            assert not re.search(r"""(?:url\(|@import )["']?https?:""", css.read_text()), css


def test_links_lead_to_the_pages_of_the_site(tmp_path):
    notebook = executed()
    notebook.cells.append(
        nbformat.v4.new_markdown_cell("[$T_i$](00_detr.ipynb#symbols), [why](study.md), [x](https://a.org/b.md)")
    )
    write_slides(notebook, tmp_path / "chapter.html")
    links = re.findall(r'<a href="([^"#][^"]*)"', (tmp_path / "chapter.html").read_text())
    assert links == ["../00_detr.html#symbols", "../study.html", "https://a.org/b.md"]
