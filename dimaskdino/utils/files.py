"""Writing files atomically, and reading JSON files that a crash may have damaged."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dimaskdino.utils.errors import UserError, explain_os_error, first_line, writing


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that readers see the old or the new content, never a part.

    The content is written to a new file beside the target, flushed to disk, and renamed. A link is therefore replaced,
    and what it points to stays as it is. Missing folders are created.

    Args:
        path: the target.
        write: function that writes the content to the path it is called with, which has the suffix of the target.

    Raises:
        UserError: the file cannot be written, for example because the disk is full. An existing file is kept.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: {explain_os_error(OSError(errno.EISDIR, os.strerror(errno.EISDIR)))}")
    if path.exists() and not path.is_file():  # a device or a pipe, which a file would replace
        raise UserError(f"cannot write {path}: it is no regular file; choose another name")
    partial, is_ours = _fresh(path), False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
        is_ours = True
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
        why = explain_os_error(system_error) if system_error else first_line(error)
        kept = "; the file that was there is kept" if path.exists() else ""
        raise UserError(f"cannot write {path}: {why}{kept}") from None
    finally:
        if is_ours:
            _discard(partial)  # unless it was renamed


def _fresh(path: Path) -> Path:
    """A name beside a path that no other call uses."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")


def refuse_existing(paths: Iterable[Path], overwrite: bool, insist: str = "--overwrite") -> None:
    """Refuse to replace files of the user.

    Args:
        paths: the files to be written.
        overwrite: replace them.
        insist: how a user says so, for the message.

    Raises:
        UserError: one of them exists, be it a link that leads nowhere.
    """
    found = [path for path in paths if os.path.lexists(path) and not overwrite and not path.is_dir()]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(f"{found[0]}{more} would be replaced; choose another name, or add {insist}")


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
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already; choose another folder or delete it")
    partial, is_ours = _fresh(folder), False
    try:
        with writing(folder):
            partial.mkdir(parents=True)
            is_ours = True
            yield partial
            partial.rename(folder)
    finally:
        if is_ours:
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


def require_regular(file: Path) -> None:
    """Check that a file is no pipe and no device, which may never end.

    Raises:
        UserError: it is one.
    """
    if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
        raise UserError(f"{file} is no regular file but a pipe or a device; give a regular file")


def read_text(file: Path, what: str = "", errors: str = "strict") -> str:
    """Read a text file of UTF-8, with or without a byte order mark.

    Args:
        file: the file.
        what: what it holds, for the message.
        errors: what to do with bytes that are not UTF-8, as for `open`.

    Raises:
        UserError: it is missing, no regular file, or not in UTF-8.
    """
    require_regular(file)
    try:
        return file.read_text(encoding="utf-8-sig", errors=errors)
    except OSError as error:
        raise UserError(f"cannot read {f'the {what} ' if what else ''}{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not in UTF-8; save it in that encoding") from None


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be written; json and YAML can spell half a character."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if the file is damaged or missing."""
    try:
        return parse_json_object(read_text(file, errors="replace"))
    except UserError:
        return {}


def parse_json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; empty if the text is damaged or holds something else."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}
