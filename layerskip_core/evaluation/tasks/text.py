"""Parsing (`commands`, `topv2`) by exact match, and data with prompts and references (`jsonl`) by a metric of one's choice."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...config import DataConfig, TaskConfig
from ...data import Example, load_examples
from ..metrics import ROUGES, exact_match, rouge
from .prompts import BARE, SHOT_END, forms, with_shots
from .rows import ENDINGS, Row, file_rows, spread
from .task import Task

_MAX_NEW_TOKENS = 128  # more than twice the mean parse
_PROMPT_COLUMNS = ("prompt", "article", "document", "source", "question", "input")
_REFERENCE_COLUMNS = ("completion", "reference", "summary", "summary_gt", "highlights", "target", "answer", "output")


def parsing(config: TaskConfig) -> Task:
    """Sentences and their parses; whitespace is folded, for tokenizers differ in it."""
    name = config.task or "commands"
    source = config.data or name
    data = DataConfig(source, config.split, config.prompt_column or "prompt", config.completion_column or "completion")
    examples = load_examples(replace(data, limit=config.samples, seed=config.seed))
    form, template = forms(config.template, BARE, None)
    shaped = tuple(with_shots(form, example) for example in examples)
    references = [[example.completion] for example in examples]
    resolved = replace(
        config, data=source, max_new_tokens=config.max_new_tokens or _MAX_NEW_TOKENS,
        prompt_column=data.prompt_column, completion_column=data.completion_column,
    )  # fmt: skip

    def score(predictions: Sequence[str]) -> dict[str, float]:
        return {"exact_match": exact_match(predictions, references, fold_whitespace=True)}

    return Task(name, shaped, resolved, "exact_match", score, template=template)


def prompts(config: TaskConfig) -> Task:
    """Any data with a prompt and a reference, or several, in every row; `shots` of its first rows come before each prompt."""
    source = config.data or ""
    every, config = _references(source, config)
    shots, rows = every[: config.shots or 0], spread(every[config.shots or 0 :], config.samples)
    form, template = forms(config.template, BARE, None)
    shot_form = "{prompt}\n" if form == BARE else form
    if shots and template == BARE:
        form = shot_form
    gap = " " if template == BARE and form != BARE and not form[-1].isspace() else ""
    solved = [Example(prompt, gap + texts[0]) for prompt, texts in shots]
    examples = [with_shots(form, Example(prompt, gap + texts[0]), solved, shot_form) for prompt, texts in rows]
    resolved = replace(config, shots=len(solved), max_new_tokens=config.max_new_tokens or _MAX_NEW_TOKENS)
    scorer = partial(text_scores, config.metric, [texts for _, texts in rows])
    stop = (SHOT_END,) if solved else ()
    name = config.task or source
    return Task(name, tuple(examples), resolved, config.metric or "rouge2", scorer, stop, template)


def text_scores(metric: str | None, references: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """By the metric: exact match, all of ROUGE-1, 2 and L, or (None) ROUGE-2 and exact match. The best reference counts."""
    scores: dict[str, float] = {}
    if metric != "exact_match":
        scores |= rouge(predictions, references, ROUGES if metric else ("rouge2",))
    if metric in (None, "exact_match"):
        scores["exact_match"] = exact_match(predictions, references)
    return scores


def _references(source: str, config: TaskConfig) -> tuple[list[tuple[str, list[str]]], TaskConfig]:
    """(prompt, references) of every row, and the config with the columns that they stood in."""
    path = Path(source)
    if path.suffix in ENDINGS:
        rows = file_rows(path)
        config = _columns(rows[0], config)
        prompt, completion = config.prompt_column or "", config.completion_column or ""
        return [(_prompt(row, prompt), row.texts(completion, "--completion-column")) for row in rows], config
    config = _columns(Row(source, dict.fromkeys(_header(path))), config)
    data = DataConfig(source, config.split, config.prompt_column or "", config.completion_column or "", seed=config.seed)
    return [(example.prompt, [example.completion]) for example in load_examples(data)], config


def _columns(first: Row, config: TaskConfig) -> TaskConfig:
    """The config with the columns named: those asked for, or the first of the usual names."""
    return replace(
        config,
        prompt_column=config.prompt_column or first.first_column(_PROMPT_COLUMNS),
        completion_column=config.completion_column or first.first_column(_REFERENCE_COLUMNS),
    )


def _prompt(row: Row, column: str) -> str:
    blank = isinstance(row.fields.get(column), str) and not row.fields[column].strip()
    return "" if blank else row.text(column, "--prompt-column")  # a task names the row itself


def _header(path: Path) -> list[str]:
    """The columns of a CSV file; none of anything else."""
    if path.suffix != ".csv" or not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        return next(csv.reader(lines), [])
