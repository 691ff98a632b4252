"""Builds Python values from JSON by their annotations: dataclasses, tuples, dictionaries, literals, unions, numbers.

An error names the place in the document, what was needed there and what was found.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..errors import ConfigError, LayerSkipError

_LARGEST = 2**53  # the largest integer: beyond it floats are not exact
_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", NoneType: "null", dict: "an object"}


class SchemaError(LayerSkipError):
    """A value does not fit its annotation."""


def build(kind: Any, value: Any, where: str) -> Any:
    """The value as `kind`: objects become dataclasses, lists become tuples, and whole numbers floats where `kind` is float.

    Fields that a TypedDict lacks are not an error. Raises SchemaError.
    """
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _union(get_args(kind), value, where)
    if origin is Literal:
        return _literal(get_args(kind), value, where)
    if origin is tuple:
        item, _ = get_args(kind)
        return tuple(build(item, entry, f"{where}[{place}]") for place, entry in enumerate(_list(value, where)))
    if origin in (list, dict):
        return _collection(kind, value, where)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        return {name: build(hints.get(name, Any), entry, _path(where, name)) for name, entry in _object(value, where).items()}
    if isinstance(kind, type) and issubclass(kind, tuple):  # a NamedTuple
        return _named_tuple(kind, value, where)
    return _plain(kind, value, where)


def require_fields(kind: Any, value: Any, where: str) -> None:
    """Checks an object against a dataclass without building one. Unknown names are allowed, and fields may be missing."""
    hints = get_type_hints(kind)
    for name, entry in _object(value, where).items():
        hint = hints.get(name, Any)
        if is_dataclass(hint):
            require_fields(hint, entry, _path(where, name))
        else:
            build(hint, entry, _path(where, name))


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    entries, hints = _object(value, where), get_type_hints(kind)
    for name in entries:
        if name not in hints:
            raise SchemaError(f"{where}: {name!r:.60} is not one of its fields")
    arguments = {}
    for field in fields(kind):
        if field.name in entries:
            arguments[field.name] = build(hints[field.name], entries[field.name], _path(where, field.name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise SchemaError(f"{_path(where, field.name)} is missing")
    try:
        return kind(**arguments)
    except ConfigError as error:  # from its own checks; what it names in backquotes is no flag here
        raise SchemaError(f"{where}: {str(error).replace('`', '')}") from None


def _named_tuple(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    entries = _list(value, where)
    fewest = len(hints) - len(kind._field_defaults)
    if not fewest <= len(entries) <= len(hints):
        needed = f"{len(hints)}" if fewest == len(hints) else f"{fewest} to {len(hints)}"
        raise SchemaError(f"{where}: needed {needed} values, found {len(entries)}")
    pairs = zip(hints.values(), entries, strict=False)
    return kind(*(build(hint, entry, f"{where}[{place}]") for place, (hint, entry) in enumerate(pairs)))


def _collection(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return [build(item, entry, f"{where}[{place}]") for place, entry in enumerate(_list(value, where))]
    _, item = get_args(kind)
    return {name: build(item, entry, _path(where, name)) for name, entry in _object(value, where).items()}


def _union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The value as the first kind that fits. Otherwise raises the error of the last kind that is not null."""
    last: SchemaError | None = None
    for kind in kinds:
        if kind is NoneType and value is None:
            return None
        if kind is not NoneType:
            try:
                return build(kind, value, where)
            except SchemaError as error:
                last = error
    raise last or _wrong(NoneType, value, where)


def _literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in choices or type(value) not in {type(choice) for choice in choices}:
        raise SchemaError(f"{where}: needed one of {', '.join(map(str, choices))}, found {_shown(value)}")
    return value


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value) if abs(value) <= _LARGEST else math.inf
    if type(value) is not kind:
        raise _wrong(kind, value, where)
    if (kind is int and abs(value) > _LARGEST) or (kind is float and not math.isfinite(value)):
        raise SchemaError(f"{where}: needed a number in range, found {_shown(value)}")
    return value


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(dict, value, where)
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise SchemaError(f"{where}: needed a list, found {_shown(value)}")
    return value


def _wrong(kind: Any, value: Any, where: str) -> SchemaError:
    return SchemaError(f"{where}: needed {_NAMES.get(kind, kind)}, found {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return "null" if value is None else f"{value!r:.60}"


def _path(where: str, name: str) -> str:
    return f"{where}.{name:.60}" if where else f"{name:.60}"
