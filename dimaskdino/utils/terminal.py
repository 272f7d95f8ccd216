"""Text on a terminal, also where it comes from files of others."""

import contextlib
import os
import sys
import unicodedata
from typing import TextIO

# control and format characters, such as bidirectional marks, bytes that are no text, and ends of lines and paragraphs
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # of letters and emojis


def printable(text: object) -> str:
    r"""Escape what could forge a line or steer a terminal: a line end becomes `\n`. Escaped text stays as it is."""
    return "".join(
        ascii(character)[1:-1]
        if unicodedata.category(character) in _HIDDEN and character not in _JOINERS
        else character
        for character in str(text)
    )


def print_lines(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, each of which stays one line: names of files and classes may hold anything.

    Args:
        lines: the lines.
        file: standard output by default.
    """
    print(*map(printable, lines), sep="\n", file=file)


def accept_all_text() -> None:
    """Accept every character in names of files, arguments and output, whatever the locale.

    A process in a locale of ASCII, whose files cannot be found by names of other letters, is replaced by one in
    Python's UTF-8 mode. Standard output and error escape characters that their encoding lacks.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
