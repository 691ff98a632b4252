"""Parsing (`commands`, `topv2`), scored by exact match; summaries; any data with prompts and
references (`jsonl`); plain text.

Summaries: of news, with the prompts of LayerSkip's evaluation (CNN/DM, 1-shot; XSUM, 0-shot), and
of papers in one sentence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...checkpoint.locate import ModelRef
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
    own_splits,
)
from ...errors import DataError, require
from ...files import text_lines
from ...prompting import CHAT, RAW
from ...splits import TEST, VALIDATION, key_of
from ..metrics import ROUGES, exact_match, text_scores
from .task import (
    BARE,
    SHOT_END,
    Scorer,
    Task,
    TaskLoader,
    framed,
    load_task,
    part_for,
    rows_for,
    rows_of,
    shots_and_rest,
)

_TURNS = "turns"  # of a user, without the answers between them: only the first is a prompt
_CATEGORY = "category"
_FORM = "Article: {prompt}\nSummary:"
_STOP = ("\nArticle:",)  # a base model continues with another article
_ARTICLES = ("article", "document", "source")
_SUMMARIES = ("highlights", "summary", "summary_gt", "target")
_READY_STOP = ("###",)  # for complete prompts in HELM's form, with their own shots
# The hub's Parquet branch: `datasets` no longer runs loading scripts
_AS_PARQUET = "refs/convert/parquet"
_HUB = "Salesforce/wikitext"
_HUB_NAME = "wikitext-2-raw-v1"
_WIKITEXT = f"{_HUB}/{_HUB_NAME}"
_TEXT_COLUMNS = ("text", "completion", "content")
_PLAIN = ".txt"  # read as one text, like any file that does not hold rows
_PROMPT_WORDS = 100  # as in LayerSkip's evaluation of continuations
_PIECES = 128  # at most, of a text that is divided
_ROWS = "rows: "  # how a note begins that says which rows are measured
_PASSAGE = 2000  # characters: about the 512 tokens of a perplexity window
_UNANSWERED = (
    f"the data has no references (one of the columns {', '.join(REFERENCE_NAMES)}, or the one that `completion_column` "
    "names): answers are scored against the model's own at full depth"
)


def load_trained(asked: TaskConfig, model: str) -> Task:
    """Like `load_task`; without `task` and `data` on the training data in layerskip.json, on unseen
    rows if possible.
    """
    info = info_of(ModelRef.of(model).fetched())
    asked = replace(asked, held_out=info.held_out or None)
    data, validation = info.trained_on
    if asked.task or asked.data or data is None or data.name == "commands":
        return load_task(asked)
    fault = None
    for choice in _unseen(asked, data, validation):
        try:
            task = load_task(_like_training(choice, data))
        except DataError as error:
            fault = error
            continue
        if any(note.startswith(_ROWS) for note in task.notes):
            return task
        how = "which the model was not trained on"
        if (choice.data, choice.split) == (data.name, data.split):
            how = "which the model was trained on; `data` gives others"
        note = f"{_ROWS}{choice.data}, split {choice.split}, {how}"
        return replace(task, notes=(note, *task.notes))
    raise DataError(f"the rows that {model} was trained for: {fault}; give `data` or `task`")


def _unseen(asked: TaskConfig, data: DataConfig, validation: str | None) -> Iterator[TaskConfig]:
    """Where rows that a model was not trained on can be, the best first; at last its training data.
    See splits.py.
    """
    side = VALIDATION if asked.split == VALIDATION else TEST
    if validation and is_data(validation):
        given = replace(asked, data=validation)
        if own_splits(DataConfig(validation)):
            yield given
        else:
            yield replace(given, split=VALIDATION, side=side)
    of_data = replace(asked, data=data.name)
    splits = own_splits(DataConfig(data.name))
    reporting = [split for split in (VALIDATION, TEST) if split in splits]
    if asked.split in splits and len(reporting) > 1:
        yield of_data
    elif reporting:  # one split chooses and reports
        yield replace(of_data, split=reporting[0], side=side)
    elif not splits and file_ending(Path(data.name)) not in FILE_ENDINGS:
        yield of_data
    yield replace(of_data, split=data.split, side=side)


def _like_training(config: TaskConfig, trained: DataConfig) -> TaskConfig:
    """Takes the training's columns if the data has them; task `lm` for text without prompts."""
    data = DataConfig(str(config.data), config.split)
    if is_parsing(data):
        return config
    if file_ending(Path(data.name)) == _PLAIN:
        return replace(config, task="lm")
    fields = next(load_records(data, streaming=True)).fields
    if not fields.keys() & {trained.prompt_column, *PROMPT_NAMES}:
        config = replace(config, task="lm")
    if config.prompt_column is None and trained.prompt_column in fields:
        config = replace(config, prompt_column=trained.prompt_column)
    if config.completion_column is None and trained.completion_column in fields:
        config = replace(config, completion_column=trained.completion_column)
    return config


