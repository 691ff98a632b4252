"""Parsing (`commands`, `topv2`), scored by exact match, and any data with prompts and references (`jsonl`)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ...config.evaluation import TaskConfig
from ...config.model import DataConfig
from ...data import Example, is_parsing, load_examples, load_records, spread
from ...errors import DataError, require
from ...prompting import CHAT, RAW
from ..metrics import ROUGES, exact_match, rouge
from .task import BARE, SHOT_END, Scorer, Task, TaskLoader, framed, shots_and_rest

_TURNS = "turns"  # of a user; without the answers between them only the first can be asked
_PROMPT_COLUMNS = ("prompt", "article", "document", "source", "question", "input", _TURNS)
_CATEGORY = "category"
_REFERENCE_COLUMNS = ("completion", "reference", "summary", "summary_gt", "highlights", "target", "answer", "output")
_UNANSWERED = (
    f"the data has no references (one of the columns {', '.join(_REFERENCE_COLUMNS)}, or the one that `completion_column` "
    "names): answers are scored against the model's own at full depth"
)


def parsing(config: TaskConfig) -> Task:
    """Sentences and their parses. Whitespace is folded, because tokenizers differ in it. Shots are training rows."""
    columns = config.prompt_column or "prompt", config.completion_column or "completion"
    data = DataConfig(str(config.data), config.split, *columns, limit=config.samples, seed=config.seed)
    examples = load_examples(data)
    # Evenly spaced, so that every domain is shown.
    shots = load_examples(replace(data, split="train", limit=config.shots)) if config.shots else []
    config = replace(config, prompt_column=columns[0], completion_column=columns[1])
    references = [[example.completion] for example in examples]
    scorer = partial(text_scores, ("exact_match",), references, fold_whitespace=True)
    return _few_shot(config, "exact_match", scorer, examples, shots)


def prompts(config: TaskConfig) -> Task:
    """Data with a prompt and one or more references in each row. Its first `shots` rows come before every prompt.

    Rows without references are scored against the model's own answers. A column `category` divides the rows.
    """
    source = str(config.data)
    every, config = _pairs(source, config)
    shots, rest = shots_and_rest(every, config.shots or 0, source)
    rows = spread(rest, config.samples)
    unanswered = not rows[0].references
    require(not (shots and unanswered), "shots", f"0 for {source}, which has no references", len(shots))
    metrics = _metrics(config.metric, rows)
    scorer = partial(text_scores, metrics, [row.references for row in rows])
    task = _few_shot(config, metrics[0], scorer, [row.example for row in rows], [row.example for row in shots])
    categories: dict[str, tuple[int, ...]] = {}
    for number, row in enumerate(rows):
        if row.category:
            categories[row.category] = (*categories.get(row.category, ()), number)
    task = replace(task, categories=categories)
    return replace(task, notes=(_UNANSWERED,), against=partial(partial, text_scores, metrics)) if unanswered else task


def _metrics(asked: str | None, rows: Sequence["_Pair"]) -> tuple[str, ...]:
    """What rows are scored by, the metric that ranks first.

    By default ROUGE-2 ranks. Texts of one word have none, so exact match ranks those. Without references the answers, which
    may be of one word, are not known yet, so ROUGE-L ranks.
    """
    if asked is not None:
        return (asked, *(other for other in ROUGES if other != asked)) if asked in ROUGES else (asked,)
    if not rows[0].references:
        return ("rougeL", "exact_match")
    longest = max(len(text.split()) for row in rows for text in row.references)
    return ("rouge2", "exact_match") if longest > 1 else ("exact_match",)


def _few_shot(config: TaskConfig, metric: str, scorer: Scorer, examples: Sequence[Example], shots: Sequence[Example]) -> Task:
    """A task with solved rows before each prompt. A completion follows a template of the user's after a space."""
    asked = config.prompting.asked
    form = "{prompt}\n" if shots and asked == RAW else BARE
    gap = "" if asked in (None, CHAT, RAW, BARE) or asked[-1].isspace() else " "
    rows, solved = ([replace(example, completion=gap + example.completion) for example in some] for some in (examples, shots))
    shaped, template = framed(asked, form, None, rows, solved, "{prompt}\n")
    return Task(shaped, replace(config, shots=len(shots)), metric, scorer, (SHOT_END,) if shots else (), template)


def text_scores(
    metrics: Sequence[str],
    references: Sequence[Sequence[str]],
    predictions: Sequence[str],
    fold_whitespace: bool = False,
) -> dict[str, list[float]]:
    """Exact match and ROUGE, as far as they are among the `metrics`. With several references the best counts."""
    kinds = [kind for kind in ROUGES if kind in metrics]
    scores = rouge(predictions, references, kinds) if kinds else {}
    if "exact_match" in metrics:
        scores["exact_match"] = exact_match(predictions, references, fold_whitespace)
    return scores


class _Pair(NamedTuple):
    example: Example
    references: list[str]
    category: str | None = None


def _pairs(source: str, config: TaskConfig) -> tuple[list[_Pair], TaskConfig]:
    """Every row, and the config with the names of the columns. Without a column of references no row has any."""
    data = DataConfig(source, config.split, seed=config.seed)
    if is_parsing(data):
        pairs = [_Pair(example, [example.completion]) for example in load_examples(data)]
        return pairs, replace(config, prompt_column="prompt", completion_column="completion")
    rows = list(load_records(data))
    first, answer = rows[0], config.completion_column
    if answer is None and any(name in row.fields for row in rows for name in _REFERENCE_COLUMNS):
        answer = first.first_column(_REFERENCE_COLUMNS)
        if answer not in first.fields:
            columns = ", ".join(_REFERENCE_COLUMNS)
            raise DataError(f"{first.where}: needed a reference (one of the columns {columns}), which other rows have")
    asked = config.prompt_column or first.first_column(_PROMPT_COLUMNS)
    pairs = []
    for row in rows:
        prompt = row.texts(asked, "prompt_column")[0] if asked == _TURNS else row.text(asked, "prompt_column")
        references = row.texts(answer, "completion_column") if answer is not None else []
        category = row.text(_CATEGORY) if row.fields.get(_CATEGORY) is not None else None
        pairs.append(_Pair(Example(prompt, "".join(references[:1])), references, category))
    return pairs, replace(config, prompt_column=asked, completion_column=answer or _REFERENCE_COLUMNS[0])


COMMANDS = TaskLoader(parsing, ("shots", "template"), "commands")
TOPV2 = TaskLoader(parsing, ("shots", "template"), "topv2")
PROMPTS = TaskLoader(prompts, ("metric", "shots", "template"), needs_data=True)
