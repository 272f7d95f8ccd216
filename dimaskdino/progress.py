"""Progress bars that suit terminals, pipes and notebooks."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
TERMINAL_SECONDS, PIPE_SECONDS = 1.0, 30.0


def progress_bar(
    iterable: Iterable[T] | None = None, description: str = "", total: int | None = None, **options: Any
) -> Any:
    """A bar with the count, the rate and the remaining time, on standard error.

    A terminal is updated about every second. A pipe or a log file gets a line every 30 seconds.

    Args:
        iterable: what to count; None for a bar that is updated by hand.
        description: what is going on, such as `evaluating val`.
        total: number of items; by default the length of `iterable`.
        options: further arguments of `tqdm`, such as `unit`.
    """
    terminal = sys.stderr.isatty()
    options.setdefault("mininterval", TERMINAL_SECONDS if terminal else PIPE_SECONDS)
    options.setdefault("maxinterval", 10 * options["mininterval"])
    known_width = terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    width = {"dynamic_ncols": True} if known_width else {"ncols": 100}
    return tqdm(iterable, description, total, **width, **options)
