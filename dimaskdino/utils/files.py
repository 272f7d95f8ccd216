"""Writing files atomically, and reading JSON files that a crash may have damaged."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dimaskdino.utils.errors import UserError, explain_os_error, first_line, writing


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that readers see the old or the new content, never a part.

    The content is written to a file beside the target, flushed to disk, and renamed. Missing folders are created.

    Args:
        path: the target.
        write: function that writes the content to the path it is called with.

    Raises:
        UserError: the file cannot be written, for example because the disk is full. An existing file is kept.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        permissions = partial.stat().st_mode
        write(partial)
        with contextlib.suppress(OSError):  # file systems without permissions
            partial.chmod(permissions)  # safetensors creates files that only their owner can read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    # on a full disk Python raises OSError; torch and safetensors raise RuntimeError and SafetensorError
    except (OSError, RuntimeError, SafetensorError) as error:
        system_error = _system_error(partial, error)
        _discard(partial)
        why = explain_os_error(system_error) if system_error else first_line(error)
        kept = "; the file that was there is kept" if path.exists() else ""
        raise UserError(f"cannot write {path}: {why}{kept}") from None


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder that appears when the `with` block ends well; nothing is left otherwise.

    Yields:
        The path to write to until then.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder or delete it")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            yield partial
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _discard(partial: Path) -> None:
    """Delete a file, and free its disk space even if a writer still has it open."""
    with contextlib.suppress(OSError):
        os.truncate(partial, 0)
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)


def _system_error(path: Path, error: Exception) -> OSError | None:
    """Find the operating system's error behind a failed write.

    safetensors has its number in the message. torch drops it, so this function writes to the file again.
    """
    if isinstance(error, OSError):
        return error
    if number := re.search(r"os error (\d+)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    try:
        with path.open("ab") as file:
            file.write(bytes(1 << 16))
    except OSError as reason:
        return reason
    return None


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if the file is damaged or missing."""
    try:
        return parse_json_object(file.read_text(errors="replace"))
    except OSError:
        return {}


def parse_json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; empty if the text is damaged or holds something else."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}