def parsing(config: TaskConfig) -> Task:
    """Sentences and their parses, compared with folded whitespace, in which tokenizers differ.
    Shots are training rows.
    """
    config = replace(
        config,
        prompt_column=config.prompt_column or "prompt",
        completion_column=config.completion_column or "completion",
    )
    data = DataConfig(
        str(config.data),
        config.split,
        str(config.prompt_column),
        str(config.completion_column),
        limit=config.samples,
        seed=config.seed,
    )
    notes: tuple[str, ...] = ()
    if config.side is None:
        examples = load_examples(data)
    else:
        every = load_examples(replace(data, limit=0))
        examples, notes = rows_for(every, [row.key for row in every], config, data.name)
    shots: Sequence[Example] = []
    if config.shots:
        # Evenly spaced, to cover all domains.
        shots = load_examples(replace(data, split="train", limit=config.shots))
    references = [[example.completion] for example in examples]

    def scorer(predictions: Sequence[str]) -> dict[str, list[float]]:
        return {"exact_match": exact_match(predictions, references, fold_whitespace=True)}

    return replace(_few_shot(config, "exact_match", scorer, examples, shots), notes=notes)


def prompts(config: TaskConfig) -> Task:
    """Prompts with one or more references each. The first `shots` rows come before every prompt.

    Data without references is scored against the model's own answers, by ROUGE-L. A column
    `category` groups the rows. With references the default metric is ROUGE-2, or exact match if all
    are single words.
    """
    source = str(config.data)
    every, config = _pairs(source, config)
    shots, rest = shots_and_rest(every, config.shots or 0, source)
    has_splits = is_parsing(DataConfig(source)) or not Path(source).exists()
    rows, notes = rows_for(rest, [row.key for row in rest], config, source, has_splits)
    has_references = bool(rows[0].references)
    can_show = has_references or not shots
    require(can_show, "shots", f"0 for {source}, which has no references", len(shots))
    metrics = _metrics_of(config, rows)
    scorer = partial(text_scores, metrics, [row.references for row in rows])
    ranking = config.metric or metrics[0]
    task = _few_shot(
        config, ranking, scorer, [row.example for row in rows], [row.example for row in shots]
    )
    categories: dict[str, tuple[int, ...]] = {}
    for number, row in enumerate(rows):
        if row.category:
            categories[row.category] = (*categories.get(row.category, ()), number)
    task = replace(task, categories=categories, notes=notes)
    if has_references:
        return task
    return replace(
        task, notes=(*notes, _UNANSWERED), against=partial(partial, text_scores, metrics)
    )


def _metrics_of(config: TaskConfig, rows: Sequence["_Pair"]) -> tuple[str, ...]:
    """The metrics that suit the references, the one that ranks settings first; or the given one, a
    ROUGE among all of them.
    """
    if config.metric in ROUGES:
        return ROUGES
    if config.metric is not None:
        return (config.metric,)
    if not rows[0].references:
        return ("rougeL", "exact_match")
    for row in rows:
        if any(len(text.split()) > 1 for text in row.references):
            return ("rouge2", "exact_match")
    return ("exact_match",)


def _few_shot(
    config: TaskConfig,
    metric: str,
    scorer: Scorer,
    examples: Sequence[Example],
    shots: Sequence[Example],
) -> Task:
    """A task with solved rows before each prompt. After a user's template a completion begins with
    a space.
    """
    asked = config.prompting.asked
    form = "{prompt}\n" if shots and asked == RAW else BARE
    gap = "" if asked in (None, CHAT, RAW, BARE) or asked[-1].isspace() else " "

    def spaced(some: Sequence[Example]) -> list[Example]:
        return [replace(example, completion=gap + example.completion) for example in some]

    shaped, template = framed(asked, form, None, spaced(examples), spaced(shots), "{prompt}\n")
    return Task(
        shaped,
        replace(config, shots=len(shots)),
        metric,
        scorer,
        (SHOT_END,) if shots else (),
        template,
    )


