"""The range of every number among the settings, and lists and ranges of counts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from .checks import refused, shown

MAX_COUNTS = 10_000  # in a list or range of counts
MAX_COUNT = 1_000_000_000


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, an open end excluded. Whole numbers unless an end is a float."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holds(self, value: float) -> bool:
        """Whether the value lies in the range; NaN never does."""
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def needed(self, value: float) -> str:
        """What an error asks for, given a value outside: the whole range of a share, else the end that was passed."""
        if self.high == 1.0:
            return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"
        if value > self.high:
            return f"at most {int(self.high)}"
        return f"{'above' if self.low_open else 'at least'} {self.low:g}"


def _share(low_open: bool = False, high_open: bool = False) -> Range:
    return Range(0.0, 1.0, low_open, high_open)


# By field. The upper ends are far above any honest value; beyond them numbers overflow somewhere, or memory runs out.
RANGES = {
    "accumulation": Range(1, 65_536),
    "anchor": Range(0.0, 1_000_000.0),
    "answer_temperature": Range(0.0, 1_000.0),
    "answer_tokens": Range(1, 10_000_000),
    "batch_size": Range(1, 65_536),
    "body_limit": Range(1_024, 1_073_741_824),
    "distill": _share(),
    "draft_confidence": _share(high_open=True),
    "draft_vocab": Range(0, 10_000_000),
    "draws": Range(0, 1_000_000),
    "e_scale": Range(0.0, 1_000_000.0),
    "exit_confidence": _share(),
    "epochs": Range(0.0, 1_000_000.0, low_open=True),
    "eval_steps": Range(0, 1_000_000_000),
    "keep": _share(low_open=True),
    "length": Range(2, 10_000_000),
    "limit": Range(0, 10_000_000),
    "lookup": Range(0, 1_000),
    "lora_rank": Range(0, 16_384),
    "lr": Range(0.0, 100.0, low_open=True),
    "max_length": Range(2, 10_000_000),
    "max_new_tokens": Range(1, 10_000_000),
    "num_draft_tokens": Range(1, 10_000),
    "p_max": _share(high_open=True),
    "port": Range(0, 65_535),
    "problem_samples": Range(1, 10_000),
    "replay": _share(high_open=True),
    "replay_tokens": Range(1, 10_000_000),
    "queue_size": Range(0, 1_000_000),
    "repeats": Range(1, 1_000),
    "rotation": Range(1, 10_000),
    "samples": Range(0, 10_000_000),
    "save_steps": Range(0, 1_000_000_000),
    "seed": Range(0, 2**32 - 1),  # what numpy, torch and transformers all take
    "shots": Range(0, 1_000),
    "steps": Range(1, 1_000_000_000),
    "temperature": Range(0.0, 1_000.0),
    "threads": Range(0, os.cpu_count() or 1),  # thread libraries may crash with many more
    "timed": Range(0, 1_000_000),
    "token_limit": Range(1, 10_000_000),
    "top_k": Range(0, 10_000_000),
    "top_p": _share(low_open=True),
    "tuning_steps": Range(0, 1_000_000_000),
    "validation_samples": Range(0, 10_000_000),
    "vocab_size": Range(260, 10_000_000),
    "warmup": _share(high_open=True),
    "weight_decay": Range(0.0, 1_000.0),
}


def require_ranges(**values: object) -> None:
    """Raises ConfigError unless each value is a number in the range of the field that it is given by. None passes."""
    for field, value in values.items():
        _require_in_range(field, value, RANGES[field])


def _require_in_range(field: str, value: object, known: Range) -> None:
    if value is None:
        return
    kinds = (int,) if known.whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise refused(field, f"a {'whole ' if known.whole else ''}number", shown(value))
    if not known.holds(value):
        raise refused(field, known.needed(value), shown(value))


def parse_counts(text: str, field: str) -> tuple[int, ...]:
    """Distinct counts in ascending order from `3,6,8`, from `A:B` or `A:B:STEP` with both ends included, or from `3,8:12`.

    Raises ConfigError, also for more than MAX_COUNTS of them.
    """
    try:
        parts = [[int(number) for number in part.split(":")] for part in text.split(",")]
        if any(abs(number) > MAX_COUNT for numbers in parts for number in numbers):
            raise refused(field, f"counts of at most {MAX_COUNT}", shown(text))
        ranges = [_range(*numbers) if len(numbers) > 1 else numbers for numbers in parts]
    except (ValueError, TypeError):  # not a number; too many for a range
        ranges = []
    if not ranges or not all(ranges):
        needed = "a list such as 3,6,8 or a range A:B:STEP with A <= B and STEP >= 1"
        raise refused(field, needed, repr(shown(text)))
    count = sum(map(len, ranges))
    if count > MAX_COUNTS:
        raise refused(field, f"at most {MAX_COUNTS} counts", str(count))
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


def _range(start: int, stop: int, step: int = 1) -> Sequence[int]:
    """Lazy, so that a huge range costs nothing."""
    return range(start, stop + 1, step) if step >= 1 else ()
