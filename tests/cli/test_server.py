"""OpenAI's API with the real `openai` client over a real socket."""

import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pytest
import torch
from chatml import chatml_folder
from conftest import run_texts, tiny_model
from evaluating import tiny_loaded
from transformers import AutoTokenizer

from layerskip_core.config.decoding import DecodingConfig, ServeConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import Prefixes
from layerskip_core.decoding.dialogue import TextStream
from layerskip_core.model import TransformersBackend
from layerskip_core.prompting import CHAT, PromptTemplate
from layerskip_core.serving.thread import DecodingThread

NEEDED = "needs the extras dev and serve"
httpx, openai, uvicorn, pydantic = (
    pytest.importorskip(name, reason=NEEDED) for name in ("httpx", "openai", "uvicorn", "pydantic")
)
Service = pytest.importorskip("cli.server.app", reason=NEEDED).Service
PROMPT = "wake me at 7"
TALK = [{"role": "user", "content": PROMPT}]
EXIT = 5  # whose drafts are sometimes right
FLAGS = {
    "strategy": "self-speculative",
    "exit_layer": EXIT,
    "num_draft_tokens": 4,
    "max_new_tokens": 12,
}


@dataclass
class Api:
    url: str
    engine: DecodingThread
    server: uvicorn.Server

    def client(self, **keywords):
        return openai.OpenAI(
            base_url=f"{self.url}/v1", max_retries=0, **{"api_key": "none", **keywords}
        )

    def metrics(self):
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        }


@contextmanager
def serving(decoder, key=None, **limits):
    config = ServeConfig(
        **{"batch_size": 8, "queue_size": 256, "token_limit": 100, "decoding": FLAGS, **limits}
    )
    engine = DecodingThread(
        decoder,
        config.batch_size,
        config.queue_size,
        prefixes=Prefixes(config.prefix_cache * 2**20),
    )
    app = Service(decoder, PackingConfig(), config, engine, "tiny", key).app()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield Api(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, server)
    finally:
        server.should_exit = True
        thread.join()
        engine.stop()


@pytest.fixture(scope="module")
def api():
    with serving(tiny_loaded()) as api:
        yield api


@pytest.fixture(scope="module")
def client(api):
    return api.client()


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(model="tiny", prompt=prompt, **options)


