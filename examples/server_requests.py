"""Sends ordinary requests to an OpenAI-compatible server and says of each whether it did what it asks for.

    layerskip serve --model MODEL &
    python examples/server_requests.py http://127.0.0.1:8000/v1 [MODEL [PARTS OF REQUESTS]]

Each answer is checked for its effect: `yes` has it, `no effect` is an answer without it, `refused` an error that names the
parameter, `error` any other. Needs `pip install openai pydantic`; sampling is off where the request does not turn it on.
"""

import json
import re
import sys
from typing import Literal

import httpx
import openai
import pydantic

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=120)
MODEL = sys.argv[2] if len(sys.argv) > 2 else client.models.list().data[0].id
ONLY = sys.argv[3:]  # parts of names
MESSAGES = [{"role": "user", "content": "List three colours."}]
TEXT = "The three primary colours are"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER = {"name": "get_weather", "description": "The weather of a city", "parameters": CITY}
TOOLS = {"tools": [{"type": "function", "function": WEATHER}]}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALLED = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}


class Mood(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    mood: Literal["good", "bad"]
    sure: bool


SCHEMA = {"type": "json_schema", "json_schema": {"name": "mood", "strict": True, "schema": Mood.model_json_schema()}}


OTHERS = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids")  # than OpenAI's
OTHERS += ("guided_regex", "guided_choice", "guided_grammar")


def chat(messages=MESSAGES, max_tokens=24, temperature=0, **asked):
    more = {key: asked.pop(key) for key in OTHERS if key in asked}
    asked |= {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    return client.chat.completions.create(**asked, extra_body=more)


def said(**asked):
    return chat(**asked).choices[0].message.content


def complete(**asked):
    return client.completions.create(**{"model": MODEL, "prompt": TEXT, "max_tokens": 8, "temperature": 0, **asked})


def respond(**asked):
    usual = {"model": MODEL, "input": "List three colours.", "max_output_tokens": 24, "temperature": 0}
    return client.responses.create(**usual | asked)


def post(path, **body):
    answer = httpx.post(f"{URL.removesuffix('/v1')}{path}", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()


def in_chunks():
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text == greedy and chunks[-1].usage.completion_tokens > 0


def calls(**asked):
    return chat(**TOOLS, max_tokens=200, **asked).choices[0].message.tool_calls or []


def is_call(call):
    return call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}


def repeats(**asked):
    return said(temperature=1.5, **asked) == said(temperature=1.5, **asked)


def call_in_stream():
    chunks = list(chat(stream=True, **TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=200))
    parts = [part for chunk in chunks if chunk.choices for part in chunk.choices[0].delta.tool_calls or []]
    return set(json.loads("".join(part.function.arguments or "" for part in parts))) == {"city"}


def after_a_tool():
    call = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "Rome is sunny"}
    return chat([*MESSAGES, call, result], **TOOLS).usage.prompt_tokens > chat(**TOOLS).usage.prompt_tokens + 10


def in_events():
    events = list(respond(stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return events[0].type == "response.created" and text == events[-1].response.output_text


def own_call():
    asked = {"tools": [{"type": "function", **WEATHER}], "parallel_tool_calls": False}
    response = respond(**asked, tool_choice="required", max_output_tokens=200)
    [call] = [item for item in response.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    later = respond(**asked, input=[*MESSAGES, call, result])
    return set(json.loads(call.arguments)) == {"city"} and later.usage.input_tokens > response.usage.input_tokens


def with_echo():
    choice = complete(echo=True, logprobs=1).choices[0]
    return choice.text.startswith(TEXT) and choice.logprobs.token_logprobs[0] is None


def parsed():
    answer = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Mood, max_tokens=200)
    return isinstance(answer.choices[0].message.parsed, Mood)


def parsed_response():
    return isinstance(client.responses.parse(model=MODEL, input="How are you?", text_format=Mood).output_parsed, Mood)


def tops():
    return [one.top_logprobs for one in chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content]


def json_object():
    choice = chat([{"role": "user", "content": "A JSON object."}], response_format={"type": "json_object"}).choices[0]
    text, is_cut = choice.message.content, choice.finish_reason == "length"
    return text.startswith("{") and (is_cut or isinstance(json.loads(text), dict))


def length(**asked):
    """Of an answer that ends by itself."""
    questions = [[{"role": "user", "content": text}] for text in ("What is 2 + 2?", "Say hello.", "Thank you!", "Yes or no?")]
    short = next(question for question in questions if chat(question, 80).choices[0].finish_reason == "stop")
    return chat(short, 100, **asked).usage.completion_tokens


def lists(count, found):
    return all(len(each) == count for each in found)


greedy = said()
STOP = greedy.split()[4]
REQUESTS = {
    "chat": lambda: bool(greedy),
    "chat, `stream` with `include_usage`": in_chunks,
    "`stop`": lambda: said(stop=STOP) == greedy[: greedy.index(STOP)],
    "`max_completion_tokens`": lambda: chat(max_tokens=openai.omit, max_completion_tokens=5).usage.completion_tokens == 5,
    "`seed`": lambda: repeats(seed=7) and not repeats(),
    "`n`": lambda: len(chat(n=2).choices) == 2,
    "`logprobs`, `top_logprobs`": lambda: lists(3, tops()),
    "`frequency_penalty`": lambda: said(max_tokens=60, frequency_penalty=2) != said(max_tokens=60),
    "`presence_penalty`": lambda: said(max_tokens=60, presence_penalty=2) != said(max_tokens=60),
    "`logit_bias`": lambda: len(set(said(logit_bias={"1234": 100}).split())) == 1,
    "`top_k`": lambda: said(temperature=5, top_k=1) == greedy,
    "`min_p`": lambda: said(temperature=5, min_p=1) == greedy,
    "`repetition_penalty`": lambda: said(max_tokens=60, repetition_penalty=1.5) != said(max_tokens=60),
    "`ignore_eos`": lambda: length(ignore_eos=True) == 100,
    "`min_tokens`": lambda: length(min_tokens=90) >= 90,
    "`stop_token_ids`": lambda: chat(stop_token_ids=list(range(49152))).usage.completion_tokens == 1,
    "`response_format` json_object": json_object,
    "`response_format` json_schema": lambda: bool(Mood.model_validate_json(said(response_format=SCHEMA, max_tokens=200))),
    "chat, `parse` with a pydantic model": parsed,
    "`guided_regex`": lambda: bool(re.fullmatch("[a-c]{3}", said(guided_regex="[a-c]{3}"))),
    "`guided_choice`": lambda: said(guided_choice=["yes", "no"]) in ("yes", "no"),
    "`guided_grammar`": lambda: set(said(guided_grammar='start: "x" "y"+')) == {"x", "y"},
    "`tools`, `tool_choice` auto": lambda: chat(**TOOLS).usage.prompt_tokens > chat().usage.prompt_tokens + 20,
    "`tool_choice` required": lambda: all(map(is_call, found := calls(tool_choice="required"))) and bool(found),
    "`tool_choice` by name": lambda: all(map(is_call, found := calls(tool_choice=NAMED))) and bool(found),
    "`tools`, streamed": call_in_stream,
    "messages of the role `tool`": after_a_tool,
    "completions, several prompts": lambda: len(complete(prompt=["a", "b"]).choices) == 2,
    "completions, token ids": lambda: bool(complete(prompt=[100, 200]).choices[0].text),
    "completions, `logprobs`": lambda: lists(2, complete(logprobs=2).choices[0].logprobs.top_logprobs),
    "completions, `echo` with `logprobs`": with_echo,
    "`/v1/embeddings`": lambda: len(client.embeddings.create(model=MODEL, input=["a", "b"]).data[1].embedding) > 10,
    "`/tokenize`": lambda: len(post("/tokenize", prompt=TEXT, content=TEXT)["tokens"]) > 3,
    "`/v1/responses`": lambda: bool(respond(instructions="Be short.").output_text),
    "responses, streamed": in_events,
    "responses, tools": own_call,
    "responses, `parse`": parsed_response,
    "an unknown `best_of`": lambda: len(complete(extra_body={"best_of": 3, "n": 1}).choices) == 3,
    "`temperature` \"hot\"": lambda: bool(said(temperature="hot")) and False,
}  # fmt: skip


def outcome(name, request):
    try:
        return "yes" if request() else "no effect"
    except (openai.APIStatusError, httpx.HTTPStatusError) as error:
        message = " ".join(str(getattr(error, "body", None) or error).split())
        named = any(part in message for part in re.findall(r"`/?(?:v1/)?(\w+)", name))
        status = error.response.status_code
        return f"{'refused' if named and status < 500 else 'error'} ({status}: {message:.200})"
    except Exception as error:
        return f"no effect ({type(error).__name__}: {' '.join(str(error).split()):.100})"


print(f"| request | {MODEL} |\n|---|---|")
for name, request in REQUESTS.items():
    if not ONLY or any(part in name for part in ONLY):
        print(f"| {name} | {outcome(name, request)} |", flush=True)
