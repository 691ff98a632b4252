"""Policies of `layerskip generate`, and rows of JSON lines that say how they are decoded."""

import json
import shutil

import pytest
import torch
from command_line import refused, run, start

from layerskip_core import load
from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import write_info
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.resolution import policy_packing
from layerskip_core.decoding.engine import Engine
from layerskip_core.errors import ConfigError

PROMPT = "wake me up"
POLICIES = {
    "exact": {"strategy": "self-speculative", "exit_layer": 5, "num_draft_tokens": 2},
    "fast": {"strategy": "early-exit", "exit_layer": 3},
    "copies": {
        "strategy": "self-speculative",
        "exit_layer": 6,
        "num_draft_tokens": 3,
        "draft_weights": "int8",
    },
    "confident": {"strategy": "early-exit", "exits": [2, 3], "exit_confidence": 0.05},
    "too deep": {"strategy": "early-exit", "exit_layer": 40},
}

UNKNOWN = (
    "policy must be one that is saved with the model (exact, fast, copies, confident, too deep; "
)


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    """The tiny checkpoint, which recommends exit 1 with 6 draft tokens, with policies."""
    folder = str(shutil.copytree(checkpoint, tmp_path_factory.mktemp("policies") / "model"))
    return with_policies(folder, POLICIES)


def with_policies(folder, policies):
    info = read_info(folder)
    info.policies.update(policies)
    write_info(folder, info)
    return folder


@pytest.fixture
def generate(model):
    def command(*arguments, **keywords):
        return run("generate", *arguments, f"--model {model} --dtype fp32", **keywords)

    return command


@pytest.fixture
def ask(generate):
    def answers(*rows, flags=(), code=0):
        result = generate(
            "--jsonl --max-new-tokens 20",
            *flags,
            stdin="".join(json.dumps(row) + "\n" for row in rows),
        )
        assert (result.code, result.err) == (code, "")
        return [json.loads(line) for line in result.out.splitlines()]

    return answers


@pytest.mark.parametrize("batch", ["1", "2"])
@pytest.mark.parametrize("strategy", ["lookup", "adaptive"])
def test_a_repeated_task_finds_its_earlier_answers(strategy, batch):
    prompts = ["wake me up at 7", "remind me to call mom tomorrow", "play some jazz"] * 2
    stdin = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    answers = {}
    for remember in ("0", "10000"):
        result = run(
            f"generate --jsonl --strategy {strategy} --batch-size {batch} --remember {remember}",
            stdin=stdin,
        )
        answers[remember] = [json.loads(line) for line in result.out.splitlines()]
        assert (result.code, len(answers[remember])) == (0, 6)
    without = answers["0"]
    found = answers["10000"]
    assert [answer["text"] for answer in found] == [answer["text"] for answer in without]
    if strategy == "lookup" and load("embedded").decoder.backend.batch_invariant:
        assert found[5]["accepted"] > without[5]["accepted"]


@pytest.mark.parametrize("batch", ["1", "2"])
def test_logits_are_changed_and_log_probabilities_told(ask, batch):
    plain, biased, told = ask(
        {"prompt": PROMPT}, {"prompt": PROMPT, "logit_bias": {"50": 100}}, {"prompt": PROMPT, "logprobs": 2},
        flags=(f"--batch-size {batch}",),
    )  # fmt: skip
    (by_flag,) = ask(
        {"prompt": PROMPT}, flags=("--logit-bias", '{"50": 100}', "--prompt-logprobs --logprobs 0")
    )
    assert (
        plain["text"] == told["text"] != biased["text"] == by_flag["text"]
        and "logprobs" not in plain
    )
    assert (
        len(told["logprobs"]) == told["new_tokens"]
        and len(by_flag["prompt_logprobs"]) == by_flag["prompt_tokens"] - 1
    )
    one = told["logprobs"][3]
    assert (
        one["top"][0] == {key: one[key] for key in ("id", "token", "logprob")}
        and len(one["top"]) == 2
    )
    (failed,) = ask({"prompt": PROMPT, "logit_bias": {"x": 1}}, code=1)
    assert "logit_bias must be an object of token ids" in failed["error"]
    assert "--logprobs is for the answers of --jsonl" in run("generate", PROMPT, "--logprobs 1").err


