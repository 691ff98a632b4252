"""`from layerskip_core import load`, as a program or a notebook uses it."""

import asyncio
import contextlib
import io
import threading

import numpy as np
import pytest
from chatml import talking_model

import layerskip_core
from layerskip_core import Answer, load
from layerskip_core.config.decoding import DecodingOptions
from layerskip_core.config.options import checked
from layerskip_core.decoding.engine import Engine
from layerskip_core.errors import ConfigError, ContextError

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
            if not engine.num_reserved:
                break
            await asyncio.sleep(0.01)
        return found, engine.num_reserved

    async def text_of_deep():
        return [piece async for piece in model.astream(PROMPT, exit_layer=99)]

    assert asyncio.run(session()) == (expected, 0)
    model.close()
    assert model.generate(PROMPT).text == expected[0]


def test_a_batch_of_many_prompts_is_decoded_in_bounded_steps(model, monkeypatch):
    prompts = [
        f"wake me up at {minute} past {hour} on monday"
        for hour in range(1, 9)
        for minute in range(1, 9)
    ]
    expected = [model.generate(prompt, max_new_tokens=5) for prompt in prompts[::9]]
    passes = []
    honest = Engine._forward

    def recorded(engine, plan, draft):
        passes.append([each.num_tokens for each in plan.rows])
        return honest(engine, plan, draft)

    monkeypatch.setattr(Engine, "_forward", recorded)
    answers = model.generate_batch(prompts, max_new_tokens=5)
    assert len(answers) == 64
    for answer, alone in zip(answers[::9], expected, strict=True):
        assert (answer.text, answer.ids, answer.finish_reason) == (
            alone.text,
            alone.ids,
            alone.finish_reason,
        )
    assert max(map(len, passes)) == 32 and sum(map(sum, passes)) > 64 * 9
    assert max(map(sum, passes)) <= 256 + 32 * 7  # pieces of prompts, and drafts
    passes.clear()
    assert len(model.generate_batch(prompts[:9], batch_size=2, max_new_tokens=2)) == 9
    assert max(map(len, passes)) == 2
    with pytest.raises(
        ConfigError, match=r"`batch_size` must be a whole number in 1..65536, got 0"
    ):
        model.generate_batch(prompts, batch_size=0)
    passes.clear()
    with pytest.raises(ContextError, match="the prompt must be at most"):
        model.generate_batch([PROMPT, "wake " * 2000])
    assert not passes and model.generate_batch([]) == []


def test_threads_that_share_a_model_get_the_answers_that_each_gets_alone(model):
    """Also beside answers of `astream`, and while a stream that was begun is left."""
    prompts = [
        f"remind me to call {name} at {hour}"
        for name in ("mom", "the office", "my wife")
        for hour in range(1, 9)
    ]
    expected = [model.generate(prompt, max_new_tokens=40).text for prompt in prompts]
    found = dict[int, str]()
    left = [model.stream(PROMPT)]
    assert next(iter(left[0]))

    def ask(first):
        for place in range(first, len(prompts), 4):
            found[place] = model.generate(prompts[place], max_new_tokens=40).text

    async def ask_too():
        for place in range(3, len(prompts), 4):
            found[place] = "".join(
                [piece async for piece in model.astream(prompts[place], max_new_tokens=40)]
            )

    threads = [threading.Thread(target=ask, args=(first,), daemon=True) for first in range(3)]
    threads.append(threading.Thread(target=lambda: asyncio.run(ask_too()), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    model.close()
    assert [found.get(place) for place in range(len(prompts))] == expected
    assert left[0].finish().text == model.generate(PROMPT).text


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    return load(talking_model(tmp_path_factory.mktemp("talking"), 128), device="cpu", dtype="fp32")


def test_what_a_dialogue_says_first(talking, model):
    talk = talking.dialogue(system="Be brief.", max_new_tokens=4)
    stream = talk.ask("start")
    stream.finish()
    with_system = talking.decoder.with_template("chat", "Be brief.")
    assert (
        stream.stats.prompt_tokens
        == len(with_system.encode_prompt("start"))
        != len(talking.decoder.encode_prompt("start"))
    )
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
    with pytest.raises(
        ConfigError,
        match=r"`template` must be raw, chat or a text with {prompt} in it, got Answer: ",
    ):
        load("embedded", device="cpu", template="Answer: ")


def test_numbers_of_numpy_are_numbers_and_none_is_left_out():
    asked = {
        "exit_layer": np.int64(8),
        "skip": np.array([2, 3]),
        "top_p": np.float32(0.5),
        "temperature": None,
        "stop": None,
    }
    plain = {"exit_layer": 8, "skip": [2, 3], "top_p": 0.5}
    assert checked(DecodingOptions, asked) == checked(DecodingOptions, plain) == plain
    assert type(checked(DecodingOptions, asked)["exit_layer"]) is int
