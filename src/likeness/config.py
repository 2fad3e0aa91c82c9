"""Configuration: read TOML files into frozen dataclasses. An unknown key is an error.

Recipes contain all hyperparameters; a run writes its resolved configuration next to its results.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from likeness.types import InputError

T = TypeVar("T")


def load_toml(path: str | Path | None, cls: type[T], overrides: tuple[str, ...] = ()) -> T:
    """Read `path` into the dataclass `cls`.

    Args:
        path: a TOML file; tables become nested dataclasses. None: the overrides are all there is.
        cls: a dataclass type.
        overrides: `section.key=value` strings, the value in TOML syntax (a bare word is taken as a string).

    Raises:
        InputError: the file is missing, is not TOML, or has a key or type that `cls` does not.
    """
    values = {} if path is None else read_toml(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InputError(f"the override {override!r} must have the form section.key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text
        *tables, last = key.strip().split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise InputError(f"the override {override!r} goes below {name}, which is {table!r}, not a table")
        table[last] = value
    return build(cls, values, where="the settings" if path is None else str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file in UTF-8, with or without byte order mark.

    Raises:
        InputError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of the encoding, or of TOML
        backslash = re.search(r"\\|[Hh]ex", str(error))
        hint = "; in Windows paths, use forward slashes or single quotes" if backslash else ""
        raise InputError(f"{path} is not valid TOML: {error}{hint}") from error


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make the dataclass `cls` from nested mappings, rejecting unknown keys, missing keys and wrong types."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    arguments = {}
    for name, f in fields.items():
        if name in values:
            arguments[name] = _coerce(hints[name], values[name], f"{where}: {name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: the key {name!r} is missing")
    return cls(**arguments)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain nested values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for option in arguments:
            if option is type(None):
                continue
            try:
                return _coerce(option, value, where)
            except InputError as error:
                if not _names_another(option, value):
                    errors.append(error)
        if not errors:
            names = [_name_of(option) for option in arguments]
            raise InputError(f"{where} has the name {value['name']!r}; choose one of {', '.join(map(repr, names))}")
        raise errors[0]
    if origin is typing.Literal:
        if value not in arguments:
            raise InputError(f"{where} is {value!r}; choose one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_coerce(arguments[0], item, where) for item in value)
        if len(value) != len(arguments):
            raise InputError(f"{where} needs {len(arguments)} values, not {len(value)}")
        return tuple(_coerce(option, item, where) for option, item in zip(arguments, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {key: _coerce(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise InputError(f"{where} is too large for a float") from error
    if hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    raise InputError(f"{where} is {value!r}, which is not of type {getattr(hint, '__name__', hint)}")


def _name_of(option: Any) -> str | None:
    """The `name` that distinguishes a dataclass from others: the one value of its Literal field."""
    if not dataclasses.is_dataclass(option):
        return None
    choices = typing.get_args(typing.get_type_hints(option).get("name"))
    return choices[0] if len(choices) == 1 else None


def _names_another(option: Any, value: Any) -> bool:
    """Whether `value` says by its `name` that it is none of these, so that their complaints are of no use."""
    name = _name_of(option)
    return name is not None and isinstance(value, Mapping) and "name" in value and value["name"] != name