def test_answers_match_a_schema_a_regex_a_grammar_or_a_choice(ask, tmp_path):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    schema = {
        "type": "object",
        "properties": {"hour": {"enum": [7, 8]}},
        "required": ["hour"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "text.lark").write_text('start: "wake " ("me" | "us")\n')
    row = {"prompt": PROMPT}
    for flags, found in (
        ((f"--schema {tmp_path}/schema.json",), {'{"hour": 7}', '{"hour": 8}'}),
        ((f"--grammar {tmp_path}/text.lark",), {"wake me", "wake us"}),
        (("--regex a[bc]",), {"ab", "ac"}),
        (("--choice play --choice stop",), {"play", "stop"}),
    ):
        assert ask(row, flags=flags)[0]["text"] in found
        by_row, other = ask(
            {**row, "schema": schema}, {**row, "choice": ["a"]}, flags=(*flags, "--batch-size 2")
        )
        assert json.loads(by_row["text"])["hour"] in (7, 8) and other["text"] == "a"
    (failed,) = ask({**row, "schema": 5}, code=1)
    assert "schema must be a JSON schema, an object" in failed["error"]
    assert "there is no such file" in run("generate", PROMPT, "--schema nothing.json").err


def test_a_policy_is_its_settings_and_exact_is_the_default(ask, generate):
    row = {"prompt": PROMPT}
    (early,) = ask(row, flags=("--policy fast",))
    assert early == ask(row, flags=("--strategy early-exit --exit 3",))[0] | {"policy": "fast"}
    (exact,) = ask(row, flags=("--policy exact",))
    assert exact == ask(row, flags=("--exit 5 --spec 2",))[0] | {"policy": "exact"}
    (confident,) = ask(row, flags=("--policy confident",))
    assert confident == ask(row, flags=("--exit-confidence 0.05 --exits 2,3",))[0] | {
        "policy": "confident"
    }
    assert len({answer["text"] for answer in (early, exact, confident)}) == 3
    row = {"prompt": PROMPT}
    assert ask(row) == ask(row, flags=("--policy exact",))
    for flags in (
        ("--exit 5",),
        ("--spec 2",),
        ("--strategy autoregressive",),
        ("--draft-vocab 200",),
    ):
        assert ask(row, flags=flags)[0]["policy"] is None
    assert generate(PROMPT, "--stats").err.endswith("; policy: exact\n")
    assert "policy" not in generate(PROMPT, "--stats --exit 5").err


def test_low_bit_copies_of_a_policy_are_loaded_with_the_model(ask, generate):
    plain = ask({"prompt": PROMPT}, flags=("--strategy autoregressive",))[0]["text"]
    for found in (
        ask({"prompt": PROMPT, "policy": "copies"})[0],
        ask({"prompt": PROMPT}, flags=("--policy copies",))[0],
    ):
        assert (found["text"], found["policy"]) == (plain, "copies") and found["drafted"] > 0
    assert "int8 drafts" in generate(PROMPT, "--policy copies --stats").err
    assert "int8 drafts" not in generate(PROMPT, "--stats").err


def test_drafts_are_stored_as_the_policy_says(model):
    policies = {
        "exact": {
            "strategy": "adaptive",
            "draft_copies": ["int8"],
            "draft_head": "int4",
            "draft_vocab": 200,
        }
    }
    info = read_info(with_policies(shutil.copytree(model, f"{model} trimmed"), policies))

    def stored(packing=None, policies=("exact",)):
        backend = for_decoding(f"{model} trimmed", "cpu", "fp32", packing, policies).backend
        state = torch.zeros(1, 1, backend.spec.hidden)
        return {
            name: side.whole.unembed(state).shape[-1] for name, side in backend.draft_sides.items()
        }

    assert stored() == stored(policies=None) == {None: 200, "int8": 200}
    assert stored(policies=()) == {None: 300}
    # What was asked for about drafts comes first.
    assert stored(PackingConfig(draft_vocab=100)) == {None: 100, "int8": 100}
    decoder = for_decoding(f"{model} trimmed", "cpu", "fp32", None, ("exact",))
    config = decoder.resolve({}, PackingConfig())
    assert (config.policy, config.strategy) == ("exact", "adaptive")
    other = for_decoding(f"{model} trimmed", "cpu", "fp32", None, ())  # without the copy
    assert other.resolve({}, PackingConfig()).policy is None
    assert policy_packing(info.policies["exact"]) == PackingConfig(
        draft_weights=("int8",), draft_head="int4", draft_vocab=200
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--policy magic",), "--" + UNKNOWN),
        (
            ("--policy fast --strategy lookup",),
            "--policy must be given without --strategy, got --strategy lookup",
        ),
        (
            ("--policy fast --skip 3,5,6,7",),
            "--policy must be given without --skip, got --skip 3,5:7",
        ),
        (
            ("--policy", "too deep"),
            "--policy too deep does not suit the model: --exit must be in 1..6, got 40",
        ),
    ],
)
def test_policies_that_cannot_be(model, flags, message):
    refused(f"error: {message}", "generate", PROMPT, *flags, f"--model {model}")


