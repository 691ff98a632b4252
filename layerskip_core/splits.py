"""Which rows train, which choose, and which report. No row does two of these.

Rows that choose: losses on held-out rows, the verdict of a training, and a sweep. Rows that report:
`bench`.

Of each kind of data: rows that train; rows that choose; rows that report.

- `commands`, TOPv2: the splits train; validation; test.
- A file, or a split of a hub data set, of the model's training: the rows not held out; of those
  held out, the side validation; and the side test. With `validation` FILE: all rows; the two sides
  of FILE. As a stream: divided as its first 4,096 rows are.
- A file that the model was not trained on: the side validation; the side test.
- A hub data set, cnn_dm, xsum, scitldr, mbpp, WikiText-2: the splits validation; test.
- humaneval, and a named task on a file: the side validation; the side test.
- A plain text for `lm`: lines that are not held out; the two sides of its lines if the model was
  trained on it, else of its pieces.
- Tasks of lm-eval: nothing is chosen on them; lm-eval's own rows report.

Conversations and packed documents are rows like others. A model trained on a hub data set reports
on the set's own split `test` if there is one, else on held-out rows. `samples` 0 takes both sides.
Fewer than 40 rows are not divided.

A row is known by its key, a hash of its content: half of all keys belong to each side, and of each
side the rows with the smallest keys are held out. So the division depends on the content alone: on
no order, process, resumption or seed, and a file that was shuffled, renamed or extended still has
the same rows on each side. Equal rows are never apart.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

VALIDATION = "validation"  # rows that choose
TEST = "test"  # rows that report
FEWEST = 40  # rows that are divided
_FEWEST_HELD_OUT = 8  # rows that choose
_MOST_HELD_OUT = 128  # rows that choose: an exact match of so many shows a difference of 12 points
_SHARE = 16  # one row in 16 chooses, one in 32 reports
_FEWEST_TO_REPORT = 256  # training rows below which no rows are held out to report
_TRAINED_PER_ROW = 8
_SKETCH = 32  # keys by which trained data is recognised
_FEWEST_HITS = 3
_KEY_BYTES = 8


def key_of(fields: Mapping[str, Any], columns: Collection[str]) -> str:
    """16 hex digits by the content of a row: its values in these columns, or in all if it has none
    of them.
    """
    known = {name: value for name, value in fields.items() if name in columns}
    text = json.dumps(known or dict(fields), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_KEY_BYTES).hexdigest()


def side_of(key: str) -> str:
    """VALIDATION or TEST, by the last bit; the order of keys is that of their first bits."""
    return TEST if int(key[-1], 16) % 2 else VALIDATION


@dataclass(frozen=True)
class HeldOut:
    """The rows that a training held out of its data, as layerskip.json describes them."""

    validation: str = ""  # the highest key that is held out of each side; empty: none is
    test: str = ""
    rows: int = 0
    digest: str = ""  # of the keys that are held out
    trained: tuple[str, ...] = ()  # the smallest keys of trained rows, ascending

    def holds(self, key: str) -> bool:
        """True for a row that was held out, or came later and would have been."""
        return key <= (self.validation if side_of(key) == VALIDATION else self.test)

    def recognises(self, keys: Iterable[str]) -> bool:
        """True if about half of the trained rows have one of these keys, or about half of these
        rows were trained on.

        A sample of the trained rows is compared: those of the smallest keys.
        """
        if not self.trained:
            return False
        first = self.trained[0]
        last = self.trained[-1]
        near = {key for key in keys if first <= key <= last and not self.holds(key)}
        hits = len(near.intersection(self.trained))
        enough = min(_FEWEST_HITS, len(self.trained))
        return hits >= enough and 2 * hits >= min(len(near), len(self.trained))


def timely_rows(trained: int) -> int:
    """How many rows choose, at most, so that reading them takes little of a run that trains on so
    many rows.
    """
    return min(_MOST_HELD_OUT, max(_FEWEST_HELD_OUT, trained // _TRAINED_PER_ROW))


def hold_out(keys: Sequence[str], nothing: bool = False) -> HeldOut:
    """Divides the rows of a training: 8 to 128 rows choose (128 from 2,048 rows on), from 256 rows
    on half as many report.

    Below 40 rows, or if `nothing` is asked for, no row is held out.
    """
    counts = dict.fromkeys((VALIDATION, TEST), 0)
    if len(keys) >= FEWEST and not nothing:
        counts[VALIDATION] = min(_MOST_HELD_OUT, max(_FEWEST_HELD_OUT, len(keys) // _SHARE))
        counts[TEST] = counts[VALIDATION] // 2 if len(keys) >= _FEWEST_TO_REPORT else 0
    ordered = sorted(keys)
    highest = {
        side: _highest([key for key in ordered if side_of(key) == side], count)
        for side, count in counts.items()
    }
    bounds = HeldOut(highest[VALIDATION], highest[TEST])
    held = [key for key in ordered if bounds.holds(key)]
    trained = sorted({key for key in keys if not bounds.holds(key)})[:_SKETCH]
    digest = (
        hashlib.blake2b("".join(held).encode(), digest_size=_KEY_BYTES).hexdigest() if held else ""
    )
    return HeldOut(bounds.validation, bounds.test, len(held), digest, tuple(trained))


def _highest(ordered: Sequence[str], count: int) -> str:
    """The last of the first keys that at most `count` rows have; equal keys are not parted."""
    highest = ""
    rows = 0
    for key, same in groupby(ordered):
        rows += len(list(same))
        if rows > count:
            break
        highest = key
    return highest


@dataclass(frozen=True)
class Part:
    """The rows of some data for one purpose."""

    places: Sequence[int]
    is_trained: bool  # the data is recognised: the model was trained on rows of it
    seen: bool  # the model was trained on these rows
    divided: bool  # there are others, for the other purpose


def part_of(keys: Sequence[str], side: str | None, trainings: Sequence[HeldOut] = ()) -> Part:
    """The rows of a `side` that none of the `trainings` (the newest first) trained on. None: the
    rows of both sides.

    If no row is new to all trainings, the newest one decides; if all rows were trained on, the part
    has all of them.
    """
    known = [training for training in trainings if training.recognises(keys)]
    new = [
        place for place, key in enumerate(keys) if all(training.holds(key) for training in known)
    ]
    if known and not new:
        new = [place for place, key in enumerate(keys) if known[0].holds(key)]
    if not new:
        return Part(range(len(keys)), True, True, False)
    mine = [place for place in new if side in (None, side_of(keys[place]))]
    divided = 0 < len(mine) < len(new) and (bool(known) or len(new) >= FEWEST)
    return Part(mine if divided else new, bool(known), False, divided)
