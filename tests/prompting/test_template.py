"""Which template is used: what the user asks for, else the checkpoint's, else the tokenizer's chat template, else none."""

from types import SimpleNamespace

import pytest

from layerskip_core.errors import ConfigError
from layerskip_core.prompting import CHAT, RAW, PromptTemplate, resolve_template

WITH_CHAT, WITHOUT = SimpleNamespace(chat_template="{{ messages }}"), SimpleNamespace(chat_template=None)
STORED, STORED_CHAT = PromptTemplate("Q: {prompt}"), PromptTemplate(CHAT, "Be brief.")


@pytest.mark.parametrize(
    ("asked", "system", "stored", "tokenizer", "expected"),
    [
        (None, None, None, WITHOUT, PromptTemplate(RAW)),
        (None, None, None, WITH_CHAT, PromptTemplate(CHAT)),
        (None, None, STORED, WITH_CHAT, STORED),
        (None, None, PromptTemplate(RAW), WITH_CHAT, PromptTemplate(RAW)),
        (None, None, STORED_CHAT, WITH_CHAT, STORED_CHAT),
        ("chat", None, STORED, WITH_CHAT, PromptTemplate(CHAT)),
        ("chat", None, STORED_CHAT, WITH_CHAT, PromptTemplate(CHAT)),  # a stored system message belongs to its template
        ("raw", None, STORED_CHAT, WITH_CHAT, PromptTemplate(RAW)),
        ("A {prompt}", None, STORED, WITH_CHAT, PromptTemplate("A {prompt}")),
        (None, "Hi.", None, WITH_CHAT, PromptTemplate(CHAT, "Hi.")),
        (None, "Hi.", STORED_CHAT, WITH_CHAT, PromptTemplate(CHAT, "Hi.")),
        ("chat", "Hi.", STORED, WITH_CHAT, PromptTemplate(CHAT, "Hi.")),
    ],
)
def test_the_order_of_templates(asked, system, stored, tokenizer, expected):
    assert resolve_template(asked, system, stored, tokenizer) == expected


@pytest.mark.parametrize(
    ("asked", "system", "stored", "tokenizer", "message"),
    [
        ("chat", None, None, WITHOUT, "a chat template was asked for, but the model's tokenizer has none"),
        (None, "Hi.", None, WITHOUT, "system.* must be given with the chat template only, got the template raw"),
        (None, "Hi.", STORED, WITH_CHAT, r"system.* must be given with the chat template only, got the template 'Q: {prompt}'"),
        ("raw", "Hi.", STORED_CHAT, WITH_CHAT, "system.* must be given with the chat template only, got the template raw"),
    ],
)
def test_what_cannot_be_applied_is_refused(asked, system, stored, tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        resolve_template(asked, system, stored, tokenizer)


def test_names_for_reports():
    templates = (PromptTemplate(), PromptTemplate(CHAT), STORED_CHAT, PromptTemplate("{prompt}\n"))
    assert [template.name for template in templates] == ["raw", "chat", "chat with a system message", r"'{prompt}\n'"]
