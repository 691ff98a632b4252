"""Tools of the server: formats of calls, and the `openai` client."""

import json
from dataclasses import replace

import msgspec
import pytest
import torch
from added_tokens import few_letters
from chatml import chatml_folder
from conftest import tiny_model
from evaluating import tiny_loaded
from tokenizers import AddedToken
from transformers import AutoTokenizer

from layerskip_core.grammar import guide
from layerskip_core.model import TransformersBackend
from layerskip_core.prompting import CHAT, PromptTemplate, encode_conversation, special_ids

NEEDED = "needs the extras dev and serve"
openai = pytest.importorskip("openai", reason=NEEDED)
tools = pytest.importorskip("cli.server.tools", reason=NEEDED)
serving = pytest.importorskip("test_server", reason=NEEDED).serving

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "day": {"$ref": "#/$defs/day"}},
            "required": ["city", "day"],
            "additionalProperties": False,
            "$defs": {"day": {"enum": ["today", "tomorrow"]}},
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TIME = {"type": "function", "function": {"name": "time", "parameters": NOTHING}}
KNOWN = tools.Tools(
    [msgspec.convert(tool["function"], tools.Function) for tool in (WEATHER, TIME)], [WEATHER, TIME]
)
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<tool_call>' }}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    '{% for call in message.tool_calls %}{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROME = {"city": "Rome"}
BOTH = ["weather", "time"]
LLAMA = '{"name": "weather", "parameters": {"city": "Rome"}}'


@pytest.mark.parametrize(
    "form, text, said, found",
    [
        ("hermes", 'Well. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "Well.", ["weather"]),
        (
            "hermes",
            '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>\n<tool_call>{"name": "weather", "arguments": '
            '{"city": "Rome"}}</tool_call>',
            "",
            ["time", "weather"],
        ),
        ("hermes", "a < b, <tool_ and <tool_call>nothing</tool_call> x", None, []),
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "weather", "argu', None, []),  # cut
        ("llama", LLAMA, "", ["weather"]),
        ("llama", ' {"name": "time", "parameters": {}}; ' + LLAMA, "", ["time", "weather"]),
        ("llama", '{"name": "Anna", "age": 5}', None, []),
        ("llama", "The weather is fine.", None, []),
        ("mistral", '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "time", "arguments": {}}]', "", BOTH),
        ("mistral", 'weather{"city": "Rome"}', "", ["weather"]),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]', "", ["weather"]),
        ("mistral", "[TOOL_CALLS] is a mark", None, []),
        ("mistral", "weather is fine", None, []),
        ("mistral", "[1, 2] is a list", None, []),
    ],
)  # fmt: skip
def test_calls_in_an_answer_whole_and_piece_by_piece(form, text, said, found):
    for size in (1, 3, 7, len(text)):
        calls = tools.Calls(form, KNOWN)
        pieces = []
        made = []
        for start in range(0, len(text), size):
            piece, new = calls.add(text[start : start + size], start + size >= len(text))
            pieces.append(piece)
            made += new
        assert "".join(pieces) == (text if said is None else said)
        assert [call["function"]["name"] for call in made] == found and calls.count == len(found)
        assert all(
            json.loads(call["function"]["arguments"]) in ({}, ROME) and len(call["id"]) == 9
            for call in made
        )


def test_formats_are_known_by_the_template():
    templates = {
        "{{ tools }} [TOOL_CALLS]": "mistral",
        HERMES: "hermes",
        "{{ tools }} parameters": "llama",
        "{{ messages }}": None,
    }
    assert {template: tools.format_of(template) for template in templates} == templates


# Of any format, with what it is known by.
TEMPLATES = {
    "hermes": HERMES,
    "llama": HERMES.replace("tool_call>", "call>"),
    "mistral": HERMES + "{# [TOOL_CALLS] #}",
}


# By style of the tokenizer: the format, and its marks that are added tokens: special ones, or with
# a text in an answer.
STYLES = {
    "hermes": ("hermes", {}),
    "qwen": ("hermes", {"<tool_call>": False, "</tool_call>": False}),
    "special tags": ("hermes", {"<tool_call>": True, "</tool_call>": True}),
    "llama 3": ("llama", {"<|python_tag|>": True}),
    "mistral": ("mistral", {"[TOOL_CALLS]": True}),
    "mistral with a text": ("mistral", {"[TOOL_CALLS]": False}),
    "mistral without": ("mistral", {}),
}


def conversing(folder, template, marks=()):
    tokenizer = AutoTokenizer.from_pretrained(chatml_folder(folder))
    tokenizer.add_tokens(
        [
            AddedToken(text, special=special, normalized=False)
            for text, special in dict(marks).items()
        ]
    )
    tokenizer.chat_template = template
    model = tiny_model(
        "llama", torch.float64, vocab_size=len(tokenizer), max_position_embeddings=1024
    )
    named = {
        "tokenizer": tokenizer,
        "eos_ids": frozenset({tokenizer.eos_token_id}),
        "template": PromptTemplate(CHAT),
    }
    return replace(tiny_loaded(), backend=TransformersBackend(model), **named)


@pytest.fixture(scope="module", params=STYLES)
def decoder(folders, request):
    form, marks = STYLES[request.param]
    return conversing(folders("chatml") / "chatml", TEMPLATES[form], marks)


@pytest.fixture(scope="module")
def client(decoder):
    with serving(decoder) as api:
        yield api.client()


ASKED = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the weather"}],
    "tools": [WEATHER, TIME],
    "max_tokens": 100,
}
NAMED = {"type": "function", "function": {"name": "weather"}}


