"""Tasks: prompts, references, stop strings and scores; loading by name, and building prompts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingOptions
from ...config.evaluation import HARNESS, TASKS, TaskConfig
from ...data import Example, Record, file_records, hub_records, spread
from ...decoding.output import before_stop
from ...errors import ConfigError, DataError, refused, require, shown
from ...prompting import CHAT, RAW
from ...splits import FEWEST, TEST, VALIDATION, part_of
from ..metrics import Losses, Scores, reference_losses, text_losses
from ..results import Answered

BARE = "{prompt}"  # a form, or a template, that adds nothing
SHOT_END = "\n\n"

Item = TypeVar("Item")
Scorer = Callable[[Sequence[str]], Mapping[str, Sequence[float]]]
"""Takes one prediction per example; returns each metric's values in 0..1, one per prompt."""


@dataclass(frozen=True)
class TaskLoader:
    """Builds a task from its config, whose `data` and `max_new_tokens` default to those given
    here.
    """

    load: Callable[[TaskConfig], "Task"]
    # Optional settings; the others are refused
    accepts: tuple[Literal["metric", "shots", "template"], ...] = ("template",)
    data: str | None = None
    max_new_tokens: int = 128
    needs_data: bool = False


@dataclass(frozen=True)
class Task:
    """Prompts with references."""

    examples: tuple[Example, ...]
    config: TaskConfig  # with every default filled in
    quality_metric: str  # ranks settings
    scorer: Scorer  # reports show all its metrics by name
    stop: tuple[str, ...] = ()  # an answer ends at the first of these strings
    template: str | None = None  # replaces the checkpoint's own prompt template
    text: str | None = None  # if given, perplexity is measured on it instead of the references
    notes: tuple[str, ...] = ()  # for the user, before the run
    # Indices of the examples in each category
    categories: dict[str, tuple[int, ...]] = field(default_factory=dict)
    answers_per_prompt: int = 1  # consecutive examples with the same prompt
    # Without references: makes a scorer from later ones
    against: Callable[[Sequence[Sequence[str]]], Scorer] | None = None
    # At most so many further rows for the same purpose
    others: Callable[[int], Sequence[Example]] | None = None

    def score(
        self, predictions: Sequence[str], perplexity: Scores | None = None
    ) -> dict[str, Scores]:
        """Scores predictions, one per example (empty if it failed); a task on text has its
        `perplexity` as the only score.
        """
        if self.text is not None:
            return {} if perplexity is None else {"perplexity": perplexity}
        return {
            name: Scores(tuple(values))
            for name, values in self.scorer(self._cut(predictions)).items()
        }

    def answered(self, answers: Sequence[Sequence[str | None]]) -> tuple[Answered, ...]:
        """Each prompt with the answer of every result, cut at the stop strings."""
        return tuple(
            Answered(
                example.prompt,
                example.completion,
                tuple(text and before_stop(text, self.stop) for text in texts),
            )
            for example, *texts in zip(self.examples, *answers, strict=True)
        )

    def referring_to(self, answers: Sequence[str | None]) -> "Task":
        """The task with these answers, one per example, as references if it has none. A missing
        answer matches nothing.
        """
        if self.against is None:
            return self
        return replace(
            self,
            scorer=self.against([[] if text is None else self._cut([text]) for text in answers]),
            against=None,
        )

    def _cut(self, texts: Sequence[str]) -> list[str]:
        return [before_stop(text, self.stop) for text in texts]

    def losses(self, loaded: Decoder, exit_layers: Sequence[int]) -> Iterator[Losses]:
        """Losses of each reference through each exit, or of windows of the task's text; none
        without references.
        """
        if self.text is not None:
            yield from text_losses(loaded, self.text, self.config.samples, exit_layers)
        elif self.against is None:
            yield from (reference_losses(loaded, example, exit_layers) for example in self.examples)

    def asked(self, generation: DecodingOptions) -> "tuple[Task, DecodingOptions]":
        """Task and settings, both with the stop strings of either; the task's token limit is the
        default.
        """
        stop = (*self.stop, *(text for text in generation.get("stop", ()) if text not in self.stop))
        # A task has one
        limit = generation.get("max_new_tokens") or self.config.max_new_tokens or 0
        return replace(self, stop=stop), {**generation, "stop": stop, "max_new_tokens": limit}

    def prepared(self, loaded: Decoder) -> Decoder:
        """The model with this task's template and the requested system message."""
        system = self.config.prompting.system
        return (
            loaded
            if self.template is None and system is None
            else loaded.with_template(self.template, system)
        )