# A row's own settings, and the flags that mean the same.
OWN = [
    ({}, ()),
    ({"policy": "fast"}, ("--policy fast",)),
    ({"policy": None, "stop": None, "id": 3}, ()),
    ({"max_new_tokens": 3}, ("--max-new-tokens 3",)),
    ({"stop": "e"}, ("--stop e",)),
    ({"stop": ["never there", "e"]}, ("--stop", "never there", "--stop e")),
    ({"temperature": 0.9, "seed": 5}, ("--temperature 0.9 --seed 5",)),
    ({"policy": "confident"}, ("--policy confident",)),
    (
        {"temperature": 2, "top_k": 5, "top_p": 0.9, "policy": "fast", "max_new_tokens": 7},
        ("--temperature 2 --top-k 5 --top-p 0.9 --policy fast --max-new-tokens 7",),
    ),
]


def test_rows_are_answered_as_their_settings_say(ask, generate):
    found = ask(*({"prompt": PROMPT, **row} for row, _ in OWN))
    for answer, (row, flags) in zip(found, OWN, strict=True):
        limit = () if "max_new_tokens" in row else ("--max-new-tokens 20",)
        alone = generate("--jsonl", *limit, *flags, stdin=json.dumps({"prompt": PROMPT}))
        answer.pop("id", None)
        assert answer | {"line": 1} == json.loads(alone.out), row
        assert answer["policy"] == (row.get("policy") or "exact")
    assert len({answer["text"] for answer in found}) > 4


def test_rows_override_flags(ask):
    flags = ("--exit 4 --lookup 3 --temperature 0.9 --stop e",)
    own, flagged = ask(
        {"prompt": PROMPT, "policy": "fast", "temperature": 0, "stop": []},
        {"prompt": PROMPT},
        flags=flags,
    )
    assert own == ask({"prompt": PROMPT, "policy": "fast"})[0]
    assert (
        flagged | {"line": 1} == ask({"prompt": PROMPT}, flags=flags)[0]
        and flagged["policy"] is None
    )
    (answer,) = ask(
        {"prompt": PROMPT, "policy": "copies"}, flags=("--draft-weights int8 --exit 2",)
    )
    assert answer == ask({"prompt": PROMPT, "policy": "copies"})[0]


