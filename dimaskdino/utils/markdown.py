"""Text and tables in Markdown."""

import re
from collections.abc import Sequence

from dimaskdino.utils.terminal import printable


def escape(text: str) -> str:
    """Escape text from data, such as a file's name, so that Markdown shows it literally: no HTML, links or styles.

    Line breaks become spaces, so that the text stays in its paragraph or table cell.
    """
    html = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # no automatic links
    html = re.sub(r"(?i)(www)\.", r"\1&#46;", html.replace("://", "&#58;//").replace("@", "&#64;"))
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns aligned in plain text; the first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in (rows[0], ["-" * width for width in widths], *rows[1:]):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
