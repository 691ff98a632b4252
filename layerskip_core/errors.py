"""Errors that a user can cause or fix, the checks that raise them, and the format of values in
messages.

A message says what was needed and what was found. It names settings in backquotes (`exit_layer`);
the command line shows the flags instead.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_SHOWN = 60  # characters of a refused value


class LayerSkipError(Exception):
    """Base of the errors that a command reports in one line: with exit status 2 for a wrong
    setting, else 1.
    """


class ConfigError(LayerSkipError):
    """A setting is outside its range. `field` is its name in the configs; None where no single
    setting is at fault.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CheckpointError(LayerSkipError):
    """A model cannot be found, read, run layer by layer, or written."""


class ContextError(ConfigError):
    """A text does not fit into the model's context. Found while running: exit status 1."""


class MemoryFull(LayerSkipError):
    """The memory for KV entries is full at present: the same request may succeed later."""


class LockedError(LayerSkipError):
    """Another process writes to a folder; the message says which."""


class DataError(LayerSkipError):
    """A data set cannot be found or one of its rows cannot be used; the message names file and
    line.
    """


class TrainingError(LayerSkipError):
    """Training cannot go on: the message names the step and the last good checkpoint."""


class TrainingInterrupted(LayerSkipError):
    """A signal asked a run to stop: it was saved at `step`, and can be resumed."""

    def __init__(self, message: str, signal: int, step: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.step = step


def first_line(error: BaseException) -> str:
    """The message of a library's exception on one line, or its type if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(map(str.strip, lines[:2])) if lines[0].endswith(":") else lines[0]
    return text[:300]


def require(condition: bool, field: str, needed: str, found: object) -> None:
    """Raises ConfigError `field must be needed, got found` unless the condition holds."""
    if not condition:
        raise refused(field, needed, shown(found))


def require_choice(value: str, field: str, choices: Sequence[str]) -> None:
    require(value in choices, field, f"one of {', '.join(choices)}", value)


def require_overwrite(output: str, held: str, overwrite: bool) -> None:
    """Raises ConfigError if `output` holds something (`held`; empty: nothing) that may not be
    replaced.
    """
    if held and not overwrite:
        raise ConfigError(
            f"`output` {output} already holds {held}; give `overwrite` to replace it, or another folder"
        )


def refused(field: str, needed: str, got: str) -> ConfigError:
    """The error `field must be needed, got got`; a `field` that is no name ("the prompt") stays as
    it is.

    Where `needed` is `one of a, b`, the error asks whether the nearest of these was meant.
    """
    # An environment variable is named as it stands
    known = field.isidentifier() and field.islower()
    _, _, choices = needed.partition("one of ")
    meant = did_you_mean(get_close_matches(got, choices.split(", "), n=1))
    return ConfigError(
        f"{f'`{field}`' if known else field} must be {needed}, got {got}{meant}",
        field if field.isidentifier() else None,
    )


def did_you_mean(choices: Sequence[str]) -> str:
    """The end of a message about an unknown name: the first of the choices; empty without one."""
    return f"; did you mean {choices[0]}?" if choices else ""


def shown(value: object) -> str:
    """A value in an error: cut if very long, lone surrogates escaped."""
    try:
        text = str(value).encode("utf-8", "backslashreplace").decode()
    except ValueError:  # an int with more digits than Python converts
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def listed(names: Iterable[str]) -> str:
    """Names for an error message: on one line, at most 80 characters."""
    text = ", ".join(name if name.isprintable() else repr(name) for name in names) or "none"
    return text if len(text) <= 80 else f"{text[:80]}..."


def plural(count: int, noun: str) -> str:
    """`1 draft`, `6 drafts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number(value: float | None, form: str) -> str:
    """A formatted value, or a dash for None."""
    return "-" if value is None else format(value, form)


def visible(token: str) -> str:
    """A token on one line, with visible whitespace."""
    line_end = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    blank = "\N{OPEN BOX}"
    return token.replace("\n", line_end).replace("\t", blank).replace(" ", blank)
