"""Links to the glossary and the table of symbols."""

import re
from pathlib import Path

import nbformat
import pytest

from tools.course.glossary import link_first_uses, symbols_of, terms_of

NOTEBOOKS = Path(__file__).parents[3] / "notebooks"
FIRST = NOTEBOOKS / "source" / "00_detr.py"


def linked(*texts, terms=("query", "feature token", "token", "AP", "box"), symbols=("$T_i$", "$k_1$")):
    return link_first_uses(texts, terms, symbols, "0.ipynb")


def test_the_first_use_is_linked_and_only_that():
    first, second = linked("Queries ask; a query answers.", "A query.\n\nIts AP, and APs.")
    assert first == "[Queries](0.ipynb#Glossary) ask; a query answers."
    assert second == "A query.\n\nIts [AP](0.ipynb#Glossary), and APs."
    assert linked("a *feature\ntoken* is a token") == [
        "a *[feature\ntoken](0.ipynb#Glossary)* is a [token](0.ipynb#Glossary)"
    ]
    assert linked("all boxes") == ["all [boxes](0.ipynb#Glossary)"]


def test_code_formulas_links_and_headings_stay_as_they_are():
    for text in (
        "# A query",
        "`query`",
        "```python\nquery = 1\n```",
        "$$query$$",
        "[a query](there.md)",
        '<a id="query">',
        "non-query, subqueries, ap, map",
    ):
        assert linked(text) == [text]


def test_symbols_are_linked_where_they_stand_alone():
    assert linked("$$T_i$$ and $T_i$ of $k_1 + 1$, $T_i$") == [
        "$$T_i$$ and [$T_i$](0.ipynb#Symbols) of $k_1 + 1$, $T_i$"
    ]


def test_the_glossary_and_the_table_of_symbols_are_read():
    terms, symbols = terms_of(FIRST), symbols_of(FIRST)
    assert {"AP", "reference box", "token interaction", "upper bound"} <= set(terms)
    assert {"$T_i$", "$T_g^{box}$", "$Q_{bal}$"} <= set(symbols)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("0*.ipynb"))[1:], ids=lambda path: path.stem)
def test_chapters_link_to_sections_that_are_there(path):
    headings = re.findall(
        r"^#+ (.*)$", "\n".join(c.source for c in nbformat.read(NOTEBOOKS / "00_detr.ipynb", 4).cells), re.M
    )
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    found = re.findall(r"\[([^\]]*)\]\(00_detr\.ipynb#(\w+)\)", "\n".join(cells))
    assert len(found) >= 3
    assert {anchor for _, anchor in found} <= set(headings)
    assert len({text.lower() for text, _ in found}) == len(found)
