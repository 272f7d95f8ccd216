"""Progress that suits terminals, pipes and notebooks."""

import math
import os
import re
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
TERMINAL_SECONDS, PIPE_SECONDS = 1.0, 30.0
LINE = "{desc}: {n_fmt} of {total_fmt}{postfix}, {rate_fmt}, {elapsed} passed, {remaining} left"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}{postfix}, {rate_fmt}, {elapsed} passed"


class _Lines(tqdm):
    """A bar for pipes and log files, where a line cannot be overwritten: every update is a line of its own."""

    _shown: int | float | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line, unless the last one has the same count."""
        if msg != "" and self.n != self._shown:
            self.fp.write(f"{self}\n")
            self.fp.flush()
            self._shown = self.n
        return True

    def clear(self, nolock: bool = False) -> None:
        """There is nothing to take back."""

    @classmethod
    def write(cls, s: str, file: TextIO | None = None, end: str = "\n", nolock: bool = False) -> None:
        """Write a line of text."""
        print(s, end=end, file=file or sys.stdout, flush=True)

    def close(self) -> None:
        """Write the last line."""
        if not self.disable:
            self.display()
            self.leave, self.pos = False, 1  # as a bar inside another one, which tqdm ends without a line end
        super().close()

    @staticmethod
    def status_printer(file: Any) -> Any:
        """Tqdm prints bars with carriage returns; here only `display` prints."""
        return lambda text: None


def progress_bar(
    iterable: Iterable[T] | None = None,
    description: str = "",
    total: int | None = None,
    log_by_hand: bool = False,
    **options: Any,
) -> Any:
    """A bar with the count, the rate and the remaining time, on standard error.

    A terminal or a notebook is updated about every second. A pipe or a log file gets a line every 30 seconds.

    Args:
        iterable: what to count; None for a bar that is updated by hand.
        description: what is going on, such as `evaluating val`.
        total: number of items; by default the length of `iterable`.
        log_by_hand: in a pipe, write a line at every call of `set_postfix` instead of every 30 seconds. For bars that
            are updated by hand.
        options: further arguments of `tqdm`, such as `unit`.
    """
    overwrites, pipe_seconds = can_overwrite(sys.stderr), math.inf if log_by_hand else PIPE_SECONDS
    options.setdefault("mininterval", TERMINAL_SECONDS if overwrites else pipe_seconds)
    options.setdefault("maxinterval", 10 * options["mininterval"])
    if not overwrites:
        known = total is not None or hasattr(iterable, "__len__")
        return _Lines(iterable, description, total, bar_format=LINE if known else LINE_WITHOUT_TOTAL, **options)
    known_width = not _is_notebook(sys.stderr) and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    width = {"dynamic_ncols": True} if known_width else {"ncols": 100}
    return tqdm(iterable, description, total, **width, **options)


def can_overwrite(stream: TextIO) -> bool:
    """Whether a line can be written over what is there: in a terminal and a notebook, not in a pipe or a file."""
    return stream.isatty() or _is_notebook(stream)


def _is_notebook(stream: TextIO) -> bool:
    return type(stream).__module__.startswith("ipykernel")


class PipedBars:
    """A stream for a pipe that receives bars with carriage returns, such as a notebook writes them, as lines.

    Of a line that is overwritten the pipe gets a version every 30 seconds and the last one; other text at once.
    """

    def __init__(self, pipe: TextIO) -> None:
        self._pipe, self._line, self._overwritten, self._passed_on = pipe, "", False, -math.inf

    def write(self, text: str) -> int:
        """Add text; what is complete, or has waited long enough, is passed on as lines."""
        for part in re.split(r"([\r\n])", text):
            if part == "\n":
                if self._line.strip() or not self._overwritten:
                    self._pass_on()
                self._line, self._overwritten = "", False
            elif part == "\r":
                if self._line.strip() and time.monotonic() - self._passed_on >= PIPE_SECONDS:
                    self._pass_on()
                self._line, self._overwritten = "", True
            else:
                self._line += part
        return len(text)

    def _pass_on(self) -> None:
        self._pipe.write(f"{self._line.rstrip()}\n")
        self._passed_on = time.monotonic()

    def flush(self) -> None:
        """Flush the pipe; the line that has no end yet waits for it."""
        self._pipe.flush()

    def close(self) -> None:
        """Pass on the line that has no end yet. The pipe stays open."""
        if self._line.strip():
            self._pass_on()
        self._line = ""
        self._pipe.flush()
