"""Text from data is shown as it is: by Markdown, in exported HTML, and in figures."""

from html import unescape

import nbformat
import pytest
from nbconvert import HTMLExporter

from dimaskdino.runs import Summary
from dimaskdino.utils.markdown import escape

HOSTILE = (
    "<img src=x onerror=alert(1)>.jpg",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](http://example.org/track.png)",
    "a|b",
    "$\\href{javascript:alert(1)}{x}$",
    "&lt;b&gt;",
    "**bold** _it_ `code`",
    "first\n\n# second",
    "www.example.org",
    "WWW.example.org",
    "somebody@example.org",
)


def html_of(markdown: str) -> str:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(markdown)])
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    return body


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_the_text_becomes_active(text):
    body = html_of(f"the image {escape(text)} does not exist")
    for active in ("<img", "<script", "<a ", "<strong", "<em>", "<code", "<h1", "<b>"):
        assert active not in body, body


@pytest.mark.parametrize("text", HOSTILE)
def test_a_summary_of_a_failure_is_plain(text, tmp_path, monkeypatch):
    shown = []

    class Display:
        def update(self, data, raw):
            shown.append(data["text/markdown"])

    monkeypatch.setattr("IPython.display.display", lambda *_, **__: Display())
    with pytest.raises(ValueError, match="image"), Summary(str(tmp_path)):
        raise ValueError(f"the image {text}")
    assert shown[-1].startswith("**failed**")
    body = html_of(shown[-1])
    for active in ("<img", "<script", 'javascript:alert(1)"', "<em>", "<code", "<h1", "<b>"):
        assert active not in body, body


@pytest.mark.parametrize("text", ["https://example.org", "www.example.org", "somebody@example.org"])
def test_no_text_becomes_a_link_by_itself(text):
    shown = escape(text)  # GitHub links such texts, nbconvert does not
    assert not any(sign in shown for sign in ("://", "www.", "@"))
    assert text in unescape(html_of(shown))


def test_a_folder_of_any_name_is_one_link(tmp_path, monkeypatch):
    shown = []

    class Display:
        def update(self, data, raw):
            shown.append(data["text/markdown"])

    monkeypatch.setattr("IPython.display.display", lambda *_, **__: Display())
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run [a](https:" / "example.org) [b"
    folder.mkdir(parents=True)
    Summary("run").show("finished", [], links={"run folder": folder})
    body = html_of(shown[-1])
    assert body.count("<a ") == 1
    assert "run%20%5Ba%5D%28https%3A/example.org%29%20%5Bb" in body


def test_ordinary_text_stays_readable():
    for text in ("step 12, data/val.json", "runs/mine with train.batch_size=8 (a note)", "100 % of 3 < 4"):
        plain = escape(text).replace("\\_", "_").replace("&lt;", "<")
        assert plain == text
