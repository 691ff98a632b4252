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


def file_rows(path: str) -> list[Record]:
    """All rows of a file, at least one. Raises DataError."""
    return list(file_records(Path(path)))


def hub_rows(hub_id: str, split: str, most: int | None = None, **keywords: Any) -> list[Record]:
    """All rows of a data set on the hub, or only its first `most` rows. Raises DataError."""
    return list(hub_records(hub_id, split, most=most, **keywords))


def shots_and_rest(rows: list[Item], count: int, source: str) -> tuple[list[Item], list[Item]]:
    """The first `count` rows and the others. Raises ConfigError if the shots leave no rows."""
    require(count < len(rows) or not count, "shots", f"below {len(rows)}, the rows of {source}", count)
    return rows[:count], rows[count:]


def forms(template: str | None, form: str, by_default: str | None) -> tuple[str, str | None]:
    """(the form of a row, the model's template) for a `template` of `raw`, `chat`, a text with {prompt} in it, or None.

    A text is both the form and the model's template. With None the model's template is `by_default`; None there stands for
    the checkpoint's own.
    """
    if template is None:
        return form, by_default
    return (form if template in (CHAT, RAW) else template), template


def framed(
    form: str,
    template: str | None,
    examples: Iterable[Example],
    shots: Sequence[Example] = (),
    shot_form: str | None = None,
) -> tuple[tuple[Example, ...], str | None]:
    """(examples, the template to encode them in): each example in `form`, after the shots in `shot_form` or `form`.

    `form` and `template` come from `forms`. A user's own form stays a template, so that special tokens in it are encoded as
    tokens, and those in the rows as text.
    """
    before = "".join((shot_form or form).replace(BARE, shot.prompt) + shot.completion + SHOT_END for shot in shots)
    own = template == form != BARE
    if own and BARE not in before:  # else the template would fill in the {prompt} of a shot, too
        return tuple(examples), before + form
    whole = tuple(Example(before + form.replace(BARE, example.prompt), example.completion) for example in examples)
    return whole, BARE if own else template