def converse(client, messages=TALK, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def expected(prompt, limit=12, decoder=None, **changes):
    stream = TextStream(
        decoder or tiny_loaded(),
        prompt,
        DecodingConfig("self-speculative", EXIT, 4, limit, **changes),
    )
    return "".join(stream), stream.stats


def expected_of_ids(ids, limit=4):
    stream = TextStream(tiny_loaded(), ids, DecodingConfig("self-speculative", EXIT, 4, limit))
    return "".join(stream)


def test_a_completion_is_the_model_s_answer_with_its_counts(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "layerskip"
    text, stats = expected(PROMPT, 60)
    answer = complete(client, max_tokens=60)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")
    usage = answer.usage
    details = answer.usage.completion_tokens_details
    assert (usage.prompt_tokens, usage.completion_tokens) == (stats.prompt_tokens, 60)
    assert 0 < details.accepted_prediction_tokens == stats.accepted
    assert details.rejected_prediction_tokens == stats.drafted - stats.accepted


def test_a_common_beginning_is_computed_once(client):
    start = [7, 9, 11, 8] * 20
    for last, cached in ((5, 0), (6, 80)):
        answer = complete(client, [*start, last], max_tokens=4)
        assert answer.choices[0].text == expected_of_ids([*start, last])
        assert answer.usage.prompt_tokens_details.cached_tokens == cached


def test_a_stream_is_the_same_answer_in_pieces(client):
    text, stats = expected(PROMPT, 30)
    keywords = {
        "model": "tiny",
        "max_tokens": 30,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *pieces, last, usage = client.completions.create(prompt=PROMPT, **keywords)
    assert len(pieces) > 2
    assert "".join(chunk.choices[0].text for chunk in [*pieces, last]) == text
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * len(pieces)
    assert last.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.completion_tokens_details.accepted_prediction_tokens) == (
        [],
        stats.accepted,
    )
    messages = TALK
    first, *rest, _ = client.chat.completions.create(messages=messages, **keywords)
    assert (first.choices[0].delta.role, {chunk.choices[0].delta.role for chunk in rest}) == (
        "assistant",
        {None},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in [first, *rest]) == text


def test_stop_and_limits_end_an_answer(client):
    text = expected(PROMPT, 30)[0]
    stop = text[10:13]
    for stops in (stop, [stop, "never there"]):
        choice = complete(client, max_tokens=30, stop=stops).choices[0]
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    answer = converse(client, messages, max_completion_tokens=3)
    assert (answer.choices[0].message.content, answer.usage.completion_tokens) == (
        expected(PROMPT, 3)[0],
        3,
    )
    limited = complete(client, max_tokens=9_999)
    assert (limited.choices[0].text, limited.usage.completion_tokens) == (
        expected(PROMPT, 100)[0],
        100,
    )  # the server's limit


def test_a_request_s_sampling_wins_and_without_limits_answers_go_on_to_the_end_of_the_context():
    with serving(tiny_loaded(), decoding={**FLAGS, "temperature": 2.0, "top_k": 9}) as api:
        greedy = complete(api.client(), temperature=0)
        cold = complete(api.client(), temperature=1, seed=3)
    assert greedy.choices[0].text == expected(PROMPT)[0]
    assert cold.choices[0].text == expected(PROMPT, temperature=1, top_k=9, seed=3)[0]
    with serving(tiny_loaded(), token_limit=None, decoding={"strategy": "autoregressive"}) as api:
        by_chat = converse(api.client())
        for answer in (complete(api.client()), by_chat):
            assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (128, "length")


def test_sampling_follows_its_seed(client):
    def sampled(**keywords):
        answer = complete(client, temperature=2, max_tokens=12, **keywords)
        return [choice.text for choice in answer.choices]

    once = sampled(seed=7, n=2)
    assert (
        once
        == sampled(seed=7, n=2)
        == [expected(PROMPT, temperature=2.0, seed=seed)[0] for seed in (7, 8)]
    )
    # Without a seed each has one of its own
    assert len({text for _ in range(4) for text in sampled()}) > 1
    greedy = expected(PROMPT)[0]
    assert sampled(seed=7, top_p=1e-9) == sampled(seed=8, extra_body={"top_k": 1}) == [greedy]


def test_several_prompts_as_texts_or_ids_have_numbered_answers(client):
    prompts = [PROMPT, "play jazz", "set an alarm"]
    ids = [tiny_loaded().encode_prompt(prompt) for prompt in prompts]
    for asked in (prompts, ids):
        choices = complete(client, asked).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        assert [choice.text for choice in choices] == [expected(prompt)[0] for prompt in prompts]
    assert complete(client, ids[1]).choices[0].text == expected(prompts[1])[0]


def test_options_that_change_logits_are_those_of_decoding(client):
    options = {
        "frequency_penalty": 1.2,
        "presence_penalty": 0.5,
        "logit_bias": {"30": 5, "31": -100},
    }
    more = {"repetition_penalty": 1.3, "min_tokens": 5, "stop_token_ids": [44], "ignore_eos": True}
    own = {**options, **more, "logit_bias": ((30, 5.0), (31, -100.0)), "stop_token_ids": (44,)}
    text = expected(PROMPT, 30, **own)[0]
    assert text != expected(PROMPT, 30)[0]
    asked = {"model": "tiny", "max_tokens": 30, "extra_body": more, **options}
    assert client.completions.create(prompt=PROMPT, **asked).choices[0].text == text
    answer = client.chat.completions.create(messages=TALK, **asked)
    assert answer.choices[0].message.content == text


def test_log_probabilities_of_a_conversation_whole_and_streamed(client):
    config = DecodingConfig("self-speculative", EXIT, 4, 12, logprobs=3)
    answer = TextStream(tiny_loaded(), PROMPT, config).finish()
    decoder = tiny_loaded()
    asked = {"model": "tiny", "messages": TALK, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [one for chunk in chunks for one in chunk.choices[0].logprobs.content]
    for told in (whole, streamed):
        assert [one.logprob for one in told] == pytest.approx(
            [one.logprob for one in answer.logprobs]
        )
        assert [one.token for one in told] == [decoder.token_text(token) for token in answer.ids]
        tops = [[(top.token, top.logprob) for top in one.top_logprobs] for one in told]
        assert tops[4][0] == (
            decoder.token_text(answer.ids[4]),
            pytest.approx(answer.logprobs[4].logprob),
        )
        assert all(len(top) == 3 for top in tops)
    assert [bytes(one.bytes).decode() for one in whole if one.bytes] == [
        one.token for one in whole if one.bytes
    ]
    with pytest.raises(openai.BadRequestError, match="top_logprobs must be used with logprobs"):
        client.chat.completions.create(**{**asked, "logprobs": False})


class Alarm(pydantic.BaseModel):
    """An object whose fields are short, so that a random model ends it."""

    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal["alarm", "reminder"]
    hour: Annotated[int, pydantic.Field(ge=0, le=24)]
    at: Literal["am", "pm"]


def test_structured_outputs_validate_whole_and_streamed(client):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    asked = {"model": "tiny", "messages": TALK, "max_tokens": 90}
    for temperature in (0, 1):
        choice = client.chat.completions.parse(
            **asked, response_format=Alarm, temperature=temperature
        ).choices[0]
        assert isinstance(choice.message.parsed, Alarm) and choice.finish_reason == "stop"
    form = {
        "type": "json_schema",
        "json_schema": {"name": "alarm", "schema": Alarm.model_json_schema()},
    }
    chunks = list(client.chat.completions.create(**asked, response_format=form, stream=True))
    by_text = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 90,
        "extra_body": {"response_format": form},
    }
    whole = client.completions.create(**by_text).choices[0]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.text
    assert Alarm.model_validate_json(whole.text)
    cut = client.chat.completions.create(
        **{**asked, "max_tokens": 4}, response_format=form
    ).choices[0]
    assert cut.finish_reason == "length" and cut.message.content.startswith("{")
    free = client.chat.completions.create(
        **asked, response_format={"type": "json_object"}, seed=1, temperature=1
    ).choices[0]
    assert free.finish_reason == "length" or isinstance(json.loads(free.message.content), dict)
    for guided, pattern in (
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[a-c]{3}"}, "[a-c]{3}"),
        ({"guided_grammar": 'start: "x" "y"+'}, "xy.*"),
        ({"guided_json": '{"enum": [1, 2]}'}, "[12]"),
    ):
        answer = client.chat.completions.create(
            **{**asked, "max_tokens": 8}, extra_body=guided
        ).choices[0]
        assert re.fullmatch(pattern, answer.message.content)


def test_echo_gives_the_prompt_s_log_probabilities(client):
    """As lm-eval's local-completions asks for them: prompts as token ids, and one token more."""
    decoder = tiny_loaded()
    prompts = [PROMPT, "play"]
    ids = [decoder.encode_prompt(prompt) for prompt in prompts]
    choices = complete(client, ids, echo=True, logprobs=1, max_tokens=1).choices
    for prompt, choice in zip(ids, choices, strict=True):
        config = DecodingConfig(
            "autoregressive", max_new_tokens=1, logprobs=1, prompt_logprobs=True
        )
        answer = TextStream(decoder, prompt, config).finish()
        told = choice.logprobs
        expected_of = [one.logprob for one in answer.prompt_logprobs + answer.logprobs]
        assert told.token_logprobs[0] is None and told.token_logprobs[1:] == pytest.approx(
            expected_of
        )
        assert choice.text == decoder.tokenizer.decode(prompt) + answer.text
        assert told.tokens == [decoder.token_text(token) for token in [*prompt, *answer.ids]]
        assert told.text_offset[:2] == [0, len(told.tokens[0])]
        assert max(told.top_logprobs[-1].values()) == told.token_logprobs[-1]  # greedy
    first, *rest = complete(client, echo=True, logprobs=0, stream=True)
    assert first.choices[0].text.startswith(PROMPT) and len(first.choices[0].logprobs.tokens) > len(
        ids[0]
    )
    assert (
        first.choices[0].text + "".join(chunk.choices[0].text for chunk in rest)
        == PROMPT + expected(PROMPT)[0]
    )


WRONG = {
    "model": ("gpt",), "prompt": (None, [[]], ["a", 5]), "temperature": (-1, "hot"), "max_tokens": (0,),
    "stop": (["x"] * 17, "x" * 257, [""]), "n": (1000,), "best_of": (3,), "typical_p": (0.3,), "guided_regex": ("(a",),
    "guided_choice": ([],), "response_format": ({"type": "json_schema"}, "json"), "echo": ("yes",), "logprobs": (True, 21),
    "top_logprobs": (2,), "frequency_penalty": (2.5,), "repetition_penalty": (0,), "min_p": (-0.1,), "min_tokens": (-1,),
    # What is read at every token is bounded, far above the 300 tokens that OpenAI takes.
    "logit_bias": ({"300": 1}, {"x": 1}, {"7": 101}, {str(token): 1 for token in range(1_025)}),
    "stop_token_ids": ([-1], [5] * 1_025),
}  # fmt: skip


@pytest.mark.parametrize(
    "body, param",
    [
        *(({key: value}, key) for key, values in WRONG.items() for value in values),
        ({"prompt": [10**6]}, None),  # no token of the model
        ({"prompt": "wake " * 200}, None),  # longer than the context
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_json": []}, "guided_json"),
        ({"guided_json": {"type": "strange"}}, "response_format"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_wrong_request_is_told_why_in_openai_s_form(client, body, param):
    with pytest.raises(openai.APIStatusError, match=param or "the prompt must") as failed:
        client.post(
            "/completions", cast_to=object, body={"model": "tiny", "prompt": PROMPT, **body}
        )
    error = failed.value
    status = 404 if body == {"model": "gpt"} else 400
    assert (error.status_code, error.param, error.type) == (status, param, "invalid_request_error")


def test_texts_are_tokenized_and_embedded(api, client):
    decoder = tiny_loaded()
    inputs = [PROMPT, "play some jazz"]
    ids = [decoder.encode_prompt(text) for text in inputs]
    counted = httpx.post(f"{api.url}/tokenize", json={"model": "tiny", "prompt": PROMPT}).json()
    assert counted == {"tokens": ids[0], "count": len(ids[0]), "max_model_len": 128}
    talk = {"messages": TALK}
    assert httpx.post(f"{api.url}/tokenize", json=talk).json()["tokens"] == ids[0]
    plain = [decoder.tokenizer(text)["input_ids"] for text in inputs]
    answer = client.embeddings.create(model="tiny", input=inputs)
    for one, text in zip(answer.data, plain, strict=True):
        states = run_texts(decoder.backend, decoder.backend.embed(torch.tensor([text])), 0, 6)
        mean = decoder.backend.normed(states)[0].mean(0)
        assert one.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    assert answer.usage.prompt_tokens == sum(map(len, plain))
    exact = (
        client.embeddings.create(model="tiny", input=plain[0], encoding_format="float")
        .data[0]
        .embedding
    )
    assert exact == pytest.approx(
        client.embeddings.create(model="tiny", input=PROMPT).data[0].embedding
    )
    for wrong, param in (
        ({"input": []}, "input"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"model": "gpt", "input": "x"}, "model"),
    ):
        with pytest.raises(openai.APIStatusError) as failed:
            client.post("/embeddings", cast_to=object, body={"model": "tiny", **wrong})
        assert failed.value.param == param
    with pytest.raises(openai.BadRequestError, match="the input must be at most 127 tokens"):
        client.embeddings.create(model="tiny", input="wake " * 200)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "length >= 1"),
        ([{"role": "tool", "content": "x"}], "this model has no chat template"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content"),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            "this model has no chat template",
        ),
    ],
)
def test_wrong_messages(client, messages, message):
    with pytest.raises(openai.BadRequestError, match=message) as failed:
        converse(client, messages)
    assert failed.value.param == "messages"


def test_what_is_no_request_at_all(api):
    json_type = {"content-type": "application/json"}
    with serving(tiny_loaded(), body_limit=2048) as small:
        for url, keywords, status in [
            ("completions", {"content": b"{", "headers": json_type}, 400),
            ("completions", {"content": b"[]", "headers": json_type}, 400),
            ("completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
            ("completions", {"content": b" " * 3000, "headers": json_type}, 413),
            ("nothing", {}, 404),
            ("completions/", {}, 404),
            ("models", {}, 405),
        ]:
            answer = httpx.post(f"{small.url}/v1/{url}", **keywords)
            assert (answer.status_code, answer.json()["error"]["type"]) == (
                status,
                "invalid_request_error",
            )
        assert small.engine.num_reserved == 0


def test_a_failure_is_an_error_and_not_the_end(api, client, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        broken.setattr("layerskip_core.decoding.scheduler.Engine", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            complete(client, stream=True)
    assert "division by zero" in capsys.readouterr().err
    assert complete(client).choices[0].text == expected(PROMPT)[0]


def test_a_conversation_is_put_into_the_chat_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chatml_folder(tmp_path / "chatml"))
    model = tiny_model("llama", torch.float64, vocab_size=len(tokenizer))
    decoder = replace(
        tiny_loaded(), tokenizer=tokenizer, backend=TransformersBackend(model), eos_ids=frozenset()
    )
    decoder = replace(decoder, template=PromptTemplate(CHAT, "You are short."))
    turns = [
        {"role": "user", "content": "start"},
        {"role": "assistant", "content": "end"},
        {"role": "user", "content": "im"},
    ]
    system = {"role": "system", "content": "Be long."}
    with serving(decoder) as api:
        client = api.client()
        for messages, whole in (
            (turns, [{**system, "content": "You are short."}, *turns]),
            ([system, *turns], [system, *turns]),
        ):
            ids = tokenizer.apply_chat_template(
                whole, add_generation_prompt=True, return_dict=False
            )
            answer = converse(client, messages)
            assert answer.usage.prompt_tokens == len(ids)
            assert answer.choices[0].message.content == complete(client, ids).choices[0].text
        forged, short = (
            converse(client, [{"role": "user", "content": content}])
            for content in ("<|im_start|>", "a")
        )
        # The text of a completion is raw
        real = complete(client, "<|im_start|>")
        assert (
            forged.usage.prompt_tokens > short.usage.prompt_tokens + 2
            and real.usage.prompt_tokens == 1
        )