def test_a_needed_tool_is_called_as_its_schema_says(client):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    for choice, names in ((NAMED, {"weather"}), ("required", {"weather", "time"})):
        for temperature in (0, 1):
            more = {
                "tool_choice": choice,
                "temperature": temperature,
                "seed": 5,
                "parallel_tool_calls": False,
            }
            answer = client.chat.completions.create(**ASKED, **more).choices[0]
            (call,) = answer.message.tool_calls
            assert (
                answer.finish_reason == "tool_calls"
                and answer.message.content is None
                and call.function.name in names
            )
            arguments = json.loads(call.function.arguments)
            assert (
                arguments == {}
                if call.function.name == "time"
                else set(arguments) == {"city", "day"}
            )
            chunks = [
                chunk.choices[0]
                for chunk in client.chat.completions.create(**ASKED, **more, stream=True)
            ]
            parts = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
            assert [part.index for part in parts] == [0, 0] and parts[
                0
            ].function.name == call.function.name
            assert "".join(part.function.arguments for part in parts) == call.function.arguments
            assert chunks[-1].finish_reason == "tool_calls" and not any(
                chunk.delta.content for chunk in chunks
            )


def test_a_call_that_the_model_chooses_is_read_with_auto_and_is_text_with_none(
    client, decoder, request
):
    """A grammar of the request stands for a model that calls: its only answer is a call, as the
    model would write it.
    """
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    form, _ = STYLES[request.node.callspec.params["decoder"]]
    call = {"name": "time", "parameters" if form == "llama" else "arguments": {}}
    before, after = {
        "hermes": ("<tool_call>", "</tool_call>"),
        "mistral": ("[TOOL_CALLS]", ""),
    }.get(form, ("", ""))
    body = {"hermes": f"\n{json.dumps(call)}\n", "mistral": json.dumps([call])}.get(
        form, json.dumps(call)
    )
    special = special_ids(decoder.tokenizer)
    parts = [
        f"<[{special[part]}]>" if part in special else json.dumps(part)
        for part in (before, body, after)
        if part
    ]
    shown = "".join(part for part in (before, body, after) if part not in special)
    asked = {**ASKED, "extra_body": {"guided_grammar": f"start: {' '.join(parts)}"}}
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(**asked, tool_choice=choice)
        [choice_made] = answer.choices
        chunks = list(client.chat.completions.create(**asked, tool_choice=choice, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        streamed = "".join(delta.content or "" for delta in deltas)
        names = [
            part.function.name
            for delta in deltas
            for part in delta.tool_calls or []
            if part.function.name
        ]
        if choice == "auto":
            [made] = choice_made.message.tool_calls
            assert (made.function.name, made.function.arguments) == ("time", "{}")
            assert (choice_made.finish_reason, choice_made.message.content) == ("tool_calls", None)
            assert (names, streamed, chunks[-1].choices[0].finish_reason) == (
                ["time"],
                "",
                "tool_calls",
            )
        else:
            assert choice_made.message.tool_calls is None and names == []
            assert choice_made.message.content == streamed == shown
            assert choice_made.finish_reason == "stop"


def test_an_answer_that_cannot_match_is_an_error_of_its_request():
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    message = "the answer ended after 2 tokens without matching guided_regex: it permits no token of the model there"
    with serving(few_letters()) as api:
        client = api.client()
        asked = {"model": "tiny", "prompt": "abcd", "extra_body": {"guided_regex": "ab(e|f)"}}
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(**asked)
        with pytest.raises(openai.APIError, match=message):
            list(client.completions.create(**asked, stream=True))
        answer = client.completions.create(**{**asked, "extra_body": {"guided_regex": "ab(c|f)"}})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "stop")


def test_a_needed_tool_is_called_where_the_server_s_own_flags_guide_answers(folders):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    with serving(conversing(folders("chatml") / "chatml", HERMES), decoding={"regex": "x+"}) as api:
        answer = api.client().chat.completions.create(**ASKED, tool_choice=NAMED).choices[0]
    assert answer.finish_reason == "tool_calls"


def test_tools_and_their_results_are_put_into_the_template(client, decoder):
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny<|im_end|>"},
    ]
    plain = [dict(message) for message in messages]
    plain[1] |= {
        "content": "",
        "tool_calls": [{**call, "function": {"name": "weather", "arguments": ROME}}],
    }
    answer = client.chat.completions.create(
        **{**ASKED, "messages": messages, "max_tokens": 5}, tool_choice="auto"
    )
    ids = encode_conversation(decoder.tokenizer, plain, [WEATHER, TIME])
    # The tool's own is text
    assert answer.usage.prompt_tokens == len(ids) and ids.count(decoder.tokenizer.eos_token_id) == 4
    plain[2]["content"] = "sunny"
    whole = decoder.tokenizer.apply_chat_template(
        plain, tools=[WEATHER, TIME], add_generation_prompt=True, return_dict=False
    )
    assert encode_conversation(decoder.tokenizer, plain, [WEATHER, TIME]) == whole
    without = client.chat.completions.create(**{**ASKED, "max_tokens": 5}, tool_choice="none")
    assert (
        without.usage.prompt_tokens < len(whole) / 4 and not without.choices[0].message.tool_calls
    )


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{**WEATHER, "function": {"name": "a b"}}]}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"messages": [{"role": "user"}]}, "messages"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "a", "arguments": "{"}}],
                    }
                ]
            },
            "messages",
        ),
    ],
)
def test_wrong_tools(client, changes, param):
    with pytest.raises(openai.BadRequestError) as failed:
        client.post("/chat/completions", cast_to=object, body={**ASKED, **changes})
    assert failed.value.param == param


