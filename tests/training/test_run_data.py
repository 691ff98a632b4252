"""Which template a run trains on: the one asked for, else the data's, else what decoding uses by default."""

from dataclasses import replace

import pytest
from evaluating import tiny_loaded

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.loaded import Trainable
from layerskip_core.config.model import DataConfig, PromptingConfig
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.data import PARSING_TEMPLATE, Conversation, Example
from layerskip_core.errors import ConfigError
from layerskip_core.prompting import CHAT, RAW, PromptTemplate
from layerskip_core.training.data import make_encoder

EXAMPLE, CONVERSATION = Example("hi", "ho"), Conversation((("user", "hi"), ("assistant", "ho")))
FILE = DataConfig(name="rows.jsonl")


def template_of(prompting=None, data=FILE, rows=(EXAMPLE,), stored=None, chat=None):
    decoder = tiny_loaded()
    tokenizer = type("WithChat", (), {"chat_template": chat})()
    trainable = Trainable("tiny", decoder.backend.model, decoder.backend, tokenizer, stored or CheckpointInfo())
    config = replace(FinetuneConfig(data=data), prompting=prompting or PromptingConfig())
    return make_encoder(config, trainable, list(rows)).template


def test_templates():
    assert template_of() == PromptTemplate(PARSING_TEMPLATE)  # a prompt and a line end
    assert template_of(chat="x") == PromptTemplate(CHAT)
    assert template_of(stored=CheckpointInfo("Q: {prompt}"), chat="x") == PromptTemplate("Q: {prompt}")
    assert template_of(stored=CheckpointInfo(RAW)) == PromptTemplate(RAW)
    assert template_of(rows=[Example("", "plain text")]) == PromptTemplate(RAW)  # else it could not continue a line
    assert template_of(data=DataConfig(), stored=CheckpointInfo("Q: {prompt}"), chat="x") == PromptTemplate(PARSING_TEMPLATE)
    assert template_of(PromptingConfig("A {prompt}"), data=DataConfig()) == PromptTemplate("A {prompt}")
    assert template_of(PromptingConfig(raw=True), chat="x") == PromptTemplate(RAW)
    assert template_of(PromptingConfig(system="Be brief."), chat="x") == PromptTemplate(CHAT, "Be brief.")
    assert template_of(rows=[CONVERSATION], stored=CheckpointInfo("Q: {prompt}"), chat="x") == PromptTemplate(CHAT)


@pytest.mark.parametrize(
    ("prompting", "row", "message"),
    [
        (PromptingConfig("Q: {prompt}"), CONVERSATION, "`template` must be chat for conversations"),
        (PromptingConfig(system="Hi."), CONVERSATION, "`system` must be left out for conversations"),
        (PromptingConfig("chat"), EXAMPLE, "a chat template was asked for, but the model's tokenizer has none"),
        (PromptingConfig(system="Hi."), EXAMPLE, "`system` must be given with the chat template only"),
    ],
)
def test_templates_that_cannot_be_used(prompting, row, message):
    with pytest.raises(ConfigError, match=message):
        template_of(prompting, rows=[row])
