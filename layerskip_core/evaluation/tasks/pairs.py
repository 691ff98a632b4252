"""Parsing (`commands`, `topv2`), scored by exact match, and any data with prompts and references (`jsonl`)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ...config.checks import require
from ...config.data import DataConfig
from ...config.evaluation import TaskConfig
from ...data.examples import Example, is_parsing, load_examples, load_records
from ...data.records import Record, spread
from ...errors import DataError
from ...prompting import RAW
from ..metrics import ROUGES, exact_match, rouge
from .prompts import BARE, SHOT_END, forms, framed, shots_and_rest
from .task import Task, TaskLoader

_MAX_NEW_TOKENS = 128  # more than twice the mean parse
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
    name = config.task or "commands"
    source = config.data or name
    data = DataConfig(source, config.split, config.prompt_column or "prompt", config.completion_column or "completion")
    examples = load_examples(replace(data, limit=config.samples, seed=config.seed))
    # Evenly spaced, so that every domain is shown.
    shots = load_examples(replace(data, split="train", limit=config.shots, seed=config.seed)) if config.shots else []
    shaped, template = _few_shot(config.prompting.asked, examples, shots)
    references = [[example.completion] for example in examples]
    resolved = replace(
        config, data=source, max_new_tokens=config.max_new_tokens or _MAX_NEW_TOKENS, shots=len(shots),
        prompt_column=data.prompt_column, completion_column=data.completion_column,
    )  # fmt: skip

    def score(predictions: Sequence[str]) -> dict[str, list[float]]:
        return {"exact_match": exact_match(predictions, references, fold_whitespace=True)}

    return Task(name, shaped, resolved, "exact_match", score, (SHOT_END,) if shots else (), template)


def prompts(config: TaskConfig) -> Task:
    """Data with a prompt and one or more references in each row. Its first `shots` rows come before every prompt.

    Rows without references are scored against the model's own answers. A column `category` divides the rows.
    """
    source = config.data or ""
    every, config = _pairs(source, config)
    shots, rest = shots_and_rest(every, config.shots or 0, source)
    rows = spread(rest, config.samples)
    unanswered = not rows[0].references
    require(not (shots and unanswered), "shots", f"0 for {source}, which has no references", len(shots))
    asked, solved = ([Example(row.prompt, "".join(row.references[:1])) for row in some] for some in (rows, shots))
    examples, template = _few_shot(config.prompting.asked, asked, solved)
    resolved = replace(config, shots=len(solved), max_new_tokens=config.max_new_tokens or _MAX_NEW_TOKENS)
    stop = (SHOT_END,) if solved else ()
    name = config.task or source
    metrics = _metrics(config.metric, rows)
    scorer = partial(text_scores, metrics, [row.references for row in rows])
    task = Task(name, examples, resolved, metrics[0], scorer, stop, template, categories=_categories(rows))
    if not unanswered:
        return task
    return replace(task, notes=(_UNANSWERED,), against=lambda references: partial(text_scores, metrics, references))


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


def _categories(rows: Sequence["_Pair"]) -> dict[str, tuple[int, ...]]:
    """The places of the rows of each category."""
    found: dict[str, tuple[int, ...]] = {}
    for place, row in enumerate(rows):
        if row.category:
            found[row.category] = (*found.get(row.category, ()), place)
    return found


def _few_shot(
    asked: str | None, examples: Sequence[Example], shots: Sequence[Example]
) -> tuple[tuple[Example, ...], str | None]:
    """(examples, their template) for the template that was `asked` for, with solved rows before each prompt.

    A completion follows a template of the user's after a space.
    """
    form, template = forms(asked, BARE, None)
    shot_form = "{prompt}\n" if form == BARE else form
    if shots and template == RAW:
        form = shot_form
    gap = " " if template == form != BARE and not form[-1].isspace() else ""
    rows, solved = ([replace(example, completion=gap + example.completion) for example in some] for some in (examples, shots))
    return framed(form, template, rows, solved, shot_form)


def text_scores(
    metrics: Sequence[str], references: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, list[float]]:
    """Exact match and ROUGE, as far as they are among the `metrics`. With several references the best counts."""
    kinds = [kind for kind in ROUGES if kind in metrics]
    scores = rouge(predictions, references, kinds) if kinds else {}
    if "exact_match" in metrics:
        scores["exact_match"] = exact_match(predictions, references)
    return scores


class _Pair(NamedTuple):
    prompt: str
    references: list[str]
    category: str | None = None


def _pairs(source: str, config: TaskConfig) -> tuple[list[_Pair], TaskConfig]:
    """Every row, and the config with the names of the columns. Without a column of references no row has any."""
    data = DataConfig(source, config.split, seed=config.seed)
    if is_parsing(data):
        config = _columns(Record(source, {}), config)
        return [_Pair(example.prompt, [example.completion]) for example in load_examples(data)], config
    rows = list(load_records(data))
    answers = [any(name in row.fields for name in _REFERENCE_COLUMNS) for row in rows]
    answered = config.completion_column is not None or any(answers)
    if config.completion_column is None and answered and not answers[0]:
        needed = f"needed a reference (one of the columns {', '.join(_REFERENCE_COLUMNS)}), which other rows have"
        raise DataError(f"{rows[0].where}: {needed}")
    config = _columns(rows[0], config)
    return [_pair(row, config.prompt_column or "", config.completion_column if answered else None) for row in rows], config


def _pair(row: Record, prompt: str, completion: str | None) -> _Pair:
    asked = row.texts(prompt, "prompt_column")[0] if prompt == _TURNS else row.text(prompt, "prompt_column")
    references = row.texts(completion, "completion_column") if completion is not None else []
    return _Pair(asked, references, row.text(_CATEGORY) if row.fields.get(_CATEGORY) is not None else None)


def _columns(first: Record, config: TaskConfig) -> TaskConfig:
    """The config with both column names: those given, or the first of the usual ones."""
    return replace(
        config,
        prompt_column=config.prompt_column or first.first_column(_PROMPT_COLUMNS),
        completion_column=config.completion_column or first.first_column(_REFERENCE_COLUMNS),
    )


PARSING = TaskLoader(parsing, accepts=("shots", "template"))
PROMPTS = TaskLoader(prompts, accepts=("metric", "shots", "template"), needs_data=True)
