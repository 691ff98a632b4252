"""How a setting is declared: its type, its range and its flag stand together in one annotation.

    num_draft_tokens: Annotated[int, Meta(ge=1, le=10_000), Flag(DECODING, "Most draft tokens per round.", "--spec")]

The command line makes a flag of it. `checked` tests what a user gave: a flag, a Python option, JSON or TOML.
Settings that our own code makes are not checked.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from .checks import refused, shown

# The headings of --help, in their order.
PANELS = (
    INPUT, MODEL, SERVER, RECIPE, RETENTION, EXIT_BLOCKS, OPTIMISATION, TASK, DATA, DECODING, SAMPLING, PROMPTING, ADAPTERS,
    RUN, MEASUREMENT, WEIGHTS, MACHINE, OUTPUT,
) = (
    "Input", "Model", "Server", "Recipe", "Retention", "Exit blocks", "Optimisation", "Task", "Data", "Decoding", "Sampling",
    "Prompting", "Adapters", "Run", "Measurement", "Weights", "Machine", "Output",
)  # fmt: skip
_KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", dict: "an object"}


@dataclass(frozen=True)
class Flag:
    """How the command line gives a field, and under which heading of --help.

    Args:
        panel: the heading.
        help: one sentence.
        flag: its spelling where it is not the field's name; several with slashes between.
        default: shown in --help where the field has no default of its own.
        parse: makes the value from a text, given the field's name for errors.
        optional: a value that may follow the flag; without one `parse` gets an empty text.
    """

    panel: str
    help: str
    flag: str | None = None
    default: str | None = None
    parse: Callable[[str, str], object] | None = None
    optional: str | None = None


def one_of(*names: str) -> Meta:
    """The constraint of a text that names one of a few things."""
    return Meta(pattern=f"^({'|'.join(names)})$", description=f"one of {', '.join(names)}")


# Text without lone surrogates, which stand for the bytes of an argument that is not valid UTF-8.
UNICODE = Meta(min_length=1, pattern="^[^\ud800-\udfff]*$", description="a text of valid Unicode that is not empty")
Text = Annotated[str, UNICODE]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]  # what numpy, torch and transformers all take


def checked(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a user gave for the fields of `kind`, converted to their types. None is as if it were left out.

    Raises:
        TypeError: a name is no field.
        ConfigError: a value has another type or is out of its range.
    """
    hints = hints_of(kind)
    for name in values:
        if name not in hints:
            raise TypeError(f"unknown option {name!r}; known: {', '.join(hints)}")
    return {name: check(name, hints[name], value) for name, value in values.items() if value is not None}


def check(field: str, hint: Any, value: Any) -> Any:
    """The value as its annotation says; a number or array of NumPy counts as Python's. Raises ConfigError."""
    try:
        return msgspec.convert(_plain(value), hint)
    except msgspec.ValidationError as error:
        wrong_type = ", got `" in str(error)
        raise refused(field, needed(hint), shown(repr(value) if wrong_type else value)) from None


def needed(hint: Any) -> str:
    """What a value must be: `a whole number in 1..10000`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        meta = next((note for note in parts[1:] if isinstance(note, Meta)), None)
        if meta is None:
            return needed(parts[0])
        return meta.description or f"{_KINDS[parts[0]]} {_range(meta, whole=parts[0] is int)}"
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin in (Union, UnionType):
        return " or ".join(needed(part) for part in parts if part is not NoneType)
    if origin is not None and issubclass(origin, Sequence):
        return f"a list, each {needed(parts[0])}"
    return _KINDS[hint]


def flag_of(hint: Any) -> Flag | None:
    """The Flag in an annotation."""
    return next((note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Flag)), None)


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a kind's fields, with their metadata."""
    return get_type_hints(kind, include_extras=True)


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, ranges and other iterables as Python's numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return [_plain(entry) for entry in value]
    return value


def _range(meta: Meta, whole: bool) -> str:
    low, high = (meta.gt if meta.ge is None else meta.ge), (meta.lt if meta.le is None else meta.le)
    if high is None:
        return f"{'above' if meta.ge is None else 'of at least'} {low:g}"
    if whole:
        return f"in {low}..{high}"
    return f"in {'(' if meta.ge is None else '['}{low:g}, {high:g}{')' if meta.le is None else ']'}"
