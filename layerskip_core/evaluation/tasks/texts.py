"""Parsing (`commands`, `topv2`), scored by exact match; summaries; any data with prompts and references (`jsonl`); plain text.

Summaries: of news, with the prompts of LayerSkip's evaluation (CNN/DM, 1-shot; XSUM, 0-shot), and of papers in one sentence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoint.settings import info_of
from ...config.evaluation import PROMPT_NAMES, REFERENCE_NAMES, TaskConfig
from ...config.model import DataConfig
from ...data import (
    FILE_ENDINGS,
    MESSAGES,
    Example,
    Record,
    file_ending,
    first_turn,
    hub_records,
    is_data,
    is_parsing,
    load_examples,
    load_records,
    spread,
)
from ...errors import DataError, require
from ...files import text_lines
from ...prompting import CHAT, RAW
from ..metrics import ROUGES, exact_match, rouge
from . import BARE, SHOT_END, Scorer, Task, TaskLoader, framed, load_task, rows_of, shots_and_rest

_TURNS = "turns"  # of a user, without the answers between them: only the first is a prompt
_CATEGORY = "category"
_FORM = "Article: {prompt}\nSummary:"
_STOP = ("\nArticle:",)  # a base model continues with another article
_ARTICLES = ("article", "document", "source")
_SUMMARIES = ("highlights", "summary", "summary_gt", "target")
_READY_STOP = ("###",)  # for complete prompts in HELM's form, with their own shots
_AS_PARQUET = "refs/convert/parquet"  # the hub's Parquet branch: `datasets` no longer runs loading scripts
_HUB, _HUB_NAME = "Salesforce/wikitext", "wikitext-2-raw-v1"
_WIKITEXT = f"{_HUB}/{_HUB_NAME}"
_TEXT_COLUMNS = ("text", "completion", "content")
_PLAIN = ".txt"  # read as one text, like any file that does not hold rows
_PROMPT_WORDS = 100  # as in LayerSkip's evaluation of continuations
_PASSAGE = 2000  # characters: about the 512 tokens of a perplexity window
_UNANSWERED = (
    f"the data has no references (one of the columns {', '.join(REFERENCE_NAMES)}, or the one that `completion_column` "
    "names): answers are scored against the model's own at full depth"
)


def load_trained(asked: TaskConfig, model: str) -> Task:
    """Like `load_task`; without `task` and `data` on the training data in layerskip.json, on unseen rows if possible."""
    data, validation = (None, None) if asked.task or asked.data else info_of(model).trained_on
    if data is None or data.name == "commands":
        return load_task(asked)
    choices, fault = [(validation, "validation")] if validation and is_data(validation) else [], None
    if is_parsing(DataConfig(data.name)) or file_ending(Path(data.name)) not in FILE_ENDINGS:  # a file has no splits
        choices += [(data.name, split) for split in dict.fromkeys((asked.split, "validation"))]
    for name, split in dict.fromkeys([*choices, (data.name, data.split)]):
        seen = (name, split) == (data.name, data.split)
        how = "which the model was trained on; `data` gives others" if seen else "which the model was not trained on"
        try:
            task = load_task(_like_training(replace(asked, data=name, split=split), data))
            return replace(task, notes=(f"rows: {name}, split {split}, {how}", *task.notes))
        except DataError as error:
            fault = error
    raise DataError(f"the rows that {model} was trained for: {fault}; give `data` or `task`")


def _like_training(config: TaskConfig, trained: DataConfig) -> TaskConfig:
    """Takes the training's columns if the data has them; task `lm` for text without prompts."""
    data, prompt, completion = DataConfig(str(config.data), config.split), trained.prompt_column, trained.completion_column
    if is_parsing(data):
        return config
    if file_ending(Path(data.name)) == _PLAIN:
        return replace(config, task="lm")
    fields = next(load_records(data, streaming=True)).fields
    plain = not fields.keys() & {prompt, *PROMPT_NAMES}
    return replace(
        config,
        task="lm" if plain else None,
        prompt_column=config.prompt_column or (prompt if prompt in fields else None),
        completion_column=config.completion_column or (completion if completion in fields else None),
    )


