"""Escaping text for Markdown."""

import re


def escape(text: str) -> str:
    """Escape text from data, such as a file's name, so that Markdown shows it literally: no HTML, links or styles.

    Line breaks become spaces, so that the text stays in its paragraph or table cell.
    """
    html = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    html = html.replace("://", "&#58;//")  # no automatic links
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html)
