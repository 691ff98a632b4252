"""From the rows of a file or of a data set on the hub to prompts: their form, the solved rows before them, the template."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...config.checks import require
from ...data.examples import Example
from ...data.records import Record, file_records, hub_records
from ...prompting import CHAT, RAW

BARE = "{prompt}"  # a form, or a template, that adds nothing
SHOT_END = "\n\n"

Item = TypeVar("Item")


def rows_of(data: str, hub_id: str, split: str, most: int | None = None, **keywords: Any) -> list[Record]:
    """All rows of a file, or of the split of this data set on the hub if `data` is its id. Raises DataError."""
    return list(hub_records(hub_id, split, most=most, **keywords) if data == hub_id else file_records(Path(data)))


def shots_and_rest(rows: list[Item], count: int, source: str) -> tuple[list[Item], list[Item]]:
    """The first `count` rows and the others. Raises ConfigError if the shots leave no rows."""
    require(count < len(rows) or not count, "shots", f"below {len(rows)}, the rows of {source}", count)
    return rows[:count], rows[count:]


def framed(
    asked: str | None,
    form: str,
    template: str | None,
    examples: Iterable[Example],
    shots: Sequence[Example] = (),
    shot_form: str | None = None,
) -> tuple[tuple[Example, ...], str | None]:
    """(examples, the template to encode them in): each example in its form, after the shots.

    `form`, of the shots `shot_form`, is the task's, and a `template` of None the checkpoint's own. A template that was `asked`
    for replaces the latter; a text with {prompt} in it replaces the forms, too. It stays a template, so that special tokens in
    it are encoded as tokens, and those in the rows as text.
    """
    template = template if asked is None else asked
    if asked not in (None, CHAT, RAW):
        form = asked
    own = template == form != BARE
    before_form = form if own else shot_form or form
    before = "".join(before_form.replace(BARE, shot.prompt) + shot.completion + SHOT_END for shot in shots)
    if own and BARE not in before:  # else the template would fill in the {prompt} of a shot, too
        return tuple(examples), before + form
    whole = tuple(Example(before + form.replace(BARE, example.prompt), example.completion) for example in examples)
    return whole, BARE if own else template
