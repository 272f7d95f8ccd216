"""Your own modules and functions, named in a configuration as `MODULE:NAME`.

No file runs code by itself: a module is imported only after it was allowed, by `--plugin MODULE` on the command line or
`dimaskdino.load(..., plugins=["MODULE"])`. It is searched in the installed packages and in the folder from which it was
allowed, which is appended to Python's path. An environment variable passes the permission on to subprocesses: training
processes, torchrun's workers and the kernels of notebooks.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import parse_json_object

_VARIABLE = "DIMASKDINO_PLUGINS"  # {module: folder} as json
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Named(Protocol):
    """A section of the configuration that names an object: `MODULE:NAME`, and its keyword arguments."""

    @property
    def type(self) -> str | None: ...
    @property
    def options(self) -> dict[str, Any]: ...


def allow(modules: Iterable[str]) -> None:
    """Allow this process and its subprocesses to import modules, and the modules inside them.

    Args:
        modules: dotted names, such as `my_project.gates`; or one name.

    Raises:
        UserError: a name is not the dotted name of a module.
    """
    allowed = _allowed()
    for module in [modules] if isinstance(modules, str) else modules:
        if not _NAME.fullmatch(module):
            raise UserError(f"'{module}' is not the name of a Python module, such as my_project.gates")
        allowed[module] = os.getcwd()
    os.environ[_VARIABLE] = json.dumps(allowed)


def _allowed() -> dict[str, str]:
    """Folders by module. Anything else in the variable allows nothing."""
    allowed = parse_json_object(os.environ.get(_VARIABLE, ""))
    return {module: folder for module, folder in allowed.items() if isinstance(folder, str)}


def _folder_of(module: str) -> str | None:
    """The folder from which a module, or a package around it, was allowed; None if it was not."""
    return next((folder for known, folder in _allowed().items() if f"{module}.".startswith(f"{known}.")), None)


def resolve(name: str, key: str) -> Any:
    """Import the object that a setting names.

    Args:
        name: `MODULE:NAME`.
        key: the setting, for error messages.

    Raises:
        UserError: the module is not allowed or cannot be imported, or does not define such an object itself.
    """
    module, _, attribute = name.partition(":")
    folder = _folder_of(module)
    if folder is None:
        raise UserError(
            f"{key} = {name} needs the module {module}, which may not run yet: if you trust it, add --plugin {module}, "
            f"in Python load(..., plugins=['{module}'])"
        )
    _append_to_path(folder)
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{key} = {name}: {error}, neither installed nor in {folder}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{key} = {name}: the module cannot be imported: {describe(error)}") from error
    try:
        found = reduce(getattr, attribute.split("."), imported)
    except AttributeError as error:
        raise UserError(f"{key} = {name}: {error}") from None
    if _folder_of(getattr(found, "__module__", "")) is None:  # or all that it imports would be allowed, too
        raise UserError(f"{key} = {name}: {attribute} is not defined in {module}; name the module that defines it")
    return found


def check_shape(tensor: Any, shape: Sequence[int], key: str) -> Any:
    """Return what a user's function returned.

    Raises:
        UserError: it is no tensor of this shape.
    """
    found = getattr(tensor, "shape", None)
    if found is None or tuple(found) != tuple(shape):
        returned = type(tensor).__name__ if found is None else f"the shape {tuple(found)}"
        raise UserError(f"{key} returned {returned}, expected a tensor of shape {tuple(shape)}")
    return tensor


def describe(error: BaseException) -> str:
    """An error in a user's own code: its type, message and line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def build(section: Named, key: str, *arguments: Any) -> Any:
    """Make the module that a section names with its options, None if it names none.

    Args:
        section: `type` is called with the arguments and, as keyword arguments, `options`.
        key: the section, for error messages.
        arguments: such as the settings of the model.

    Raises:
        UserError: as `resolve`, or the options do not fit.
    """
    if section.type is None:
        return None
    factory = resolve(section.type, f"{key}.type")
    try:
        return factory(*arguments, **section.options)
    except TypeError as error:
        raise UserError(f"{key}: {section.type} cannot be made with the options {section.options}: {error}") from error


def hashes() -> dict[str, str]:
    """SHA-256 of the source of every allowed module; of a package, of all its files."""
    found = {}
    for module, folder in _allowed().items():
        _append_to_path(folder)
        with contextlib.suppress(ImportError):
            spec = importlib.util.find_spec(module)
            if spec is None:
                continue
            files = [Path(spec.origin)] if spec.has_location and spec.origin else []  # a built-in module has no file
            for place in spec.submodule_search_locations or ():
                files += sorted(Path(place).rglob("*.py"))
            digest = hashlib.sha256()
            for file in files:
                digest.update(file.read_bytes())
            found[module] = digest.hexdigest()
    return found


def _append_to_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