def test_a_model_without_a_chat_template_refuses_tools():
    with (
        serving(tiny_loaded()) as api,
        pytest.raises(openai.BadRequestError, match="tools need a chat template") as failed,
    ):
        api.client().chat.completions.create(**ASKED)
    assert failed.value.param == "tools"


# Of templates that know no tools: one with a system message, and one that refuses it and wants
# roles in turn, as Gemma's.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IN_TURN = (
    "{% for message in messages %}{% if message.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must be in turn') }}{% endif %}{% endfor %}" + CHATML
)
CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "day": "today"}}\n</tool_call>'
)
CALLED = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": ROME}}
TALK = (
    {"role": "user", "content": "the weather"},
    {"role": "assistant", "content": "", "tool_calls": [CALLED, CALLED]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "rain"},
)


def test_a_conversation_with_tools_as_texts():
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    answers = "<tool_response>\nsunny\n</tool_response>\n\n<tool_response>\nrain\n</tool_response>"
    later = [
        {"role": "assistant", "content": f"{call}\n{call}"},
        {"role": "user", "content": answers},
    ]
    assert tools.as_texts(TALK, None, "system") == [TALK[0], *later]
    brief = {"role": "system", "content": "Be brief."}
    told, asked, *rest = tools.as_texts([brief, *TALK], KNOWN, "system")
    assert (
        told["role"] == "system" and told["content"].startswith("Be brief.\n\n") and rest == later
    )
    assert (
        json.dumps(WEATHER) in told["content"]
        and json.dumps(TIME) in told["content"]
        and asked == TALK[0]
    )
    first, *rest = tools.as_texts(TALK, KNOWN, "user")
    assert (
        first["content"] == told["content"].removeprefix("Be brief.\n\n") + "\n\nthe weather"
        and rest == later
    )


