"""YAML read strictly: an unknown, misspelt or repeated key is an error that names it.

It is never a setting left silently at its default.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastmtp.cli import InputError
from fastmtp.inputs import existing

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key written twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        for number, (name, _) in enumerate(node.value):
            if name.value in names[:number] and name.value != "<<":
                problem = f"the key '{name.value}' is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, name.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, what: str = "file") -> Any:
    """What a YAML file holds, None if it is empty. Raises InputError naming the file and the line."""
    path = existing(path, what)
    try:
        value = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        return value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"{path}{line}: not YAML ({reason}); fix this line") from None
    except UnicodeError:  # also half of a surrogate pair, written as an escape
        raise InputError(f"{path}: not UTF-8 text; give a YAML file") from None
    except (ValueError, TypeError, RecursionError) as error:  # a date that is none, endless nesting
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: a value is not valid YAML ({reason}); fix it") from None


def read_mapping(path: str | Path, what: str = "file") -> dict:
    """A YAML file that holds a mapping of names to values. Raises InputError for anything else."""
    value = read_yaml(path, what)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a mapping of keys to values, found {_kind_of(value)}; fix it")
    for name in value:
        if not isinstance(name, str):
            raise InputError(f"{path}: the key {name!r} is not a text; put it in quotes")
    return value


def load_yaml(path: str | Path, kind: type[T]) -> T:
    """A YAML file as the dataclass `kind`. InputError names the file and the key that does not fit."""
    value = read_yaml(path)
    return _build(kind, {} if value is None else value, str(path), "")


def _kind_of(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _build(kind: Any, value: Any, place: str, key: str) -> Any:
    """`value` (from YAML) as `kind`: a dataclass, a union, a list, a dict or a plain type."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, place, key)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _build(next(a for a in args if a is not type(None)), value, place, key)
    if origin is list and isinstance(value, list):
        return [_build(args[0], v, place, f"{key}[{n}]") for n, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            _build(args[0], n, place, key): _build(args[1], v, place, f"{key}.{n}") for n, v in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise InputError(f"{place}: '{key}' must be {getattr(origin or kind, '__name__', kind)}, not {value!r}")


def _build_dataclass(kind: Any, value: Any, place: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{place}: '{key or kind.__name__}' must be a block of keys, not {value!r}")
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise InputError(
                f"{place}: unknown key '{f'{key}.{name}'.lstrip('.')}'; known: {', '.join(hints)}"
            )
    missing = dataclasses.MISSING
    for item in dataclasses.fields(kind):
        if item.default is missing and item.default_factory is missing and item.name not in value:
            raise InputError(f"{place}: '{f'{key}.{item.name}'.lstrip('.')}' is missing; add it")
    return kind(**{n: _build(hints[n], v, place, f"{key}.{n}".lstrip(".")) for n, v in value.items()})
