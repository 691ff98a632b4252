"""Chat templates render as in transformers, and cannot leave their sandbox; which template is used."""

import itertools
from types import SimpleNamespace

import pytest
from chatml import TEMPLATE, chatml_folder, full_tokenizer

from layerskip_core.checkpoint.folder import lean_tokenizer
from layerskip_core.errors import CheckpointError, ConfigError
from layerskip_core.prompting import CHAT, RAW, PromptTemplate, render_chat, resolve_template

TURNS = [
    {"role": "system", "content": " be\n"},
    {"role": "user", "content": "né 🏠 <b>"},
    {"role": "assistant", "content": "'ok'"},
]
SEVERAL = {"default": TEMPLATE, "tool_use": "{{ raise_exception('no') }}"}
GOOD = [
    TEMPLATE,
    SEVERAL,
    "{{ bos_token }}{% for m in messages %}\n  {% if loop.index > 1 %}\n    {% continue %}\n{% endif %}\n"
    "{{ m | tojson }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ tools is none }}{{ documents }}",
    "{% macro turn(m) %}<{{ m['role'] }}>{{ m.content.split('b')[0] }}{% endmacro %}{{ turn(messages[0]) }}{{ unk_token }}",
    "{{ messages[1].content[:4] | upper }}{% if add_generation_prompt %}!{% endif %}{{ nothing is defined }}{{ dict(a=1) }}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatml_folder(tmp_path_factory.mktemp("chatml"))


@pytest.fixture
def full(folder):
    return full_tokenizer(folder)


@pytest.mark.parametrize("template", GOOD, ids=range(len(GOOD)))
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_equals_that_of_transformers(folder, full, template, prompt):
    lean = lean_tokenizer(str(folder))
    assert lean.special_tokens_map == full.special_tokens_map
    full.chat_template = lean.chat_template = template
    expected = full.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)
    assert expected and render_chat(full, TURNS, prompt) == render_chat(lean, TURNS, prompt) == expected
    lean.chat_template = [{"name": name, "template": text} for name, text in SEVERAL.items()]  # as in tokenizer_config.json
    full.chat_template = SEVERAL
    assert render_chat(lean, TURNS, prompt) == full.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "TemplateError: roles must"),
        ("{% for %}", "TemplateSyntaxError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
        ("{{ messages[9].content }}", "UndefinedError: "),
        ("{{ ''.__class__.mro() }}", "SecurityError: "),
        ("{{ dict.mro() }}", "SecurityError: "),
        ("{{ namespace.__init__.__globals__ }}", "SecurityError: "),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{% include '/etc/passwd' %}", "TypeError: no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ({"other": TEMPLATE}, ""),
        (7, ""),
    ],
    ids=itertools.count(),
)
def test_a_template_that_fails_is_one_error(full, template, reason):
    full.chat_template = template
    with pytest.raises(CheckpointError, match=f"the model's chat template cannot be used: {reason}"):
        render_chat(full, TURNS, True)


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
