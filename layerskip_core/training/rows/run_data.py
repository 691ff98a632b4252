"""The rows of a run: which data it reads, and how the rows are encoded."""

import itertools
from dataclasses import replace
from pathlib import Path

from ...checkpoint.loaded import Trainable
from ...config.checks import require
from ...config.data import DataConfig
from ...config.training import FinetuneConfig
from ...data.examples import PARSING_TEMPLATE, Conversation, Example, Row, is_parsing, load_rows, stream_rows
from ...errors import ConfigError
from ...prompting import CHAT, RAW, PromptTemplate, resolve_template
from ..plan import COMMANDS_STEPS
from .encoded_data import EncodedData, encode_rows, encode_stream
from .encoder import Encoder
from .step_rows import data_rows

_VALIDATION_ROWS = 256


def training_rows(config: FinetuneConfig) -> list[Row]:
    """The rows to train on; of a stream only the first, to see what its rows are."""
    data = config.data
    if config.streaming:
        return list(itertools.islice(stream_rows(data), 1))
    if data.name == "commands" and not data.limit:
        # The generator has no end: a run draws as many rows as it will see, so that none repeats.
        data = replace(data, limit=(config.steps or COMMANDS_STEPS) * data_rows(config))
    return load_rows(data)


def make_encoder(config: FinetuneConfig, trainable: Trainable, rows: list[Row], max_length: int) -> Encoder:
    """Encodes both the rows to train on, of which `rows` are an example, and those to validate on."""
    return Encoder(trainable.tokenizer, _template(config, trainable, rows), max_length, _packs(config, rows))


def encode_training(config: FinetuneConfig, encoder: Encoder, rows: list[Row]) -> EncodedData:
    """The rows to train on: in memory, or a stream."""
    return encode_stream(config.data, encoder, config.seed) if config.streaming else encode_rows(rows, encoder)


def encode_validation(config: FinetuneConfig, encoder: Encoder) -> EncodedData | None:
    """The rows of `validation`; None if the run has no validation."""
    if config.validation is None:
        return None
    return encode_rows(load_rows(validation_data(config, config.validation)), encoder)


def validation_data(config: FinetuneConfig, name: str) -> DataConfig:
    """`validation`: other data (a named set, a file, a folder, a hub id), or else a split of `data`."""
    other = name in ("commands", "topv2") or "/" in name or Path(name).exists() or Path(name).suffix != ""
    if not other and Path(config.data.name).is_file():
        raise ConfigError(f"`validation` must be other data where `data` is a file, which has no splits, got {name}")
    limit = _VALIDATION_ROWS if config.validation_samples is None else config.validation_samples
    held_out = replace(config.data, limit=limit, setting="validation")
    return replace(held_out, name=name, split="validation") if other else replace(held_out, split=name)


def conversation_template(config: FinetuneConfig) -> PromptTemplate:
    """The template of conversations. Raises ConfigError for settings that they do not use."""
    asked, system = config.prompting.asked, config.prompting.system
    require(asked in (None, CHAT), "template", "chat for conversations", asked)
    require(system is None, "system", "left out for conversations, which have system messages of their own", system)
    return PromptTemplate(CHAT)


def _packs(config: FinetuneConfig, rows: list[Row]) -> bool:
    """Whether documents are packed: by default for plain text, without prompts, in a regime for language-model data."""
    if config.pack is not None:
        return config.pack
    return config.regime != "finetune" and all(isinstance(row, Example) and not row.prompt for row in rows)


def _template(config: FinetuneConfig, trainable: Trainable, rows: list[Row]) -> PromptTemplate:
    """The template asked for; else chat for conversations, the parsing template for parsing data, and otherwise what decoding
    uses by default. Where that is no template, a prompt gets a line end; plain text has none.
    """
    if any(isinstance(row, Conversation) for row in rows):
        return conversation_template(config)
    asked, system, stored = config.prompting.asked, config.prompting.system, trainable.info.template
    template = resolve_template(asked, system, stored, trainable.tokenizer)
    prompts = any(isinstance(row, Example) and row.prompt for row in rows)
    by_default = is_parsing(config.data) or (stored is None and template.text == RAW and prompts)
    return PromptTemplate(PARSING_TEMPLATE) if asked is None and system is None and by_default else template