def parsing(config: TaskConfig) -> Task:
    """Sentences and their parses, compared with folded whitespace, in which tokenizers differ. Shots are training rows."""
    columns = config.prompt_column or "prompt", config.completion_column or "completion"
    data = DataConfig(str(config.data), config.split, *columns, limit=config.samples, seed=config.seed)
    examples = load_examples(data)
    # Evenly spaced, to cover all domains.
    shots = load_examples(replace(data, split="train", limit=config.shots)) if config.shots else []
    config = replace(config, prompt_column=columns[0], completion_column=columns[1])
    references = [[example.completion] for example in examples]
    scorer = partial(text_scores, ("exact_match",), references, fold_whitespace=True)
    return _few_shot(config, "exact_match", scorer, examples, shots)


def prompts(config: TaskConfig) -> Task:
    """Prompts with one or more references each. The first `shots` rows come before every prompt.

    Data without references is scored against the model's own answers, by ROUGE-L. A column `category` groups the rows. With
    references the default metric is ROUGE-2, or exact match if all are single words.
    """
    source = str(config.data)
    every, config = _pairs(source, config)
    shots, rest = shots_and_rest(every, config.shots or 0, source)
    rows = spread(rest, config.samples)
    unanswered = not rows[0].references
    require(not (shots and unanswered), "shots", f"0 for {source}, which has no references", len(shots))
    longest = max((len(text.split()) for row in rows for text in row.references), default=0)
    if config.metric is not None:
        metrics = tuple(dict.fromkeys((config.metric, *(ROUGES if config.metric in ROUGES else ()))))
    elif unanswered:
        metrics = "rougeL", "exact_match"
    else:
        metrics = ("rouge2", "exact_match") if longest > 1 else ("exact_match",)
    scorer = partial(text_scores, metrics, [row.references for row in rows])
    task = _few_shot(config, metrics[0], scorer, [row.example for row in rows], [row.example for row in shots])
    numbers = range(len(rows))
    names = dict.fromkeys(row.category for row in rows if row.category)
    categories = {name: tuple(number for number in numbers if rows[number].category == name) for name in names}
    task = replace(task, categories=categories)
    return replace(task, notes=(_UNANSWERED,), against=partial(partial, text_scores, metrics)) if unanswered else task


def _few_shot(config: TaskConfig, metric: str, scorer: Scorer, examples: Sequence[Example], shots: Sequence[Example]) -> Task:
    """A task with solved rows before each prompt. After a user's template a completion begins with a space."""
    asked = config.prompting.asked
    form = "{prompt}\n" if shots and asked == RAW else BARE
    gap = "" if asked in (None, CHAT, RAW, BARE) or asked[-1].isspace() else " "
    rows, solved = ([replace(example, completion=gap + example.completion) for example in some] for some in (examples, shots))
    shaped, template = framed(asked, form, None, rows, solved, "{prompt}\n")
    return Task(shaped, replace(config, shots=len(shots)), metric, scorer, (SHOT_END,) if shots else (), template)


def text_scores(
    metrics: Sequence[str], references: Sequence[Sequence[str]], predictions: Sequence[str], fold_whitespace: bool = False
) -> dict[str, list[float]]:
    """Exact match and ROUGE, if among the `metrics`. The best of several references counts."""
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
    """All rows, and the config with the column names. Without a reference column only conversations have references."""
    data = DataConfig(source, config.split, seed=config.seed)
    if is_parsing(data):
        pairs = [_Pair(example, [example.completion]) for example in load_examples(data)]
        return pairs, replace(config, prompt_column="prompt", completion_column="completion")
    rows = list(load_records(data))
    first, answer = rows[0], config.completion_column
    if answer is None and any(name in row.fields for row in rows for name in REFERENCE_NAMES):
        answer = first.first_column(REFERENCE_NAMES)
        if answer not in first.fields:
            columns = ", ".join(REFERENCE_NAMES)
            raise DataError(f"{first.where}: needed a reference (one of the columns {columns}), which other rows have")
    asked = config.prompt_column or first.first_column(PROMPT_NAMES)
    pairs = []
    for row in rows:
        references = row.texts(answer, "completion_column") if answer is not None else []
        if asked == MESSAGES:
            prompt, reply = first_turn(row)
            references = references or [reply]
        else:
            prompt = row.texts(asked, "prompt_column")[0] if asked == _TURNS else row.text(asked, "prompt_column")
        category = row.text(_CATEGORY) if row.fields.get(_CATEGORY) is not None else None
        pairs.append(_Pair(Example(prompt, "".join(references[:1])), references, category))
    return pairs, replace(config, prompt_column=asked, completion_column=answer or REFERENCE_NAMES[0])


