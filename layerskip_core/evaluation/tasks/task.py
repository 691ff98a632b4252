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
        values = self.scorer(self._cut(predictions))
        return {name: Scores(tuple(own)) for name, own in values.items()}

    def answered(
        self, answers: Sequence[Sequence[str | None]], scores: Sequence[Mapping[str, Scores]]
    ) -> tuple[Answered, ...]:
        """Each prompt with the answer of every result, cut at the stop strings, and its scores."""
        metrics = [name for name, each in scores[0].items() if not each.is_perplexity]
        rows = []
        for row, (example, *texts) in enumerate(zip(self.examples, *answers, strict=True)):
            cut = tuple(text and before_stop(text, self.stop) for text in texts)
            prompt, is_later = divmod(row, self.answers_per_prompt)
            own = {}
            if not is_later:
                for name in metrics:
                    own[name] = tuple(each[name].values[prompt] for each in scores)
            rows.append(Answered(example.prompt, example.completion, cut, own))
        return tuple(rows)

    def referring_to(self, answers: Sequence[str | None]) -> "Task":
        """The task with these answers, one per example, as references if it has none. A missing
        answer matches nothing.
        """
        if self.against is None:
            return self
        references = [[] if text is None else self._cut([text]) for text in answers]
        return replace(self, scorer=self.against(references), against=None)

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
        stop = tuple(dict.fromkeys((*self.stop, *generation.get("stop", ()))))
        # `load_task` sets the limit of its config
        limit = generation.get("max_new_tokens") or self.config.max_new_tokens or 0
        return replace(self, stop=stop), {**generation, "stop": stop, "max_new_tokens": limit}

    def prepared(self, loaded: Decoder) -> Decoder:
        """The model with this task's template and the requested system message."""
        system = self.config.prompting.system
        if self.template is None and system is None:
            return loaded
        return loaded.with_template(self.template, system)


def load_task(config: TaskConfig) -> Task:
    """Loads a task and its rows; `data` implies a default task. Raises ConfigError for settings it
    does not use, DataError.
    """
    config, name = _named(config)
    module, _, attribute = TASKS[name].partition(":")
    loader: TaskLoader = vars(import_module(module))[attribute]
    _require_accepted(config, name, loader)
    config = replace(
        config,
        task=config.task or config.data or name,
        data=config.data or loader.data,
        max_new_tokens=config.max_new_tokens or loader.max_new_tokens,
    )
    task = loader.load(config)
    if not task.examples:
        raise DataError(f"`data` {task.config.data} has no rows in split {config.split}")
    for number, example in enumerate(task.examples, start=1):
        if not example.prompt.strip():
            raise DataError(
                f"`data` {task.config.data}: every row needs a prompt, "
                f"found none in row {number} of those read"
            )
    # A report names the data, not its division
    described = replace(task.config, held_out=None, side=None)
    others = partial(_other_rows, loader, config, task.examples)
    return replace(task, config=described, others=others)


def _named(config: TaskConfig) -> tuple[TaskConfig, str]:
    """The config and a name of TASKS; `task` may also name data."""
    name = config.task or _task_of(config.data)
    if name in TASKS:
        return config, name
    if "/" not in name and not Path(name).suffix and not Path(name).exists():
        raise refused(
            "task",
            f"one of {', '.join(TASKS)}, {HARNESS}TASK, or data with prompts and references",
            shown(name),
        )
    return replace(config, data=config.data or name), _task_of(name)


def _require_accepted(config: TaskConfig, name: str, loader: TaskLoader) -> None:
    """Raises ConfigError for a setting that the task would ignore, and for missing data."""
    given = {"metric": config.metric, "shots": config.shots, "template": config.prompting.asked}
    for setting, value in given.items():
        needed = "0" if setting == "shots" else "left out"
        is_accepted = not value or setting in loader.accepts
        require(is_accepted, setting, f"{needed} for `task` {name}", value)
    has_data = config.data is not None or not loader.needs_data
    require(has_data, "data", f"given for `task` {name}", "none")


def _other_rows(
    loader: TaskLoader, config: TaskConfig, own: Sequence[Example], count: int
) -> Sequence[Example]:
    """At most `count` rows for the same purpose beside a task's `own`; else some of its own."""
    prompts = {example.prompt for example in own}
    with suppress(DataError, ConfigError):
        rows = loader.load(replace(config, samples=len(own) + count)).examples
        others = {row.prompt: row for row in rows if row.prompt not in prompts}
        if others:
            return spread(list(others.values()), count)
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


class NotedPart(NamedTuple):
    """Indices of rows, and a note for the user that says which they are, unless they are simply
    all.
    """

    places: Sequence[int]
    notes: tuple[str, ...]


def part_for(keys: Sequence[str], config: TaskConfig, source: str, has_splits: bool) -> NotedPart:
    """The rows of the side that the task asks for; `samples` 0 asks for both sides."""
    side = config.side
    if side is None and not has_splits:
        side = VALIDATION if config.split == VALIDATION else TEST
    part = part_of(keys, side if config.samples else None, config.held_out or ())
    other = "report (`bench`)" if side == VALIDATION else "choose (`sweep-exits`)"
    what = ""
    if part.seen:
        what = ", which the model was trained on; `data` gives others"
    elif part.divided:
        held_out = ", held out of the training" if part.is_trained else ""
        what = f"{held_out}; others {other}, `samples` 0 takes both"
    elif part.is_trained:
        what = ", held out of the training; the same rows choose and report"
    elif side == VALIDATION or (side is not None and len(keys) >= FEWEST):
        what = "; the same rows choose and report"
    if not what:
        return NotedPart(part.places, ())
    note = f"rows: among {len(part.places)} of the {len(keys)} in {source}{what}"
    return NotedPart(part.places, (note,))


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
    if data == hub_id:
        return list(hub_records(hub_id, split, most=most, **keywords))
    return list(file_records(Path(data)))


def shots_and_rest(rows: list[Item], count: int, source: str) -> tuple[list[Item], list[Item]]:
    """The first `count` rows and the others. Raises ConfigError if the shots leave no rows."""
    leaves_rows = count < len(rows) or not count
    require(leaves_rows, "shots", f"below {len(rows)}, the rows of {source}", count)
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
    if asked is not None:
        template = asked
    if asked not in (None, CHAT, RAW):
        form = asked
    is_template = template == form != BARE
    if is_template:
        shot_form = form
    before = ""
    for shot in shots:
        before += (shot_form or form).replace(BARE, shot.prompt) + shot.completion + SHOT_END
    if is_template and BARE not in before:  # else a {prompt} inside a shot would be filled in too
        return tuple(examples), before + form
    whole = []
    for example in examples:
        prompt = before + form.replace(BARE, example.prompt)
        whole.append(Example(prompt, example.completion))
    return tuple(whole), BARE if is_template else template
