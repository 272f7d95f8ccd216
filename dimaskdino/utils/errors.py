"""Exceptions whose message a user reads instead of a traceback."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from dimaskdino.utils.terminal import printable


class _Message(Exception):
    def __str__(self) -> str:
        return "\n".join(map(printable, self.args))


class UserError(_Message):
    """A file, a setting or a disk is wrong. The message says what to do about it; every argument is one line."""


class Stopped(_Message):
    """A run was asked to stop and has saved its state. The message names the signal and says how to resume."""


_REASONS = {
    ("ENOSPC", "EDQUOT"): "the disk is full; free some space and run the command again",
    ("EROFS",): "the disk is read-only; choose a folder on another disk",
    ("EACCES", "EPERM"): "there is no permission to write here; change it or choose another folder",
    ("ENOLCK", "ENOSYS", "EOPNOTSUPP"): "the file system does not support this; choose a folder on a local disk",
    ("ESTALE",): "the network file system lost the file; run the command again",
    ("ENOTDIR", "EEXIST"): "a file is where a folder is needed; choose another name",
    ("EISDIR",): "a folder is where a file is needed; choose another name",
    ("ENAMETOOLONG",): "the name is too long; choose a shorter one",
}
_BY_NUMBER = {getattr(errno, name): text for names, text in _REASONS.items() for name in names if hasattr(errno, name)}


def explain_os_error(error: OSError) -> str:
    """Describe an error of the operating system and what to do about it."""
    text = error.strerror or str(error)
    advice = _BY_NUMBER.get(error.errno) if error.errno is not None else None
    return text if advice is None else f"{advice} ({text})"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn the operating system's errors while writing a file or folder into a `UserError` that names it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        where = os.fspath(path) if not error.filename else os.fsdecode(error.filename)
        raise UserError(f"cannot write {where}: {explain_os_error(error)}") from None
