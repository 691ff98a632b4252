"""The rows of a run that trains exit blocks: prompts for the model to answer, or prompts with the answers of the data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...checkpoint.loaded import Trainable
from ...config.data import DataConfig
from ...config.training import FinetuneConfig
from ...data.examples import PARSING_TEMPLATE, Conversation, Example, Row, is_parsing, load_prompts, load_rows
from ...errors import DataError
from ...prompting import PromptTemplate, resolve_template
from ..rows.answers import Text
from ..rows.encoder import Encoder
from ..rows.run_data import conversation_template, validation_data
from .settings import Resolved, is_drawn, passes_of, rows_of_run, steps_of

_HELD_OUT, _SHARE = 64, 20  # rows at most, and one in so many


@dataclass(frozen=True)
class RunRows:
    """`prompts` for the model to answer, or `texts` with answers, the `held_out` ones last. `left_out`: too long."""

    prompts: list[list[int]]
    texts: list[Text]
    held_out: int
    left_out: int
    template: PromptTemplate

    @property
    def count(self) -> int:
        return len(self.prompts) or len(self.texts)

    @property
    def tokens(self) -> int:
        """Of the prompts, or of the texts."""
        return sum(map(len, self.prompts)) + sum(len(text.ids) for text in self.texts)


def run_rows(config: FinetuneConfig, settings: Resolved, trainable: Trainable, max_length: int) -> RunRows:
    """The rows of a run within `max_length` tokens; a prompt must leave room for an answer.

    Held out are the rows of `validation`, else the last twentieth of the rows, at most 64. Raises DataError if nothing is left.
    """
    data = config.data
    if is_drawn(config):
        # The generator has no end: a run draws as many rows as its passes need.
        own = 0 if config.validation is not None else _HELD_OUT
        data = replace(data, limit=max(1, round(rows_of_run(config, steps_of(config, 0)) / passes_of(config))) + own)
    rows = _rows(data, settings)
    if config.validation is None:
        cut = len(rows) - min(_HELD_OUT, len(rows) // _SHARE)
        rows, held_out = rows[:cut], rows[cut:]
    else:
        held_out = _rows(validation_data(config, config.validation), settings)
    template = _template(config, trainable, rows)
    encoder = Encoder(trainable.tokenizer, template, max_length)
    if settings.answers == "data":
        own_texts, held_texts = _texts(encoder, rows), _texts(encoder, held_out)
        made = RunRows([], own_texts + held_texts, len(held_texts), len(rows) + len(held_out), template)
        found = len(own_texts)
    else:
        own_prompts, held_prompts = _prompts(encoder, rows), _prompts(encoder, held_out)
        made = RunRows(own_prompts + held_prompts, [], len(held_prompts), len(rows) + len(held_out), template)
        found = len(own_prompts)
    if not found:
        raise DataError(f"no row has room for an answer within `max_length` {max_length}: every prompt is longer")
    return replace(made, left_out=made.left_out - made.count)


def _rows(data: DataConfig, settings: Resolved) -> Sequence[Row]:
    return load_rows(data) if settings.answers == "data" else load_prompts(data)


def _texts(encoder: Encoder, rows: Sequence[Row]) -> list[Text]:
    encoded = (Text(row["input_ids"], row["labels"]) for row in encoder.rows(rows))
    return [text for text in encoded if text.targets]


def _prompts(encoder: Encoder, rows: Sequence[Row]) -> list[list[int]]:
    examples = (row for row in rows if isinstance(row, Example))
    return [prompt for prompt in encoder.prompts(examples) if 0 < len(prompt) < encoder.max_length]


def _template(config: FinetuneConfig, trainable: Trainable, rows: Sequence[Row]) -> PromptTemplate:
    """What decoding uses; for parsing data the template of such data, where the model names none."""
    asked, system, stored = config.prompting.asked, config.prompting.system, trainable.info.template
    if any(isinstance(row, Conversation) for row in rows):
        return conversation_template(config)
    if asked is None and system is None and stored is None and is_parsing(config.data):
        return PromptTemplate(PARSING_TEMPLATE)
    return resolve_template(asked, system, stored, trainable.tokenizer)