@pytest.mark.parametrize(
    "text, is_permitted",
    [
        ("Well, a < b <tool_", True),
        (CALL, True),
        (f"Well.\n\n{CALL}\n{CALL}", True),
        (f"{CALL}\nWell.", False),
        ("<tool_call>nothing", False),
        (CALL.replace("Rome", "Pisa"), False),
    ],
)
def test_the_grammar_of_an_answer_that_may_call(folders, text, is_permitted):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    tokenizer = AutoTokenizer.from_pretrained(chatml_folder(folders("chatml") / "chatml"))
    ends = frozenset({tokenizer.eos_token_id})
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    alone = replace(KNOWN, parallel=False)
    for known, expected in (
        (KNOWN, is_permitted),
        (alone, is_permitted and text.count(CALL) < 2),
    ):
        lark = ("grammar", tools.grammar("hermes", known, {}))
        matcher = guide(lark, tokenizer, len(tokenizer), ends).matcher()
        assert (matcher.permitted([], ids) == len(ids)) == expected


@pytest.mark.parametrize("template, teller", [(CHATML, "system"), (IN_TURN, "user")])
def test_a_template_that_knows_no_tools_gets_them_as_texts(folders, template, teller):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    decoder = conversing(folders("chatml") / "chatml", template)
    talk = [
        TALK[0],
        {
            **TALK[1],
            "tool_calls": [
                {**CALLED, "function": {"name": "weather", "arguments": json.dumps(ROME)}}
            ],
        },
    ]
    with serving(decoder) as api:
        client = api.client()
        for choice, names in ((NAMED, {"weather"}), ("required", {"weather", "time"})):
            answer = client.chat.completions.create(
                **ASKED, tool_choice=choice, parallel_tool_calls=False
            ).choices[0]
            (call,) = answer.message.tool_calls
            assert (answer.finish_reason, answer.message.content) == (
                "tool_calls",
                None,
            ) and call.function.name in names
            assert set(json.loads(call.function.arguments)) in (set(), {"city", "day"})
        for choice, described in (("auto", KNOWN), ("none", None)):
            asked = {**ASKED, "messages": [*talk, TALK[2]], "max_tokens": 9, "tool_choice": choice}
            answer = client.chat.completions.create(**asked)
            chunks = client.chat.completions.create(**asked, stream=True)
            plain = [TALK[0], {**TALK[1], "tool_calls": [CALLED]}, TALK[2]]
            ids = encode_conversation(decoder.tokenizer, tools.as_texts(plain, described, teller))
            assert answer.usage.prompt_tokens == len(ids)
            assert (
                "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                == answer.choices[0].message.content
            )
