"""Progress bars for terminals, pipes and notebooks."""

import math
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
TERMINAL_SECONDS, PIPE_SECONDS = 1.0, 30.0
LINE = "{desc}: {n_fmt} of {total_fmt}{postfix}, {rate_fmt}, {elapsed} passed, {remaining} left"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}{postfix}, {rate_fmt}, {elapsed} passed"
PIPED = "DIMASKDINO_PIPED"  # set for a notebook whose standard error goes to a pipe or a log file


class _Lines(tqdm):
    """A bar for pipes and log files, where a line cannot be overwritten: every update is a line of its own."""

    _shown: float | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line, unless the last one has the same count."""
        if msg != "" and self.n != self._shown:
            self.fp.write(f"{self}\n")
            self.fp.flush()
            self._shown = self.n
        return True

    def clear(self, nolock: bool = False) -> None:
        """No-op: printed lines cannot be cleared."""

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
        """Print nothing: tqdm would print bars with carriage returns; only `display` prints."""
        return lambda text: None


def progress_bar(
    iterable: Iterable[T] | None = None,
    description: str = "",
    total: int | None = None,
    log_by_hand: bool = False,
    **options: Any,
) -> Any:
    """Return a bar with the count, the speed and the remaining time, on standard error.

    A terminal or a notebook is updated about every second. A pipe or a log file receives a line every 30 seconds.

    Args:
        iterable: the items to count; None for a bar that is updated by hand.
        description: the activity, such as `evaluating val`.
        total: number of items; by default the length of `iterable`.
        log_by_hand: in a pipe, write a line at every call of `set_postfix` instead of every 30 seconds. For bars that
            are updated by hand.
        options: further arguments of `tqdm`, such as `unit`.
    """
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    overwrites = PIPED not in os.environ if in_notebook else sys.stderr.isatty()
    pipe_seconds = math.inf if log_by_hand else PIPE_SECONDS
    options.setdefault("mininterval", TERMINAL_SECONDS if overwrites else pipe_seconds)
    options.setdefault("maxinterval", 10 * options["mininterval"])
    if not overwrites:
        known = total is not None or hasattr(iterable, "__len__")
        return _Lines(iterable, description, total, bar_format=LINE if known else LINE_WITHOUT_TOTAL, **options)
    known_width = not in_notebook and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    width = {"dynamic_ncols": True} if known_width else {"ncols": 100}
    return tqdm(iterable, description, total, **width, **options)
