"""Links from the first use of a term in a chapter to its explanation in chapter 0."""

import re
from collections.abc import Sequence
from pathlib import Path

# what is not prose: code, formulas, links, HTML, headings
_PROTECTED = re.compile(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|!?\[[^\]]*\]\([^)]*\)|<[^>]*>|^#+ .*?$", re.S | re.M)
_SYMBOL = re.compile(r"\$[^$\n]+\$")


def terms_of(source: Path) -> list[str]:
    """The terms of a chapter's section *Glossary*, each entry `* **term, another name**: what it is`."""
    section = _section(source, "Glossary")
    return [name.strip() for entry in re.findall(r"\* \*\*([^*]+)\*\*:", section) for name in entry.split(",")]


def symbols_of(source: Path) -> list[str]:
    """The symbols in the first column of a chapter's section *Symbols*, such as `$T_i$`."""
    rows = re.findall(r"^\| (\$.*?) \|", _section(source, "Symbols"), re.M)
    return [symbol for row in rows for symbol in _SYMBOL.findall(row)]


def _section(source: Path, title: str) -> str:
    text = "\n".join(re.sub("^# ?", "", line) for line in source.read_text().splitlines())
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].partition("\n---")[0]


def link_first_uses(texts: Sequence[str], terms: Sequence[str], symbols: Sequence[str], page: str) -> list[str]:
    """The Markdown cells of a chapter with links at the first use of each term and symbol.

    Args:
        texts: the cells, in their order.
        terms: names to look for in prose, also in the plural.
        symbols: formulas to look for.
        page: the page that explains them, such as `00_detr.ipynb`.
    """
    linked, missing, unknown = [], list(terms), list(symbols)
    for text in texts:
        parts, place = [], 0
        for match in _PROTECTED.finditer(text):
            parts.append(_link_terms(text[place : match.start()], missing, page))
            if match[0] in unknown:
                unknown.remove(match[0])
                parts.append(f"[{match[0]}]({page}#Symbols)")
            else:
                parts.append(match[0])
            place = match.end()
        parts.append(_link_terms(text[place:], missing, page))
        linked.append("".join(parts))
    return linked


def _link_terms(prose: str, missing: list[str], page: str) -> str:
    """Prose with links at the terms that are still missing; found terms are taken from the list."""
    if not missing:
        return prose
    longest_first = sorted(missing, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w-])({'|'.join(map(_pattern, longest_first))})(?![\w-])")

    def link(match: re.Match[str]) -> str:
        term = next(term for term in longest_first if re.fullmatch(_pattern(term), match[0]))
        if term not in missing:
            return match[0]
        missing.remove(term)
        return f"[{match[0]}]({page}#Glossary)"

    return pattern.sub(link, prose)


def _pattern(term: str) -> str:
    """A term, also in the plural, at the start of a sentence, and across the end of a line."""
    first = term[0] if term[0].isupper() else f"[{term[0]}{term[0].upper()}]"
    rest = re.escape(term[1:]).replace(r"\ ", r"\s+")
    if term.endswith("y"):
        return first + rest[:-1] + "(?:y|ies)"
    return first + rest + ("(?:es)?" if term.endswith("x") else "s?")
