"""`/v1/responses` by the `openai` client: what a conversation answers, in other documents."""

import json

import pytest

NEEDED = "needs the extras dev and serve"
openai = pytest.importorskip("openai", reason=NEEDED)
server = pytest.importorskip("test_server", reason=NEEDED)
bodies = pytest.importorskip("cli.server.bodies", reason=NEEDED)
tools = pytest.importorskip("test_tools", reason=NEEDED)

ASKED = {"model": "tiny", "input": "wake me", "max_output_tokens": 12}
CONVERSATION = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "wake me"}]
WEATHER, TIME = ({"type": "function", **tool["function"]} for tool in (tools.WEATHER, tools.TIME))
NAMED = {
    "tools": [WEATHER, TIME],
    "tool_choice": {"type": "function", "name": "weather"},
    "max_output_tokens": 100,
}


@pytest.fixture(scope="module")
def client(folders):
    with server.serving(tools.conversing(folders("chatml") / "chatml", tools.HERMES)) as api:
        yield api.client()


def without_names(response):
    items = [{**item.to_dict(), "id": "", "call_id": ""} for item in response.output]
    return response.to_dict() | {
        "id": "",
        "created_at": 0,
        "usage": response.usage.output_tokens,
        "output": items,
    }


def streamed(client, **asked):
    """The response of a stream, whose events are in order and tell each part once."""
    events = list(client.responses.create(**asked, stream=True))
    parts = {}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    first, second, *others, last = events
    assert (first.type, second.type, first.response.status) == (
        "response.created",
        "response.in_progress",
        "in_progress",
    )
    assert last.type == f"response.{last.response.status}"
    for event in others:
        kind = event.type.removeprefix("response.")
        if kind in ("output_text.delta", "function_call_arguments.delta"):
            parts[event.output_index] = parts.get(event.output_index, "") + event.delta
        elif kind in ("output_text.done", "function_call_arguments.done"):
            assert parts[event.output_index] == (event.text if "text" in kind else event.arguments)
        elif kind == "output_item.done":
            assert event.item == last.response.output[event.output_index]
    kinds = [event.type.removeprefix("response.") for event in others]
    for kind in ("output_item", "content_part"):
        assert kinds.count(f"{kind}.added") == kinds.count(f"{kind}.done")
    assert kinds.count("output_item.added") == len(parts) == len(last.response.output)
    return last.response


def test_a_response_is_a_conversation_s_answer_whole_and_streamed(client):
    chat = client.chat.completions.create(
        model="tiny", messages=CONVERSATION, max_tokens=12, logprobs=True, top_logprobs=2
    )
    parts = [{"type": "input_text", "text": "wake "}, {"type": "input_text", "text": "me"}]
    for given in (
        "wake me",
        [{"role": "user", "content": "wake me"}],
        [{"type": "message", "role": "user", "content": parts}],
    ):
        response = client.responses.create(
            **ASKED | {"input": given}, instructions="Be short.", store=False
        )
        assert (
            response.output_text == chat.choices[0].message.content
            and response.instructions == "Be short."
        )
        assert (response.usage.input_tokens, response.usage.output_tokens) == (
            chat.usage.prompt_tokens,
            12,
        )
        assert (response.status, response.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
    more = {
        **ASKED,
        "input": CONVERSATION,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    whole = client.responses.create(**more)
    told = [
        (one.token, one.logprob, len(one.top_logprobs))
        for one in whole.output[0].content[0].logprobs
    ]
    assert told == [
        (one.token, pytest.approx(one.logprob), 2) for one in chat.choices[0].logprobs.content
    ]
    assert without_names(streamed(client, **more)) == without_names(whole)


def test_a_response_is_parsed(client):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    asked = ASKED | {"max_output_tokens": 90}
    parsed = client.responses.parse(**asked, text_format=server.Alarm)
    assert isinstance(parsed.output_parsed, server.Alarm) and parsed.status == "completed"
    with client.responses.stream(**asked, text_format=server.Alarm) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    free = client.responses.create(
        **asked, text={"format": {"type": "json_object"}}, temperature=1, extra_body={"seed": 1}
    )
    assert free.status == "incomplete" or isinstance(json.loads(free.output_text), dict)


def test_a_tool_is_called_and_its_result_read(client):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    response = client.responses.create(**ASKED | NAMED)
    (call,) = response.output
    assert (call.type, call.name, set(json.loads(call.arguments))) == (
        "function_call",
        "weather",
        {"city", "day"},
    )
    assert response.status == "completed" and [tool.name for tool in response.tools] == [
        "weather",
        "time",
    ]
    assert without_names(streamed(client, **ASKED | NAMED)) == without_names(response)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    later = client.responses.create(
        **ASKED | {"input": [*CONVERSATION, *response.output, result], "tools": [WEATHER, TIME]}
    )
    function = {"name": call.name, "arguments": call.arguments}
    messages = [
        *CONVERSATION,
        {
            "role": "assistant",
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "sunny"},
    ]
    known = {"tools": [tools.WEATHER, tools.TIME], "max_tokens": 12}
    chat = client.chat.completions.create(model="tiny", messages=messages, **known)
    assert later.output_text == chat.choices[0].message.content
    assert later.usage.input_tokens == chat.usage.prompt_tokens > response.usage.input_tokens


WRONG = {
    "store": (True,), "previous_response_id": ("resp_1",), "background": (True,), "truncation": ("auto",), "n": (2,),
    "model": ("gpt",), "instructions": (5,), "max_output_tokens": (0,),
    "text": ("json", {"verbosity": "low"}, {"format": {"type": "yaml"}}),
    "top_logprobs": (21,),
    "temperature": (-1,), "tools": ([{"type": "web_search"}], "all"),
    "input": (
        None, [], [{"type": "item_reference", "id": "msg_1"}],
        [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
        [{"type": "function_call", "call_id": "a", "name": "time", "arguments": "{"}],
    ),
}  # fmt: skip
STRANGE = {"type": "json_schema", "name": "a", "schema": {"type": "strange"}}


@pytest.mark.parametrize(
    "changes, param",
    [
        *(({param: value}, param) for param, values in WRONG.items() for value in values),
        ({"text": {"format": STRANGE}}, "text.format"),
        ({"tool_choice": {"type": "function", "name": "nothing"}, "tools": [TIME]}, "tool_choice"),
    ],
)
def test_a_wrong_request_is_told_its_parameter(client, changes, param):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    with pytest.raises(openai.APIStatusError, match=param) as failed:
        client.post("/responses", cast_to=object, body=ASKED | changes)
    assert failed.value.param == param


def test_a_stream_that_fails_ends_with_its_error(client, monkeypatch):
    def broken(*_):
        raise bodies.ApiError(500, "broken", "server_error")

    monkeypatch.setattr("cli.server.app.usage_of", broken)
    *_, last = client.responses.create(**ASKED, stream=True)
    assert (last.type, last.response.error.message) == ("response.failed", "broken")
