"""The range of every number that a command takes, and lists and ranges of counts. Standard library only."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

MAX_COUNTS = 10_000  # in a list or range of counts
MAX_COUNT = 1_000_000_000
_SHOWN = 60  # characters of a refused value


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an open end is not in it. Whole numbers unless an end is a float."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holds(self, value: float) -> bool:
        """NaN is in no range."""
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def needed(self, value: float) -> str:
        """What is said of a value outside: the whole range where it is a share, else the end that was passed."""
        if self.high == 1.0:
            return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"
        if value > self.high:
            return f"at most {int(self.high)}"
        return f"{'above' if self.low_open else 'at least'} {self.low:g}"


def _share(low_open: bool = False, high_open: bool = False) -> Range:
    return Range(0.0, 1.0, low_open, high_open)


# The upper ends stand where no honest user comes; above them numbers overflow in what is called, or a machine would be filled.
RANGES = {
    "--accumulation": Range(1, 65_536),
    "--batch-size": Range(1, 65_536),
    "--distill": _share(),
    "--draft-confidence": _share(high_open=True),
    "--draft-vocab": Range(0, 10_000_000),
    "--epochs": Range(0.0, 1_000_000.0, low_open=True),
    "--escale": Range(0.0, 1_000_000.0),
    "--eval-steps": Range(0, 1_000_000_000),
    "--lora-rank": Range(0, 16_384),
    "--lr": Range(0.0, 100.0, low_open=True),
    "--max-length": Range(2, 10_000_000),
    "--max-new-tokens": Range(1, 10_000_000),
    "--pmax": _share(high_open=True),
    "--problem-samples": Range(1, 10_000),
    "--repeats": Range(1, 1_000),
    "--rotation": Range(1, 10_000),
    "--samples": Range(0, 10_000_000),
    "--save-steps": Range(0, 1_000_000_000),
    "--seed": Range(0, 2**32 - 1),  # what numpy, torch and transformers all take
    "--shots": Range(0, 1_000),
    "--spec": Range(1, 10_000),
    "--steps": Range(1, 1_000_000_000),
    "--temperature": Range(0.0, 1_000.0),
    "--threads": Range(0, os.cpu_count() or 1),  # a library of threads may crash with many more
    "--timed": Range(0, 1_000_000),
    "--top-k": Range(0, 10_000_000),
    "--top-p": _share(low_open=True),
    "--validation-samples": Range(0, 10_000_000),
    "--vocab-size": Range(260, 10_000_000),
    "--warmup": _share(high_open=True),
    "--weight-decay": Range(0.0, 1_000.0),
}


def require_in_range(flag: str, value: object) -> None:
    """Raises ConfigError unless the value is a number in the flag's range. None, which is no number given, passes."""
    if value is None:
        return
    known = RANGES[flag]
    kinds = (int,) if known.whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{flag} must be a {'whole ' if known.whole else ''}number, got {shown(value)}")
    if not known.holds(value):
        raise ConfigError(f"{flag} must be {known.needed(value)}, got {shown(value)}")


def require_ranges(**values: object) -> None:
    """The same for several flags, by their names with underscores."""
    for name, value in values.items():
        require_in_range("--" + name.replace("_", "-"), value)


def parse_counts(text: str, flag: str) -> tuple[int, ...]:
    """Distinct counts in ascending order from `3,6,8`, or from `A:B` or `A:B:STEP` with both ends included.

    Raises ConfigError naming the flag, also for more than MAX_COUNTS of them.
    """
    try:
        numbers = [int(part) for part in text.split(":" if ":" in text else ",")]
        if any(abs(number) > MAX_COUNT for number in numbers):
            raise ConfigError(f"{flag} must be counts of at most {MAX_COUNT}, got {shown(text)}")
        counts: Sequence[int] = _range(*numbers) if ":" in text else numbers
    except (ValueError, TypeError):  # no number; too few or too many for a range
        counts = []
    if not counts:
        needed = "a list such as 3,6,8 or a range A:B:STEP with A <= B and STEP >= 1"
        raise ConfigError(f"{flag} must be {needed}, got {shown(text)!r}")
    if len(counts) > MAX_COUNTS:
        raise ConfigError(f"{flag} must be at most {MAX_COUNTS} counts, got {len(counts)}")
    return tuple(sorted(set(counts)))


def shown(value: object) -> str:
    """A value as an error quotes it: cut where it is very long."""
    try:
        text = str(value)
    except ValueError:  # an int of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _range(start: int, stop: int, step: int = 1) -> Sequence[int]:
    """Not built, so that its length costs nothing."""
    return range(start, stop + 1, step) if step >= 1 else ()
