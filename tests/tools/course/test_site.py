"""The course as a site (needs the packages of the extra `site`)."""

import re
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("myst_nb", reason="pip install -e '.[site]' for the site")

from tools.course.site import build, chapter_page

ROOT = Path(__file__).parents[3]


def test_pictures_keep_their_alternative_texts(tmp_path):
    metadata = {"image/png": {"alt": "What it shows"}}
    picture = nbformat.v4.new_output("display_data", {"image/png": "…", "text/plain": "x"}, metadata=metadata)
    code = nbformat.v4.new_code_cell("f()", outputs=[picture])
    link = nbformat.v4.new_markdown_cell("[that](b.md#Part) and [other](c.py)")
    nbformat.write(nbformat.v4.new_notebook(cells=[link, code]), tmp_path / "a.ipynb")
    made = chapter_page(tmp_path / "a.ipynb", {tmp_path / "b.md": "page.md"})
    assert made.cells[0].source == "[that](page.md#part) and other"
    assert made.cells[1].metadata["mystnb"]["image"]["alt"] == "What it shows"


@pytest.mark.slow
def test_guides_and_reference_build_without_warnings_and_with_links_that_lead_somewhere(tmp_path):
    index = build(ROOT, tmp_path / "site", [])
    pages = {page.name: page.read_text() for page in index.parent.glob("*.html")}
    guides = {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")}
    assert guides | {"index.html", "api.html", "contributing.html", "changelog.html"} <= set(pages)
    for name, text in pages.items():
        for target in re.findall(r'href="([^"#:?]+)(?:#[^"]*)?"', text):
            assert (index.parent / target).exists(), f"{name}: {target}"
    assert 'id="dimaskdino.Model.predict"' in pages["api.html"]
    assert "cxcywh" in pages["api.html"]


@pytest.mark.slow
def test_a_chapter_becomes_a_page(tmp_path):
    chapters = [ROOT / "notebooks" / f"{name}.ipynb" for name in ("04_de_imbalance", "07_ablations")]
    index = build(ROOT, tmp_path / "site", chapters)
    page = index.parent / "07_ablations.html"
    course = (index.parent / "course.html").read_text()
    assert 'href="07_ablations.html"' in course
    assert page.read_text().count("<img") >= 2
    assert page.read_text().count('alt="Figure: Effect of each module') == 1
    # with formulas, and without a network
    formulas = index.parent / "04_de_imbalance.html"
    assert "<msub><mi>T</mi>" in formulas.read_text()
    for file in index.parent.rglob("*.html"):
        assert not re.search(r"<(?:script|link|img)\b[^>]*https?://", file.read_text()), file
