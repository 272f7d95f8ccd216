"""Garbage collection, put off while it would only be in the way."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Put garbage collection off for a `with` block, which also decorates functions.

    Every few hundred new objects Python looks through those that exist for cycles. With PyTorch loaded a full search
    takes 0.4 s, and whoever makes hundreds of thousands of dictionaries waits for dozens of them.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
