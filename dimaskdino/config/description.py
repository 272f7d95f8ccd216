"""Settings in words: their keys, types and meanings, and what is wrong with a value."""

import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from dimaskdino.config.sections import Config, Section


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [s for part in typing.get_args(annotation) for s in _sections(part)]
    return []


def keys_of(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, leaves only."""
    keys = []
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        keys += [k for s in inner for k in keys_of(s, f"{prefix}{name}.")] or [prefix + name]
    return keys


def describe_settings(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """A line per setting: its key, default, type and meaning."""
    lines = []
    for name, field in section.model_fields.items():
        key, inner = prefix + name, _sections(field.annotation)
        if not inner or field.default is None:
            meaning = f"  # {field.description}" if field.description else ""
            lines.append(f"{key}={as_yaml(field.default)}  ({_type_name(field.annotation, field.metadata)}){meaning}")
        for each in inner:
            lines += describe_settings(each, f"{key}.")
    return lines


def as_yaml(value: Any) -> str:
    """A value of a setting on one line, as `key=value` takes it."""
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _type_name(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """A type for people: `int > 0`, `one of frozen, batch`, `list of int > 0`, `float or null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0], [*arguments[1:], *limits])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if x is types.NoneType else _type_name(x, limits) for x in arguments)
    name = {Path: "path", str: "text", bool: "true or false"}.get(
        annotation, getattr(annotation, "__name__", "section")
    )
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [(sign, getattr(x, kind)) for x in limits for kind, sign in signs.items() if hasattr(x, kind)]
    bounds = [f"{sign} {bound}" for sign, bound in found if bound < 2**16]  # no one asks for more
    return " ".join([name, " and ".join(bounds)]).strip()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def explain(error: ValidationError, source: str, root: type[Section]) -> str:
    """One line for the problems that pydantic found; an unknown key comes with the nearest known one.

    Args:
        error: what pydantic raised.
        source: the file, for the message.
        root: the section that was validated.
    """
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, keys_of(root), n=1, cutoff=0) or [""]
            lines.append(f"unknown setting '{key}'; did you mean '{near[0]}'?")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"]))
        else:
            lines.append(f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {_short(problem['input'])}")
    return f"{source}: " + "; ".join(lines)