def summaries(
    config: TaskConfig,
    hub_id: str,
    hub: Mapping[str, Any],
    shots: int = 0,
    form: str = _FORM,
    stop: tuple[str, ...] = _STOP,
    alternatives: bool = False,
) -> Task:
    """Articles and summaries; `alternatives`: a row's summaries are several references, not the sentences of one."""

    def references(row: Record) -> list[str]:
        column = row.first_column(_SUMMARIES)
        return [" ".join(text.split()) for text in (row.texts(column) if alternatives else [row.text(column)])]

    def example(row: Record) -> Example:
        return Example(row.text(row.first_column(_ARTICLES)), " " + references(row)[0])

    data = str(config.data)
    rows = rows_of(data, hub_id, config.split, **hub)
    if "summary_gt" in rows[0].fields:
        shots, form, stop = 0, BARE, _READY_STOP
    count = shots if config.shots is None else config.shots
    if data == hub_id:
        first = rows_of(data, hub_id, "train", count, **hub) if count else []
    else:
        first, rows = shots_and_rest(rows, count, data)
    rows = spread(rows, config.samples)
    examples, template = framed(config.prompting.asked, form, BARE, map(example, rows), list(map(example, first)))
    scorer = partial(text_scores, ROUGES, list(map(references, rows)))
    return Task(examples, replace(config, shots=count), "rouge2", scorer, stop, template)


def _of_summaries(hub_id: str, max_new_tokens: int, hub: Mapping[str, Any], **form: Any) -> TaskLoader:
    return TaskLoader(partial(summaries, hub_id=hub_id, hub=hub, **form), ("shots", "template"), hub_id, max_new_tokens)


def language_modelling(config: TaskConfig) -> Task:
    """A plain text, or the joined texts of rows, for perplexity; for speed, continuations of evenly spaced passages."""
    path = Path(str(config.data))
    if config.data == _WIKITEXT:
        text = "".join(str(row.value("text")) for row in hub_records(_HUB, config.split, name=_HUB_NAME))
    elif file_ending(path) != _PLAIN and (file_ending(path) in FILE_ENDINGS or not path.exists()):
        rows = list(load_records(DataConfig(str(config.data), config.split)))
        column = config.completion_column or rows[0].first_column(_TEXT_COLUMNS)
        text = "\n\n".join(row.text(column, "completion_column") for row in rows)
    else:
        text = "".join(text_lines(path, "data"))
        if not text.strip():
            raise DataError(f"`data` {path} holds no text")
    most = max(len(text) // _PASSAGE, 1)
    count, examples = min(config.samples or most, most), []
    for start in (number * len(text) // count for number in range(count)):
        words = text[start : start + 20 * _PROMPT_WORDS].split()
        words = words[1:] if start and len(words) > 1 else words
        if words:  # a passage can be all whitespace
            reference = " ".join(words[_PROMPT_WORDS : 2 * _PROMPT_WORDS])
            examples.append(Example(" ".join(words[:_PROMPT_WORDS]), f" {reference}"))
    return Task(tuple(examples), config, "perplexity", lambda predictions: {}, template=BARE, text=text)


COMMANDS = TaskLoader(parsing, ("shots", "template"), "commands")
TOPV2 = TaskLoader(parsing, ("shots", "template"), "topv2")
PROMPTS = TaskLoader(prompts, ("metric", "shots", "template"), needs_data=True)
CNN_DM = _of_summaries("abisee/cnn_dailymail", 128, {"name": "3.0.0"}, shots=1)
XSUM = _of_summaries("EdinburghNLP/xsum", 64, {"revision": _AS_PARQUET})
# Abstracts of papers (Cachola et al., 2020). A row can have several summaries; the best counts.
_ABSTRACTS = {"data_dir": "Abstract", "revision": _AS_PARQUET}
SCITLDR = _of_summaries("allenai/scitldr", 64, _ABSTRACTS, form="{prompt}\nTL;DR:", stop=("\nTL;DR:",), alternatives=True)
LANGUAGE_MODELLING = TaskLoader(language_modelling, (), _WIKITEXT, max_new_tokens=64)
