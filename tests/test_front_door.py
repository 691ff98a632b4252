"""`from layerskip_core import load`, as a program or a notebook uses it."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import fields

import pytest

import layerskip_core
from layerskip_core import Answer, load
from layerskip_core.config.decoding import DecodingSettings, GenerationSettings, SamplingConfig
from layerskip_core.errors import ConfigError
from layerskip_core.language_model import DecodingOptions, decoding_settings

PROMPT = "remind me to call mom at 5"


@pytest.fixture(scope="module")
def model():
    return load("embedded", device="cpu")


def test_the_example_of_the_package_runs():
    example = layerskip_core.__doc__.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
    lines = [line.removeprefix("    ") for line in example.splitlines()]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec("\n".join(lines), {})
    reminder, music = printed.getvalue().splitlines()
    assert reminder.startswith("[IN:CREATE_REMINDER ")
    assert music.startswith("[IN:PLAY_MUSIC ")


def test_all_strategies_give_the_same_answer(model):
    plain = model.generate(PROMPT, strategy="autoregressive")
    speculative = model.generate(PROMPT, exit_layer=8, num_draft_tokens=6)
    assert isinstance(plain, Answer)
    assert (plain.text, plain.finish_reason) == (speculative.text, speculative.finish_reason)
    assert plain.stats.drafted == 0 < speculative.stats.accepted
    assert plain.stats.new_tokens == speculative.stats.new_tokens
    assert model.generate_batch([PROMPT, "play some jazz"])[0].text == plain.text


def test_a_stream_gives_the_answer_in_pieces(model):
    stream = model.stream(PROMPT)
    with pytest.raises(RuntimeError, match="not finished"):
        stream.answer  # noqa: B018
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.answer.text == model.generate(PROMPT).text


def test_stop_and_length_end_an_answer(model):
    whole = model.generate(PROMPT).text
    for stop in (whole[5:8], (whole[5:8], "never there")):
        stopped = model.generate(PROMPT, stop=stop)
        assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(whole[5:8])], "stop")
    assert model.generate(PROMPT, max_new_tokens=3).stats.new_tokens == 3


def test_bad_options_name_themselves(model):
    with pytest.raises(ConfigError, match=r"`exit_layer` must be in 1..23, got 24"):
        model.generate(PROMPT, exit_layer=24)
    with pytest.raises(ConfigError, match="`temperature` must be at least 0, got -1"):
        model.generate(PROMPT, temperature=-1)
    with pytest.raises(TypeError, match="unknown decoding option 'exit'; known: strategy, exit_layer"):
        model.generate(PROMPT, exit=8)
    with pytest.raises(ConfigError, match="the prompt must be valid Unicode"):
        model.generate_batch([PROMPT, "\ud800"])


def test_every_field_of_the_settings_is_an_option():
    configs = (DecodingSettings, GenerationSettings, SamplingConfig)
    names = {field.name for config in configs for field in fields(config)} - {"generation", "sampling"}
    assert names == set(DecodingOptions.__annotations__)
    settings = decoding_settings({"top_p": 0.5, "stop": ["x"], "num_draft_tokens": 3})
    assert (settings.num_draft_tokens, settings.generation.stop, settings.generation.sampling.top_p) == (3, ("x",), 0.5)


def test_importing_the_package_imports_nothing_heavy():
    code = "import json, sys, layerskip_core; print(json.dumps([name in sys.modules for name in ('torch', 'transformers')]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == [False, False]
