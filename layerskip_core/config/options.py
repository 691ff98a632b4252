"""How a setting is declared: its type, its range and its flag stand together in one annotation.

    num_draft_tokens: Annotated[int, Meta(ge=1, le=10_000), Flag(DECODING, "Most draft tokens per round.", "--spec")]

The command line makes a flag of it. `checked` tests what a user gave: a flag, a Python option, JSON or TOML.
Settings that our own code makes are not checked.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from .checks import refused, require, shown

# The headings of --help, in their order.
PANELS = (
    INPUT, MODEL, SERVER, RECIPE, RETENTION, EXIT_BLOCKS, OPTIMISATION, TASK, DATA, DECODING, SAMPLING, PROMPTING, ADAPTERS,
    RUN, MEASUREMENT, WEIGHTS, MACHINE, OUTPUT,
) = (
    "Input", "Model", "Server", "Recipe", "Retention", "Exit blocks", "Optimisation", "Task", "Data", "Decoding", "Sampling",
    "Prompting", "Adapters", "Run", "Measurement", "Weights", "Machine", "Output",
)  # fmt: skip
MAX_COUNT = 1_000_000_000
_MOST_COUNTS = 10_000  # in a list or range of counts
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
Threads = Annotated[int, Meta(ge=0, le=os.cpu_count() or 1)]  # thread libraries may crash with many more
BatchSize = Annotated[int, Meta(ge=1, le=65_536)]
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
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter for lone surrogates among choices
        wrong_type = ", got `" in str(error)
        listed = isinstance(value, list | tuple) and not wrong_type
        found = ",".join(map(str, value)) if listed else repr(value) if wrong_type else value
        raise refused(field, needed(hint), shown(found) or "an empty one") from None


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


def parse_names(text: str, field: str) -> tuple[str, ...]:
    """Names from `one,two`. Raises ConfigError for none."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    require(bool(names), field, "a name, or several with commas", repr(text))
    return names


def parse_counts(text: str, field: str) -> tuple[int, ...]:
    """Distinct counts in ascending order from `3,6,8`, from `A:B` or `A:B:STEP` with both ends included, or from `3,8:12`.

    Raises ConfigError, also for more than _MOST_COUNTS of them.
    """
    try:
        parts = [[int(number) for number in part.split(":")] for part in text.split(",")]
        if any(abs(number) > MAX_COUNT for numbers in parts for number in numbers):
            raise refused(field, f"counts of at most {MAX_COUNT}", shown(text))
        ranges = [_counts(*numbers) if len(numbers) > 1 else numbers for numbers in parts]
    except (ValueError, TypeError):  # not a number; too many for a range
        ranges = []
    if not ranges or not all(ranges):
        needed = "a list such as 3,6,8 or a range A:B:STEP with A <= B and STEP >= 1"
        raise refused(field, needed, repr(shown(text)))
    count = sum(map(len, ranges))
    if count > _MOST_COUNTS:
        raise refused(field, f"at most {_MOST_COUNTS} counts", str(count))
    return tuple(sorted(set(chain.from_iterable(ranges))))


def parse_shares(text: str, field: str) -> tuple[float, ...]:
    """Distinct shares above 0 and up to 1 in ascending order, from `0.8,0.9`. Raises ConfigError."""
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise refused(field, "a list such as 0.8,0.9 of numbers above 0 and up to 1", repr(shown(text)))
    return tuple(shares)


def counts_text(counts: Sequence[int]) -> str:
    """Ascending counts as `parse_counts` reads them; three or more in a row as a range: 8,9,14:18."""
    runs = [[counts[0]]] if counts else []
    for count in counts[1:]:
        if count == runs[-1][-1] + 1:
            runs[-1].append(count)
        else:
            runs.append([count])
    return ",".join(f"{run[0]}:{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _counts(start: int, stop: int, step: int = 1) -> Sequence[int]:
    """Lazy, so that a huge range costs nothing."""
    return range(start, stop + 1, step) if step >= 1 else ()


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
