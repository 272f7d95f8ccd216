"""Links from the first use of a term in a chapter to its explanation in chapter 0."""

import re
from collections.abc import Sequence
from pathlib import Path

# not prose: code, formulas, links, HTML, headings
_PROTECTED = r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|!?\[[^\]]*\]\([^)]*\)|<[^>]*>|^#+ .*?$"


def terms_of(source: Path) -> list[str]:
    """The terms of a chapter's section *Glossary*, each entry `* **term, another name**: explanation`."""
    terms = []
    for entry in re.findall(r"\* \*\*([^*]+)\*\*:", _section(source, "Glossary")):
        terms += map(str.strip, entry.split(","))
    return terms


def symbols_of(source: Path) -> list[str]:
    """The symbols in the first column of a chapter's section *Symbols*, such as `$T_i$`."""
    symbols = []
    for row in re.findall(r"^\| (\$.*?) \|", _section(source, "Symbols"), re.M):
        symbols += re.findall(r"\$[^$\n]+\$", row)
    return symbols


def _section(source: Path, title: str) -> str:
    text = re.sub("^# ?", "", source.read_text(), flags=re.M)
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].partition("\n---")[0]


def link_first_uses(texts: Sequence[str], terms: Sequence[str], symbols: Sequence[str], page: str) -> list[str]:
    """The Markdown cells of a chapter with links to a page at the first use of each term (in prose) and symbol."""
    missing = {*terms, *symbols}
    longest_first = sorted(terms, key=len, reverse=True)
    names = "|".join(map(_pattern, longest_first))
    pattern = re.compile(rf"(?P<protected>{_PROTECTED})|(?<![\w-])(?:{names})(?![\w-])", re.S | re.M)

    def link(match: re.Match[str]) -> str:
        name, section = match[0], "Symbols"
        if match["protected"] is None:
            name = next(term for term in longest_first if re.fullmatch(_pattern(term), match[0]))
            section = "Glossary"
        if name not in missing:
            return match[0]
        missing.remove(name)
        return f"[{match[0]}]({page}#{section})"

    return [pattern.sub(link, text) for text in texts]


def _pattern(term: str) -> str:
    """A term, also in the plural, at the start of a sentence, and across the end of a line."""
    first = term[0] if term[0].isupper() else f"[{term[0]}{term[0].upper()}]"
    rest = re.escape(term[1:]).replace(r"\ ", r"\s+")
    if term.endswith("y"):
        return first + rest[:-1] + "(?:y|ies)"
    return first + rest + ("(?:es)?" if term.endswith("x") else "s?")
