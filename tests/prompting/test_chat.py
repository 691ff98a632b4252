"""Chat templates render as in transformers, and a hostile one can neither hang nor use up memory."""

import itertools
import os
import threading

import pytest
from chatml import TEMPLATE, chatml_folder, full_tokenizer
from command_line import run

from layerskip_core.checkpoint.fast_read import lean_tokenizer
from layerskip_core.errors import CheckpointError, ConfigError
from layerskip_core.prompting import chat
from layerskip_core.prompting.chat import render_chat

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


LATE = "it (took longer than 1 seconds|takes too much memory)"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "TemplateError: roles must"),
        ("{% for %}", "TemplateSyntaxError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
        ("{{ messages[9].content }}", "UndefinedError: "),
        ("{{ ''.__class__.mro() }}", "SecurityError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        (LOOP, "it took longer than 1 seconds"),
        (
            LOOP.replace("{% endfor %}", "{{ 'x' * 99 }}{% endfor %}", 1),
            "it (took longer than 1 seconds|takes too much memory)",
        ),
        ("{{ 10 ** (10 ** 9) }}", LATE),
        ("{{ 1.5 | round(1000000000, 'ceil') }}", LATE),
        ("{{ 'x' * 10 ** 10 }}", "it takes too much memory"),
        ("{% for a in range(20) %}{{ 'x' * 10 ** 6 }}{% endfor %}", "its text is longer than 16777216 characters"),
        ("{" * 5000 + "}", "(TemplateSyntaxError|RecursionError|it)"),
        ("{{ " + "(" * 20000 + ")" * 20000 + " }}", "(TemplateSyntaxError|RecursionError|it)"),
        ({"other": TEMPLATE}, "needed a text, or several with one named default"),
        (7, "needed a text, or several with one named default"),
    ],
    ids=itertools.count(),
)
def test_a_template_that_fails_is_one_error(full, monkeypatch, template, reason):
    monkeypatch.setattr(chat, "TIME_LIMIT", 1.0)
    full.chat_template = template
    with pytest.raises(CheckpointError, match=f"the model's chat template cannot be used: {reason}"):
        render_chat(full, TURNS, True)
    full.chat_template = TEMPLATE
    assert render_chat(full, TURNS, False).startswith("<|im_start|>system")  # the next template gets a new renderer


def test_no_template(full):
    full.chat_template = None
    with pytest.raises(ConfigError, match="a chat template was asked for, but the model's tokenizer has none"):
        render_chat(full, TURNS, True)


def test_an_answer_that_nobody_waited_for_is_not_the_next_one(full, monkeypatch):
    """As after Ctrl-C: the first question was asked, and its answer not read."""

    class Interrupted:
        def __init__(self, stream):
            self._stream = stream

        def readline(self):
            raise KeyboardInterrupt

    def asked(content):
        return render_chat(full, [{"role": "user", "content": content}], False)

    full.chat_template = "{{ messages[0].content }}"
    assert asked("before") == "before"
    worker = chat._worker(os.getpid())
    monkeypatch.setattr(worker._process, "stdout", Interrupted(worker._process.stdout))
    with pytest.raises(KeyboardInterrupt):
        asked("interrupted")
    assert [asked("first"), asked("second")] == ["first", "second"]


def test_from_several_threads(full):
    texts = []

    def render(number):
        texts.append(render_chat(full, [{"role": "user", "content": str(number)}], False).endswith(f"{number}<|im_end|>\n"))

    threads = [threading.Thread(target=render, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [True] * 8


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "--samples", "1", "--template", "chat"),
        ("sweep-exits", "--samples", "1", "--template", "chat"),
        ("finetune", "--output", "out", "--samples", "2", "--steps", "1", "--prompt-template", "chat"),
    ],
    ids=lambda command: command[0],
)
def test_chat_without_a_chat_template(checkpoint, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*command, "--model", checkpoint)
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1] == "error: a chat template was asked for, but the model's tokenizer has none"
    assert "Traceback" not in result.err and not list(tmp_path.iterdir())
