"""Settings as YAML files and `key=value` overrides.

A YAML file may extend another one (`extends:`, a path relative to itself) and then holds only the differences.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dimaskdino.config.description import explain
from dimaskdino.config.sections import Config
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import read_text
from dimaskdino.utils.resources import find_config

# a path from the root, a drive, a home or the folder above, at the start of a text or of a value inside it
_PATH = re.compile(r"""(?<![^\s=,'"\[{(])(?:~\w*|\.\.|[A-Za-z]:)?[/\\][^\s,'"\]})][^,'"\]})]*""")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file with everything it extends, then apply `key=value` overrides.

    Args:
        path: the YAML file, or the name of one of the kit's configurations, such as `shapes/dimaskdino_r18`.
        overrides: such as `train.batch_size=8` or `model.selection.k=[300]`; values are YAML.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the message names the nearest one), or a value is
            wrong.
    """
    path = find_config(path)
    return parse_config(read_tree(path), overrides, str(path))


def parse_config(tree: dict[str, Any], overrides: Iterable[str], source: str) -> Config:
    """Apply overrides to a tree of plain values and validate it; `source` names it in error messages (`UserError`)."""
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a configuration has settings (key: value), got {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not of the form key=value, for example train.batch_size=8")
        _put(tree, key.strip().split("."), _parse(value, f"the value of {key}"))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, source, Config)) from None


def dump_config(config: Config) -> str:
    """The whole tree as YAML. `load_config` reads it back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def without_folders(value: Any) -> Any:
    """Shorten paths in plain values to their last part, unless they are relative: folders can name a person."""
    if isinstance(value, str):
        return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    return [without_folders(part) for part in value] if isinstance(value, list) else value


def shared_config(config: Config) -> Config:
    """The configuration that is published with a model, `without_folders`."""
    return Config.model_validate(without_folders(config.model_dump(mode="json")))


YAML_VALUES = 100_000  # what a configuration may hold when its aliases are written out
YAML_LENGTH = 10_000_000  # characters; PyYAML reads a million in some seconds


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML of settings.

    Args:
        text: the YAML.
        what: names it in error messages.

    Raises:
        UserError: it is not YAML, or its aliases stand for an endless or a huge number of values.
    """
    if len(text) > YAML_LENGTH:
        raise UserError(f"{what} has {len(text):,} characters, too many for settings; shorten it")
    try:
        value = yaml.safe_load(text)
        if _count_values(value, {}) > YAML_VALUES:
            raise UserError(f"{what} holds more than {YAML_VALUES:,} values when its aliases are written out")
    except (yaml.YAMLError, ValueError) as error:  # yaml leaves impossible dates and numbers to Python
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{what} is nested too deeply, or an alias refers to itself") from None
    return value


def _count_values(value: Any, known: dict[int, int]) -> int:
    """Number of values with every alias written out; each shared part is counted once and multiplied."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(value)]


def _parse(text: str, what: str) -> Any:
    value = parse_yaml(text, what)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4, which has no dot, as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_tree(path: Path, base_key: str = "extends", _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file of settings, merged over the file that it names under `base_key`, and so on.

    Raises:
        UserError: a file is missing, is not YAML, holds no settings, or extends itself.
    """
    path = path.resolve()
    if path in _seen:
        raise UserError(f"{path} extends itself, by way of {', '.join(p.name for p in _seen)}")
    tree = _parse(read_text(path, "configuration"), str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold settings (key: value), got {type(tree).__name__}")
    base = tree.pop(base_key, None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: {base_key} must be the path of a YAML file, got {base!r}")
    return _merge(read_tree(path.parent / base, base_key, (*_seen, path)), tree) if base else tree


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value
