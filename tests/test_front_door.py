"""`from layerskip_core import load`, as a program or a notebook uses it."""

import asyncio
import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from chatml import talking_model

import layerskip_core
from layerskip_core import Answer, load
from layerskip_core.config.decoding import DecodingOptions
from layerskip_core.config.options import checked
from layerskip_core.errors import ConfigError

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


def test_asynchronous_answers_share_passes_and_are_given_up_by_closing(model):
    prompts = [PROMPT, "play some jazz", "wake me up at six", "play some jazz"]
    expected = [model.generate(prompt).text for prompt in prompts]

    async def text_of(prompt):
        return "".join([piece async for piece in model.astream(prompt)])

    async def session():
        left = model.astream(PROMPT)
        assert await anext(left)
        await left.aclose()
        found = await asyncio.gather(*map(text_of, prompts))
        with pytest.raises(ConfigError, match="exit_layer"):
            await text_of_deep()
        engine = model._engine
        for _ in range(500):
            if not engine.held:
                break
            await asyncio.sleep(0.01)
        return found, engine.held

    async def text_of_deep():
        return [piece async for piece in model.astream(PROMPT, exit_layer=99)]

    assert asyncio.run(session()) == (expected, 0)
    model.close()
    assert model.generate(PROMPT).text == expected[0]


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    return load(talking_model(tmp_path_factory.mktemp("talking"), 128), device="cpu", dtype="fp32")


def test_what_a_dialogue_says_first(talking, model):
    talk = talking.dialogue(system="Be brief.", max_new_tokens=4)
    stream = talk.ask("start")
    stream.finish()
    with_system = talking.decoder.with_template("chat", "Be brief.")
    assert stream.stats.prompt_tokens == len(with_system.encode_prompt("start")) != len(talking.decoder.encode_prompt("start"))
    alone = model.dialogue(max_new_tokens=4)
    alone.ask(PROMPT).finish()
    assert (alone.has_turns, alone.turns) == (False, ())
    with pytest.raises(ConfigError, match="`system` must be given with the chat template only"):
        model.dialogue(system="Be brief.")


def test_bad_options_name_themselves(model):
    with pytest.raises(ConfigError, match=r"`exit_layer` must be in 1..23, got 24"):
        model.generate(PROMPT, exit_layer=24)
    with pytest.raises(ConfigError, match=r"`temperature` must be a number in \[0, 1000\], got -1"):
        model.generate(PROMPT, temperature=-1)
    with pytest.raises(TypeError, match="unknown option 'exit'; known: strategy, exit_layer"):
        model.generate(PROMPT, exit=8)
    with pytest.raises(ConfigError, match="the prompt must be valid Unicode"):
        model.generate_batch([PROMPT, "\ud800"])
    with pytest.raises(ConfigError, match="the prompt is empty"):
        model.generate("")
    with pytest.raises(ConfigError, match="`dtype` must be one of auto, fp32, bf16, got fp16"):
        load("embedded", device="cpu", dtype="fp16")
    with pytest.raises(ConfigError, match=r"`template` must be raw, chat or a text with {prompt} in it, got Answer: "):
        load("embedded", device="cpu", template="Answer: ")


def test_numbers_of_numpy_are_numbers_and_none_is_left_out():
    asked = {"exit_layer": np.int64(8), "skip": np.array([2, 3]), "top_p": np.float32(0.5), "temperature": None, "stop": None}
    plain = {"exit_layer": 8, "skip": [2, 3], "top_p": 0.5}
    assert checked(DecodingOptions, asked) == checked(DecodingOptions, plain) == plain
    assert type(checked(DecodingOptions, asked)["exit_layer"]) is int


def test_importing_the_package_imports_nothing_heavy():
    code = "import json, sys, layerskip_core; print(json.dumps([name in sys.modules for name in ('torch', 'transformers')]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == [False, False]
