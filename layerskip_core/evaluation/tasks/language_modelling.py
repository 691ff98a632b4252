"""Perplexity of any text through every exit. For speed, passages of the text are continued."""

from pathlib import Path

from ...config.evaluation import TaskConfig
from ...data import FILE_ENDINGS, Example, file_ending, file_records, hub_records
from ...errors import DataError
from ...files import text_lines
from . import BARE, Task, TaskLoader

_HUB, _HUB_NAME = "Salesforce/wikitext", "wikitext-2-raw-v1"
_WIKITEXT = f"{_HUB}/{_HUB_NAME}"
_TEXT_COLUMNS = ("text", "completion", "content")
_PLAIN = ".txt"  # read as one text, like any file that does not hold rows
_PROMPT_WORDS = 100  # as in LayerSkip's evaluation of continuations
_PASSAGE = 2000  # characters: about the 512 tokens of a perplexity window


def language_modelling(config: TaskConfig) -> Task:
    """A plain text, or the joined texts of rows. The prompts are evenly spaced over it.

    Continuations are not scored: the text itself is only one of many good ones.
    """
    text = _text(config)
    most = max(len(text) // _PASSAGE, 1)
    starts = min(config.samples or most, most)
    passages = (_passage(text, number * len(text) // starts) for number in range(starts))
    examples = tuple(example for example in passages if example.prompt)  # a passage can be all whitespace
    return Task(examples, config, "perplexity", lambda predictions: {}, template=BARE, text=text)


def _text(config: TaskConfig) -> str:
    path = Path(str(config.data))
    if config.data == _WIKITEXT:
        return "".join(str(row.value("text")) for row in hub_records(_HUB, config.split, name=_HUB_NAME))
    if file_ending(path) in FILE_ENDINGS and file_ending(path) != _PLAIN:
        rows = list(file_records(path))
        column = config.completion_column or rows[0].first_column(_TEXT_COLUMNS)
        return "\n\n".join(row.text(column, "completion_column") for row in rows)
    text = "".join(text_lines(path, "data"))
    if not text.strip():
        raise DataError(f"`data` {path} holds no text")
    return text


def _passage(text: str, start: int) -> Example:
    """A prompt of the first whole words at `start`, and as many words that follow as its reference."""
    words = text[start : start + 20 * _PROMPT_WORDS].split()
    words = words[1:] if start and len(words) > 1 else words
    return Example(" ".join(words[:_PROMPT_WORDS]), " " + " ".join(words[_PROMPT_WORDS : 2 * _PROMPT_WORDS]))


LANGUAGE_MODELLING = TaskLoader(language_modelling, (), _WIKITEXT, max_new_tokens=64)
