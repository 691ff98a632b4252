"""Declares settings: one annotation has the type, range and flag of a field.

  num_draft_tokens: Annotated[int, Meta(ge=1, le=10_000), Flag("Most draft tokens per round.",
  "--spec")]

`checked` validates values that users give (flags, Python options, JSON, TOML).
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from ..errors import refused, require, shown

Panel = Literal[
    "Input", "Model", "Server", "Recipe", "Drafter", "Optimisation", "Task", "Data", "Decoding", "Sampling",
    "Prompting", "Adapters", "Run", "Measurement", "Weights", "Machine", "Output",
]  # the headings of --help, in their order  # fmt: skip
_MOST_COUNTS = 10_000  # in a list of counts
_KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
}


@dataclass(frozen=True)
class Flag:
    """A field's flag on the command line."""

    help: str
    flag: str | None = None  # its spellings, with slashes between them; None: the field's name
    default: str | None = None  # in --help
    # Heading of --help. None: that of the field declared before, so a field that moves may need one
    panel: Panel | None = None
    repeated: bool = False
    optional: str | None = None  # a value that may follow; without it the field is True
    # Its existence is checked before torch is imported
    reads: Literal["file", "data", "perhaps data", "model"] | None = None


class Without(tuple[str, ...]):
    """In the annotation of a group of settings: those without a flag in this command."""


def one_of(*names: str) -> Meta:
    """The constraint of a text that is one of these names."""
    return Meta(
        pattern=rf"\A({'|'.join(map(re.escape, names))})\Z",
        description=f"one of {', '.join(names)}",
    )


# Text without lone surrogates, by which Python represents invalid UTF-8 in arguments.
_UNICODE = "a text of valid Unicode that is not empty"
Text = Annotated[str, Meta(min_length=1, pattern="^[^\ud800-\udfff]*$", description=_UNICODE)]
# msgspec 0.22 crashes on a pattern next to a list.
Texts = Annotated[
    Annotated[str, Meta(min_length=1)] | Sequence[Text], Meta(description=f"{_UNICODE}, or several")
]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
CountOrNone = Annotated[int, Meta(ge=0, le=10_000_000)]
Steps = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Layer = Annotated[int, Meta(ge=1)]
Drafts = Annotated[int, Meta(ge=1, le=10_000)]
BatchSize = Annotated[int, Meta(ge=1, le=65_536)]
Share = Annotated[float, Meta(gt=0, le=1)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=1_000)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]  # what numpy, torch and transformers all take
# Thread libraries may crash with many more
Threads = Annotated[int, Meta(ge=0, le=os.cpu_count() or 1)]
_MODELS = "embedded, embedded-base, a folder, a .gguf file or a hub id."
ModelName = Annotated[Text, Flag(_MODELS, panel="Model", reads="model")]


def checked(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts user-given values to `kind`'s field types. Raises TypeError for an unknown name,
    ConfigError for a value.
    """
    hints = hints_of(kind)
    for name in values:
        if name not in hints:
            raise TypeError(f"unknown option {name!r}; known: {', '.join(hints)}")
    return {
        name: check(name, hints[name], value) for name, value in values.items() if value is not None
    }


def check(field: str, hint: Any, value: Any) -> Any:
    """Converts a value to its annotated type; accepts NumPy's numbers and arrays. Raises
    ConfigError.
    """
    try:
        return msgspec.convert(_plain(value), hint, str_keys=True)
    # UnicodeEncodeError: lone surrogates among choices
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        wrong_type = ", got `" in str(error)
        listed = isinstance(value, list | tuple) and not wrong_type
        found = ",".join(map(str, value)) if listed else repr(value) if wrong_type else value
        raise refused(field, needed(hint), shown(found) or "an empty one") from None


def needed(hint: Any) -> str:
    """The requirement in words: `a whole number in 1..10000`."""
    origin = get_origin(hint)
    parts = get_args(hint)
    if origin is Annotated:
        meta = next((note for note in parts[1:] if isinstance(note, Meta)), None)
        if meta is None or meta.description:
            return needed(parts[0]) if meta is None else str(meta.description)
        low = meta.gt if meta.ge is None else meta.ge
        high = meta.lt if meta.le is None else meta.le
        if high is None:
            return f"{_KINDS[parts[0]]} {'above' if meta.ge is None else 'of at least'} {low:g}"
        if parts[0] is int:
            return f"a whole number in {low}..{high}"
        return f"a number in {'(' if meta.ge is None else '['}{low:g}, {high:g}{')' if meta.le is None else ']'}"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(needed(part) for part in parts if part is not NoneType)
    if origin is not None and issubclass(origin, Sequence):
        return f"a list, each {needed(parts[0])}"
    return _KINDS[origin or hint]


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, ranges and other iterables as Python's numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return [_plain(entry) for entry in value]
    return value


def flag_of(hint: Any) -> Flag | None:
    """The Flag in an annotation."""
    return next(
        (note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Flag)), None
    )


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a kind's fields, with their metadata."""
    return get_type_hints(kind, include_extras=True)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a value can have, without metadata and None."""
    if get_origin(hint) is Annotated:
        return alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in alternatives(part))
    return () if hint is NoneType else (hint,)


def parse_list(text: str, field: str, hint: Any) -> tuple[Any, ...]:
    """The parts of a flag with commas, by the list's type: counts, shares (ascending) or names.
    Raises ConfigError.
    """
    (entry, *_) = alternatives(get_args(alternatives(hint)[-1])[0])
    if entry is int:
        return parse_counts(text, field)
    try:
        if entry is float:
            return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise refused(
            field, "a list such as 0.8,0.9 of numbers above 0 and up to 1", repr(shown(text))
        ) from None
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    require(bool(names), field, "a name, or several with commas", repr(text))
    return names


def parse_counts(text: str, field: str) -> tuple[int, ...]:
    """Distinct ascending counts (at most 10,000) from `3,6,8`, `A:B`, `A:B:STEP` or `3,8:12`.
    Raises ConfigError.
    """

    def counts(start: int, stop: int | None = None, step: int = 1) -> Sequence[int]:
        return range(start, (start if stop is None else stop) + 1, step) if step >= 1 else ()

    try:
        ranges = [counts(*map(int, part.split(":"))) for part in text.split(",")]
        count = sum(map(len, ranges))
    # No number, too large a number, or too many parts
    except (ValueError, TypeError, OverflowError):
        ranges = []
    if not ranges or not all(ranges):
        raise refused(
            field,
            "a list such as 3,6,8 or a range A:B:STEP with A <= B and STEP >= 1",
            repr(shown(text)),
        )
    require(count <= _MOST_COUNTS, field, f"at most {_MOST_COUNTS} counts", count)
    return tuple(sorted(set(chain.from_iterable(ranges))))


def counts_text(counts: Sequence[int]) -> str:
    """Ascending counts as `parse_counts` reads them; three or more in a row as a range:
    8,9,14:18.
    """
    numbered = groupby(enumerate(counts), key=lambda pair: pair[1] - pair[0])  # equal within a run
    runs = [[count for _, count in run] for _, run in numbered]
    return ",".join(
        f"{run[0]}:{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs
    )