class _Pair(NamedTuple):
    example: Example
    references: list[str]
    key: str
    category: str | None = None


def _pairs(source: str, config: TaskConfig) -> tuple[list[_Pair], TaskConfig]:
    """All rows, and the config with the column names. Without a reference column only conversations
    have references.
    """
    data = DataConfig(source, config.split, seed=config.seed)
    if is_parsing(data):
        pairs = []
        for example in load_examples(data):
            pairs.append(_Pair(example, [example.completion], example.key))
        return pairs, replace(config, prompt_column="prompt", completion_column="completion")
    rows = list(load_records(data))
    reference = _reference_column(config, rows)
    asked = config.prompt_column or rows[0].first_column(PROMPT_NAMES)
    pairs = []
    for row in rows:
        references = [] if reference is None else row.texts(reference, "completion_column")
        if asked == MESSAGES:
            prompt, reply = first_turn(row)
            references = references or [reply]
        elif asked == _TURNS:
            prompt = row.texts(asked, "prompt_column")[0]
        else:
            prompt = row.text(asked, "prompt_column")
        category = None
        if row.fields.get(_CATEGORY) is not None:
            category = row.text(_CATEGORY)
        example = Example(prompt, "".join(references[:1]))
        pairs.append(_Pair(example, references, row.key, category))
    named = reference or REFERENCE_NAMES[0]
    return pairs, replace(config, prompt_column=asked, completion_column=named)


def _reference_column(config: TaskConfig, rows: Sequence[Record]) -> str | None:
    """None if no row has a reference."""
    if config.completion_column is not None:
        return config.completion_column
    if not any(row.fields.keys() & set(REFERENCE_NAMES) for row in rows):
        return None
    column = rows[0].first_column(REFERENCE_NAMES)
    if column not in rows[0].fields:
        columns = ", ".join(REFERENCE_NAMES)
        raise DataError(
            f"{rows[0].where}: needed a reference (one of the columns {columns}), "
            "which other rows have"
        )
    return column


def summaries(
    config: TaskConfig,
    hub_id: str,
    hub: Mapping[str, Any],
    shots: int = 0,
    form: str = _FORM,
    stop: tuple[str, ...] = _STOP,
    alternatives: bool = False,
) -> Task:
    """Articles and summaries; `alternatives`: a row's summaries are several references, not the
    sentences of one.
    """

    def references(row: Record) -> list[str]:
        column = row.first_column(_SUMMARIES)
        texts = row.texts(column) if alternatives else [row.text(column)]
        return [" ".join(text.split()) for text in texts]

    def example(row: Record) -> Example:
        return Example(row.text(row.first_column(_ARTICLES)), " " + references(row)[0])

    source = str(config.data)
    rows = rows_of(source, hub_id, config.split, **hub)
    if "summary_gt" in rows[0].fields:  # complete prompts in HELM's form
        shots = 0
        form = BARE
        stop = _READY_STOP
    count = shots if config.shots is None else config.shots
    solved: list[Record] = []
    if source != hub_id:
        solved, rows = shots_and_rest(rows, count, source)
    elif count:
        solved = rows_of(source, hub_id, "train", count, **hub)
    keys = [row.key for row in rows]
    rows, notes = rows_for(rows, keys, config, source, has_splits=source == hub_id)
    examples, template = framed(
        config.prompting.asked, form, BARE, map(example, rows), list(map(example, solved))
    )
    scorer = partial(text_scores, ROUGES, list(map(references, rows)))
    config = replace(config, shots=count)
    return Task(examples, config, "rouge2", scorer, stop, template, notes=notes)


def _of_summaries(
    hub_id: str, max_new_tokens: int, hub: Mapping[str, Any], **form: Any
) -> TaskLoader:
    return TaskLoader(
        partial(summaries, hub_id=hub_id, hub=hub, **form),
        ("shots", "template"),
        hub_id,
        max_new_tokens,
    )