BAD = [
    ({"temperature": "hot"}, "temperature must be a number in [0, 1000], got 'hot'"),
    ({"temperature": True}, "temperature must be a number in [0, 1000], got True"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number in 1..10000000, got 2.5"),
    ({"max_new_tokens": 2**70}, "max_new_tokens must be a whole number in 1..10000000, got "),
    (
        {"stop": ["a", 3]},
        "stop must be a text of valid Unicode that is not empty, or several, got ['a', 3]",
    ),
    (
        {"policy": ["fast"]},
        "policy must be a text of valid Unicode that is not empty, got ['fast']",
    ),
    ({"policy": "magic"}, UNKNOWN),
    ({"exit_layer": 9}, "exit_layer must be in 1..5, got 9 (model has 6 layers)"),
    (
        {"policy": "too deep"},
        "policy too deep does not suit the model: exit_layer must be in 1..6, got 40",
    ),
]


@pytest.mark.parametrize("batch", [(), ("--batch-size 4",)], ids=["singly", "together"])
def test_bad_settings_are_errors_of_their_rows(ask, batch):
    rows = [{"prompt": PROMPT}, *({"prompt": PROMPT, **row} for row, _ in BAD), {"prompt": PROMPT}]
    first, *errors, last = ask(*rows, flags=batch, code=1)
    assert first | {"line": len(rows)} == last and first["new_tokens"] == 20
    for number, (error, (_, message)) in enumerate(zip(errors, BAD, strict=True), start=2):
        assert error["line"] == number and error["error"].startswith(f"line {number}: {message}")


def test_answers_and_errors_say_whose_they_are(ask):
    rows = ({"id": "a7", "prompt": PROMPT}, {"id": [1], "prompt": 3}, {"prompt": PROMPT, "id": 0})
    found = [(answer["line"], answer.get("id"), "error" in answer) for answer in ask(*rows, code=1)]
    assert found == [(1, "a7", False), (2, [1], True), (3, 0, False)]


def test_rows_with_equal_settings_are_decoded_together_and_answered_in_order(ask, monkeypatch):
    """A row that waits joins where another is finished, and the longest answer comes first."""
    prompts = [
        PROMPT,
        "play jazz",
        "set an alarm",
        "call mom",
        "what is the weather like",
        PROMPT,
        *["now"] * 4,
    ]
    changes = [
        {},
        {"policy": "fast"},
        {"policy": "exact"},
        {"policy": "fast", "seed": 0},
        {"max_new_tokens": 5},
    ]
    changes = [
        *changes,
        {"policy": "confident"},
        *[{"max_new_tokens": 1 + count} for count in range(4)],
    ]  # confident: alone
    rows = [{"prompt": prompt, **change} for prompt, change in zip(prompts, changes, strict=True)]
    singly = ask(*rows)
    sizes = []
    honest = Engine._run

    def recorded(engine, plan):
        steps = honest(engine, plan)
        sizes.append(len(steps))
        return steps

    monkeypatch.setattr(Engine, "_run", recorded)
    together = ask(*rows, flags=("--batch-size 6",))
    assert max(sizes) == 3  # rows of one policy: exact is the default too
    assert len(sizes) < sum(answer["rounds"] + answer["new_tokens"] for answer in singly)
    for one, other in zip(singly, together, strict=True):
        assert [one[name] for name in ("text", "policy", "new_tokens")] == [
            other[name] for name in ("text", "policy", "new_tokens")
        ]


def test_whoever_waits_for_answers_gets_them(model):
    """As a process that asks the next question when it has read the answers to the last ones; also
    to one that is wrong.
    """
    with start(
        f"generate --model {model} --dtype fp32 --jsonl --batch-size 3", stderr=None
    ) as process:
        for count in (1, 2, 5):
            rows = [{"prompt": PROMPT, "max_new_tokens": 3}] * (count - 1) + [{"prompt": 3}]
            process.stdin.write("".join(json.dumps(row) + "\n" for row in rows))
            process.stdin.flush()
            answers = [json.loads(process.stdout.readline()) for _ in rows]
            assert ["error" in answer for answer in answers] == [False] * (count - 1) + [True]
        process.stdin.close()
        assert process.wait(60) == 1


def test_exact_with_copies_needs_them(checkpoint, tmp_path):
    folder = with_policies(
        str(shutil.copytree(checkpoint, tmp_path / "model")), {"exact": POLICIES["copies"]}
    )
    loaded = for_decoding(folder, "cpu", "fp32")
    # As the checkpoint recommends without policies
    assert loaded.resolve({}, PackingConfig()).exit_layer == 1
    with pytest.raises(
        ConfigError,
        match="`policy` must be given with `draft_weights` int8, which it drafts with, got exact",
    ):
        loaded.resolve({"policy": "exact"}, PackingConfig())