def load_task(config: TaskConfig) -> Task:
    """Loads a task and its rows; `data` implies a default task. Raises ConfigError for settings it
    does not use, DataError.
    """
    name = config.task or _task_of(config.data)
    if name not in TASKS:
        if "/" not in name and not Path(name).suffix and not Path(name).exists():
            raise refused(
                "task",
                f"one of {', '.join(TASKS)}, {HARNESS}TASK, or data with prompts and references",
                shown(name),
            )
        config = replace(config, data=config.data or name)
        name = _task_of(name)
    module, _, attribute = TASKS[name].partition(":")
    loader: TaskLoader = vars(import_module(module))[attribute]
    template = config.prompting.asked
    for setting, given, needed in (
        ("metric", config.metric, "left out"), ("shots", config.shots or None, "0"), ("template", template, "left out")
    ):  # fmt: skip
        require(
            given is None or setting in loader.accepts,
            setting,
            f"{needed} for `task` {name}",
            given,
        )
    require(
        config.data is not None or not loader.needs_data, "data", f"given for `task` {name}", "none"
    )
    data = config.data or loader.data
    limit = config.max_new_tokens or loader.max_new_tokens
    config = replace(
        config, task=config.task or config.data or name, data=data, max_new_tokens=limit
    )
    task = loader.load(config)
    if not task.examples:
        raise DataError(f"`data` {task.config.data} has no rows in split {config.split}")
    for number, example in enumerate(task.examples, start=1):
        if not example.prompt.strip():
            raise DataError(
                f"`data` {task.config.data}: every row needs a prompt, found none in row {number} of those read"
            )
    # A report names the data, not its division
    described = replace(task.config, held_out=None, side=None)
    return replace(
        task, config=described, others=partial(_other_rows, loader, config, task.examples)
    )


def _other_rows(
    loader: TaskLoader, config: TaskConfig, own: Sequence[Example], count: int
) -> Sequence[Example]:
    """At most `count` rows for the same purpose beside a task's `own`; else some of its own."""
    prompts = {example.prompt for example in own}
    with suppress(DataError, ConfigError):
        rows = loader.load(replace(config, samples=len(own) + count)).examples
        if others := list({row.prompt: row for row in rows if row.prompt not in prompts}.values()):
            return spread(others, count)
    return spread(own, count)


def rows_for(
    items: Sequence[Item],
    keys: Sequence[str],
    config: TaskConfig,
    source: str,
    has_splits: bool = False,
) -> tuple[list[Item], tuple[str, ...]]:
    """`config.samples` evenly spaced rows of the side that the task asks for (splits.py), and a
    note for the user.

    `keys`: those of the items. `has_splits`: the items are one split of the data, which is divided
    only if the model was trained on it.
    """
    part = part_for(keys, config, source, has_splits)
    return spread([items[place] for place in part.places], config.samples), part.notes


class Places(NamedTuple):
    """Indices of rows, and a note for the user that says which they are, unless they are simply
    all.
    """

    places: Sequence[int]
    notes: tuple[str, ...]


def part_for(keys: Sequence[str], config: TaskConfig, source: str, has_splits: bool) -> Places:
    """The rows of the side that the task asks for; `samples` 0 asks for both sides."""
    side = config.side
    if side is None and not has_splits:
        side = VALIDATION if config.split == VALIDATION else TEST
    part = part_of(keys, side if config.samples else None, config.held_out or ())
    chosen = f"rows: among {len(part.places)} of the {len(keys)} in {source}"
    other = "report (`bench`)" if side == VALIDATION else "choose (`sweep-exits`)"
    note = ""
    if part.seen:
        note = f"{chosen}, which the model was trained on; `data` gives others"
    elif part.divided:
        held_out = ", held out of the training" if part.is_trained else ""
        note = f"{chosen}{held_out}; others {other}, `samples` 0 takes both"
    elif part.is_trained:
        note = f"{chosen}, held out of the training; the same rows choose and report"
    elif side == VALIDATION or (side is not None and len(keys) >= FEWEST):
        note = f"{chosen}; the same rows choose and report"
    return Places(part.places, (note,) if note else ())


def _task_of(data: str | None) -> str:
    if data is None or data == "commands":
        return "commands"
    return "topv2" if data == "topv2" or Path(data).is_dir() else "jsonl"


def rows_of(
    data: str, hub_id: str, split: str, most: int | None = None, **keywords: Any
) -> list[Record]:
    """All rows of the file `data`, or of a split of the hub data set if `data` is its id. Raises
    DataError.
    """
    return list(
        hub_records(hub_id, split, most=most, **keywords)
        if data == hub_id
        else file_records(Path(data))
    )


def shots_and_rest(rows: list[Item], count: int, source: str) -> tuple[list[Item], list[Item]]:
    """The first `count` rows and the others. Raises ConfigError if the shots leave no rows."""
    require(
        count < len(rows) or not count, "shots", f"below {len(rows)}, the rows of {source}", count
    )
    return rows[:count], rows[count:]


def framed(
    asked: str | None,
    form: str,
    template: str | None,
    examples: Iterable[Example],
    shots: Sequence[Example] = (),
    shot_form: str | None = None,
) -> tuple[tuple[Example, ...], str | None]:
    """Puts shots and form around each example; returns the examples, and the template to encode
    them with.

    `asked` replaces `template`. A text with {prompt} also replaces the forms; it stays a template,
    because its special tokens are encoded as tokens, those in rows as text.
    """
    template = template if asked is None else asked
    if asked not in (None, CHAT, RAW):
        form = asked
    own = template == form != BARE
    before_form = form if own else shot_form or form
    before = "".join(
        before_form.replace(BARE, shot.prompt) + shot.completion + SHOT_END for shot in shots
    )
    if own and BARE not in before:  # else a {prompt} inside a shot would be filled in too
        return tuple(examples), before + form
    whole = tuple(
        Example(before + form.replace(BARE, example.prompt), example.completion)
        for example in examples
    )
    return whole, BARE if own else template