def language_modelling(config: TaskConfig) -> Task:
    """A plain text, or the joined texts of rows, for perplexity; for speed, continuations of evenly
    spaced passages.
    """
    text, notes = _text_and_notes(config)
    most = max(len(text) // _PASSAGE, 1)
    count = min(config.samples or most, most)
    examples = []
    for number in range(count):
        start = number * len(text) // count
        words = text[start : start + 20 * _PROMPT_WORDS].split()
        if start and len(words) > 1:
            words = words[1:]  # the first may be cut
        if words:  # a passage can be all whitespace
            reference = " ".join(words[_PROMPT_WORDS : 2 * _PROMPT_WORDS])
            examples.append(Example(" ".join(words[:_PROMPT_WORDS]), f" {reference}"))
    return Task(
        tuple(examples),
        config,
        "perplexity",
        lambda predictions: {},
        template=BARE,
        text=text,
        notes=notes,
    )


def _text_and_notes(config: TaskConfig) -> tuple[str, tuple[str, ...]]:
    """The text of the side that the task asks for: of rows, else of pieces of a running text."""
    path = Path(str(config.data))
    ending = file_ending(path)
    if config.data == _WIKITEXT:
        rows = hub_records(_HUB, config.split, name=_HUB_NAME)
        return "".join(str(row.value("text")) for row in rows), ()
    if ending != _PLAIN and (ending in FILE_ENDINGS or not path.exists()):
        return _text_of_rows(config, "\n\n", has_splits=not path.exists())
    text = "".join(text_lines(path, "data"))
    if not text.strip():
        raise DataError(f"`data` {path} holds no text")
    if ending == _PLAIN and _was_trained_on(config):
        return _text_of_rows(config, "\n")
    return _text_of_pieces(config, text)


def _text_of_rows(
    config: TaskConfig, between: str, has_splits: bool = False
) -> tuple[str, tuple[str, ...]]:
    """The joined texts of the rows that the task asks for, and a note for the user. All of them:
    `samples` counts windows.
    """
    rows = list(load_records(DataConfig(str(config.data), config.split)))
    column = config.completion_column or rows[0].first_column(_TEXT_COLUMNS)
    part = part_for([row.key for row in rows], config, str(config.data), has_splits)
    texts = [rows[place].text(column, "completion_column") for place in part.places]
    return between.join(texts), part.notes


def _was_trained_on(config: TaskConfig) -> bool:
    """Whether the lines of the text are rows that the model was trained on."""
    if not config.held_out:
        return False
    keys = [row.key for row in load_records(DataConfig(str(config.data)))]
    return any(training.recognises(keys) for training in config.held_out)


def _text_of_pieces(config: TaskConfig, text: str) -> tuple[str, tuple[str, ...]]:
    """The pieces of a running text that the task asks for: whole lines, of a passage's length or a
    128th of the text.
    """
    size = max(_PASSAGE, len(text) // _PIECES)
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) >= size:
            pieces.append("")
        pieces[-1] += line
    keys = [key_of({"text": piece}, ()) for piece in pieces]
    part = part_for(keys, config, f"pieces of {config.data}", False)
    return "".join(pieces[place] for place in part.places), part.notes


COMMANDS = TaskLoader(parsing, ("shots", "template"), "commands")
TOPV2 = TaskLoader(parsing, ("shots", "template"), "topv2")
PROMPTS = TaskLoader(prompts, ("metric", "shots", "template"), needs_data=True)
CNN_DM = _of_summaries("abisee/cnn_dailymail", 128, {"name": "3.0.0"}, shots=1)
XSUM = _of_summaries("EdinburghNLP/xsum", 64, {"revision": _AS_PARQUET})
# Abstracts of papers (Cachola et al., 2020). A row can have several summaries; the best counts.
_ABSTRACTS = {"data_dir": "Abstract", "revision": _AS_PARQUET}
SCITLDR = _of_summaries(
    "allenai/scitldr",
    64,
    _ABSTRACTS,
    form="{prompt}\nTL;DR:",
    stop=("\nTL;DR:",),
    alternatives=True,
)
LANGUAGE_MODELLING = TaskLoader(language_modelling, (), _WIKITEXT, max_new_tokens=64)
