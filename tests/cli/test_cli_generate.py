"""`layerskip generate`: prompts from anywhere in, text out and nothing else, errors in their
place.
"""

import json
import os
import pty
import re
import shutil
import signal
import sys
from dataclasses import replace

import pytest
from command_line import LISTING_MODULES, Result, fails, finish, refused, run, start
from exit_block_models import add_int4

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.loaded import decoder_of
from layerskip_core.checkpoint.open import for_training
from layerskip_core.checkpoint.save import write_info
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding.dialogue import TextStream
from layerskip_core.evaluation.measure import passes
from layerskip_core.model import native

PROMPT = "wake me up"
PLAIN = DecodingConfig("autoregressive", max_new_tokens=20)
TOO_LONG = "word " * 200
LONGER = re.compile(
    r"the prompt must be at most 127 tokens, got \d+ \(the model's context is 128 tokens\)"
)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return decoder_of(for_training(checkpoint, "cpu", "fp32"))


@pytest.fixture(scope="module")
def expected(loaded):
    def answer(prompt=PROMPT, raw=False, **changes):
        model = loaded.with_template("raw", None) if raw else loaded
        return "".join(TextStream(model, prompt, replace(PLAIN, **changes)))

    return answer


@pytest.fixture
def generate(checkpoint):
    def command(*arguments, **keywords):
        return run(
            "generate",
            *arguments,
            f"--model {checkpoint} --max-new-tokens 20 --dtype fp32",
            **keywords,
        )

    return command


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_the_prompt_as_an_argument_or_from_a_pipe(generate, expected):
    text = Result(0, expected() + "\n", "")
    assert generate(PROMPT) == text
    assert generate(stdin=PROMPT) == generate(stdin=PROMPT + "\n") == text
    # All of it is one prompt
    assert generate(stdin="two\nlines\n").out == expected("two\nlines") + "\n"
    assert generate(stdin="\ufeffné".encode()).out == expected("né") + "\n"
    refused = Result(1, "", "error: the prompt must be valid Unicode, got '\\udcff' in it\n")
    assert generate(stdin="né".encode() + b"\xff") == refused


def test_every_strategy_and_the_text_of_plain_decoding(generate, expected):
    plain = expected() + "\n"
    assert generate(PROMPT, "--strategy autoregressive").out == plain
    for exit_layer, spec in ((1, 3), (4, 1), (5, 12)):
        assert generate(PROMPT, "--exit", str(exit_layer), "--spec", str(spec)).out == plain
    assert generate(PROMPT, "--strategy early-exit --exit 6").out == plain
    early = expected(strategy="early-exit", exit_layer=3)
    assert generate(PROMPT, "--strategy early-exit --exit 3").out == early + "\n" != plain


def test_a_depth_for_each_token(generate, expected):
    plain = expected() + "\n"
    flags = "--exits 2,4 --exit-confidence"
    assert generate(PROMPT, flags, "1").out == plain
    early = expected(strategy="early-exit", exits=(2, 4), exit_confidence=0.03)
    result = generate(PROMPT, flags, "0.03", "--stats")
    assert result.out == early + "\n" != plain
    told = re.search(
        r"tokens/s; ([\d.]+) layers per token \(exit 2: (\d+), exit 4: (\d+), exit 6: (\d+)\); ",
        result.err,
    )
    mean, first, second, last = map(float, told.groups())
    assert first + second + last == 20
    answer = json.loads(
        generate("--jsonl", flags, "0.03", stdin=json.dumps({"prompt": PROMPT})).out
    )
    assert answer["text"] == early
    assert answer["mean_layers"] == pytest.approx(
        (2 * first + 4 * second + 6 * last) / 20, abs=0.01
    )
    assert mean == pytest.approx(answer["mean_layers"], abs=0.051)


@pytest.mark.skipif(
    native.kernels() is None or not native.kernels().codes_bf16, reason="no weights in 12 bits here"
)
def test_calibration_is_offered_where_it_would_gain(wide, monkeypatch):
    common = f"--model {wide} --dtype bf16 --max-new-tokens 4 --threads 1 --no-cache"
    bench = (
        "bench",
        common,
        "--strategies autoregressive,adaptive --samples 1 --repeats 1 --task jsonl --data",
    )
    (wide / "rows.jsonl").write_text('{"prompt": "wake me up"}\n')
    offer = f"layerskip calibrate --model {wide}\n"
    told = lambda: offer in run("generate", PROMPT, common, "--stats").err  # noqa: E731
    assert not told()  # a model that may live in the caches
    monkeypatch.setattr(native, "LEAST_CODED", 0)
    assert told()
    assert offer in run(*bench, str(wide / "rows.jsonl")).err
    assert offer not in run("generate", PROMPT, common).err
    add_int4(wide)
    assert not told()


def test_stats_are_on_stderr(generate, expected):
    result = generate(PROMPT, "--exit 4 --spec 5 --stats")
    assert (result.code, result.out) == (0, expected() + "\n")
    counts = re.fullmatch(
        r"plain decoding reads [\d.]+ MB per token at [\d.]+ GB/s(?:, \d+% of what a plain sum of as many bytes reaches)?\n"
        r"20 tokens, [\d.]+ tokens/s; drafted (\d+), accepted (\d+) \(([\d.]+)%\) in (\d+) rounds; "
        r"steps by exit 4: (\d+)(?:, plain: 1)?; "
        r"layers: (?:native \(\w+\)|packed|packed \(oneDNN\)), float32 on cpu; prompt template: '{prompt}\\n'\n"
        r"(?:about 0\.\d\dx of plain decoding: --strategy adaptive chooses the fastest for every round\n)?",
        result.err,
    )
    drafted, accepted, share, rounds, steps = map(float, counts.groups())
    assert steps == rounds
    assert 0 < accepted < drafted <= 5 * rounds and share == pytest.approx(
        100 * accepted / drafted, abs=0.06
    )
    # The prefill's, one a round, the drafts; a last one has no room for drafts
    assert 20 - (1 + rounds + accepted) in (0, 1)


@pytest.mark.parametrize("speed", [0.5, 0.99, 1.0, 3.0])
def test_stats_warn_of_a_setting_that_loses_against_plain_decoding(generate, monkeypatch, speed):
    monkeypatch.setattr(passes, "speed_of", lambda *_: speed)
    warning = f"about {speed:.2f}x of plain decoding: --strategy adaptive chooses the fastest for every round"
    assert (warning in generate(PROMPT, "--exit 2 --spec 3 --stats").err.splitlines()) == (
        speed < 1
    )
    if speed == 0.5:
        for strategy in (("adaptive",), ("autoregressive",), ("early-exit", "--exit 2")):
            assert "of plain decoding" not in generate(PROMPT, "--stats --strategy", *strategy).err


def test_lines_are_prompts(generate, expected):
    """An answer's line has its prompt's number, so an empty one stands for a line without a
    prompt.
    """
    result = generate("--lines", stdin=f"{PROMPT}\r\nplay jazz\n \nset an alarm")
    answers = (expected(PROMPT), expected("play jazz"), "", expected("set an alarm"))
    assert result == Result(1, "\n".join(answers) + "\n", "error: line 3: the prompt is empty\n")


def test_jsonl_answers_have_their_counts(generate, loaded, expected):
    rows = [json.dumps({"prompt": PROMPT, "id": 7}), "", '{"prompt": "play jazz"}']
    result = generate("--jsonl --exit 4 --spec 5", stdin="\n".join(rows))
    assert (result.code, result.err) == (0, "")
    first, last = map(json.loads, result.out.splitlines())
    assert (first["text"], last["text"], last["line"]) == (expected(), expected("play jazz"), 3)
    assert (first["finish_reason"], first["new_tokens"]) == ("length", 20)
    assert first["prompt_tokens"] == len(loaded.encode_prompt(PROMPT))
    assert 0 < first["accepted"] < first["drafted"] <= 5 * first["rounds"]
    assert first["acceptance_rate"] == round(first["accepted"] / first["drafted"], 4)
    assert first["steps_by_drafter"]["exit 4"] == first["rounds"]


@pytest.mark.parametrize("batch", [(), ("--batch-size 3",)])
def test_each_bad_line_is_an_error_and_the_others_are_answered(generate, expected, batch):
    good = json.dumps({"prompt": PROMPT})
    deep = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
    rows = [
        good,
        deep,
        '{"prompt": ""}',
        '{"prompt": "a", "x": NaN}',
        json.dumps({"prompt": TOO_LONG}),
        good,
        '["x"]',
    ]
    rows += ['{"prompt": 3}', r'{"prompt": "\ud83c"}']
    stdin = "\n".join(rows).encode() + b'\n{"prompt": "\xff"}\n' + good.encode()
    result = generate("--jsonl --raw", *batch, stdin=stdin)
    found = [row.get("error", row.get("text")) for row in map(json.loads, result.out.splitlines())]
    answer = expected(raw=True)
    assert (result.code, result.err, len(found)) == (1, "", 11)
    assert [found[place] for place in (0, 5, 10)] == [answer] * 3
    assert found[1].startswith("line 2: not valid JSON: ") and found[3].startswith(
        "line 4: not valid JSON: "
    )
    assert found[2] == "line 3: the prompt is empty"
    assert LONGER.fullmatch(found[4].removeprefix("line 5: "))
    assert found[6:8] == [
        f"line {number}: needed an object with a text `prompt`" for number in (7, 8)
    ]
    assert found[8].startswith("line 9: not valid ") and found[9].startswith(
        "line 10: not valid JSON: "
    )
    lines = generate(
        "--lines --raw",
        *batch,
        stdin=f"\n{PROMPT}\n{TOO_LONG}\n".encode() + b"\xff\n" + PROMPT.encode(),
    )
    assert (lines.code, lines.out) == (1, f"\n{answer}\n\n\n{answer}\n")
    assert [error.split(":")[1] for error in lines.err.splitlines()] == [
        " line 1",
        " line 3",
        " line 4",
    ]
    assert lines.err.startswith("error: line 1: the prompt is empty\n")


def test_flags_that_cannot_be(checkpoint):
    for arguments, message in (
        ("--exit 6", "in 1..5, got 6 (model has 6 layers)"),
        ("--exit 99 --strategy early-exit", "in 1..6, got 99 (model has 6 layers)"),
        ("--top-p 0", "a number in (0, 1], got 0.0"),
        (
            "--strategy magic",
            "one of adaptive, self-speculative, mtp, eagle3, lookup, draft-and-verify, draft-model",
        ),
        ("--skip 2,7", "in 1..6, got 7 (model has 6 layers)"),
        ("--skip 1:6", "a list that leaves at least one layer, got all 6 layers"),
        (
            "--exit 3 --skip 2",
            "used with --strategy self-speculative or early-exit, got --strategy draft-and-verify",
        ),
        (
            "--exit-confidence 0.9",
            "used with a model whose exits were trained (`layerskip finetune`), or with --exits",
        ),
        ("--draft-weights int3", "a list, each one of int8, int4, got int3"),
        ("--draft-head int8", "used with --draft-weights, got int8"),
        ("--device abacus", "auto, cpu, cuda, cuda:N or mps, got abacus"),
    ):
        refused(
            f"error: {arguments.split()[0]} must be {message}",
            "generate",
            PROMPT,
            f"--model {checkpoint}",
            arguments,
        )
    # A wrong flag is no failure of a prompt: it is told once.
    told = "--exit must be in 1..5, got 9 (model has 6 layers)"
    fails(told, f"generate --lines --exit 9 --model {checkpoint}", stdin="a\nb\n")


@pytest.mark.parametrize(
    "template", [(), ("--raw",), ("--template {prompt}:",), ("--template chat",)]
)
def test_an_empty_prompt_is_an_error_in_every_template(generate, copy, template):
    """A template alone would be answered. White space alone is a prompt in the raw template, where
    it is the model's input.
    """
    (copy / "chat_template.jinja").write_text("user: {{ messages[0].content }}\nassistant: ")
    empty = Result(1, "", "error: the prompt is empty\n")
    command = ("generate", *template, f"--model {copy}")
    assert run(*command, "") == run(*command, stdin="") == run(*command, stdin="\n") == empty
    if template != ("--raw",):
        assert run(*command, stdin=" \n\t\n") == empty


def test_models_that_cannot_be(tmp_path):
    fails(
        "no model 'nonesuch': needed embedded, embedded-base, a folder, a .gguf file or a hub id such as "
        "owner/name or owner/name@revision",
        "generate", PROMPT, "--model nonesuch",
    )  # fmt: skip
    fails(
        f"folder {tmp_path} holds no model: there is no config.json in it",
        "generate",
        PROMPT,
        f"--model {tmp_path}",
    )
    refused(
        "error: cannot load model nobody/nothing: ", "generate", PROMPT, "--model nobody/nothing"
    )


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([PROMPT, "--lines"], "--lines and --jsonl"),
        (["--lines --jsonl"], "--lines or --jsonl"),
        ([PROMPT, "--batch-size 2"], "--lines or --jsonl"),
    ],
)
def test_flags_that_exclude_each_other(generate, arguments, named):
    result = generate(*arguments)
    assert (result.code, result.out) == (2, "") and named in result.err


EXITS = {"trained_exits": [2, 3]}
NOTHING = ()
COPY = ("lookup", "int8")
OF_EXITS = ("lookup", "exit 2", "exit 3")


@pytest.mark.parametrize(
    "info, flags, drafters",
    [
        ({}, (), COPY),
        ({}, ("--draft-weights int8 --draft-vocab 200",), COPY),
        ({"details": EXITS}, (), OF_EXITS),
        ({"exit_layer": 3}, (), ("exit 3",)),
        ({"strategy": "autoregressive"}, (), NOTHING),
        ({"strategy": "autoregressive"}, ("--exit 3",), ("exit 3",)),
        ({}, ("--strategy lookup",), ("lookup",)),
        ({}, ("--strategy self-speculative",), ("exit 1",)),
        ({}, ("--exit 6 --draft-weights int8",), ("int8",)),
    ],
    ids=str,
)
def test_what_drafts(copy, expected, info, flags, drafters):
    """Of what may draft at least one does. The copies need the kernels; other backends are drafted
    for by lookups alone.
    """
    write_info(str(copy), CheckpointInfo("{prompt}\n", **info))
    fixed = f"generate --jsonl --model {copy} --max-new-tokens 40 --dtype fp32"
    result = run(
        fixed, *flags, stdin=json.dumps({"prompt": PROMPT}) + '\n{"prompt": "play jazz"}\n'
    )
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["text"] for answer in answers] == [
        expected(prompt, max_new_tokens=40) for prompt in (PROMPT, "play jazz")
    ]
    drafted = set().union(*(answer["steps_by_drafter"] for answer in answers)) - {"plain"}
    assert drafted <= set(drafters) and bool(drafted) == bool(drafters)
    assert result.err == ""


def test_an_interrupt_keeps_the_output_so_far(generate, monkeypatch):
    def interrupted(_):
        yield "half an ans"
        raise KeyboardInterrupt

    monkeypatch.setattr(TextStream, "__iter__", interrupted)
    assert generate(PROMPT) == Result(130, "half an ans\n", "")


def test_a_terminal_as_standard_input_gets_an_example():
    keyboard, terminal = pty.openpty()
    try:
        result = finish(start("generate", stdin=terminal))
        lines = finish(start("generate --lines", stdin=terminal))
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert result.code == 0 and result.out.startswith("[IN:CREATE_REMINDER ")
    assert result.err == "no PROMPT given; an example: remind me to call mom at 5\n"
    assert (lines.code, lines.out) == (
        2,
        "",
    ) and "pipe the prompts of --lines or --jsonl into standard input" in lines.err


def test_no_standard_input_at_all_is_wrong_usage():
    result = finish(
        start("-c", f'exec "{sys.executable}" -m cli generate <&-', command=("/bin/sh",))
    )
    assert (result.code, result.out) == (2, "")
    assert (
        "give a PROMPT, or pipe one into standard input" in result.err
        and "Traceback" not in result.err
    )


@pytest.mark.slow
def test_generating_loads_nothing_of_training(checkpoint, expected):
    arguments = f"generate --model {checkpoint} --max-new-tokens 20 --dtype fp32"
    result = finish(start(command=LISTING_MODULES), stdin=f"{arguments} '{PROMPT}'")
    assert (result.code, result.out) == (0, expected() + "\n")
    modules = set(result.err.split())
    assert "torch" in modules
    assert not {"transformers", "peft", "datasets", "matplotlib", "evaluate"} & modules


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(checkpoint):
    arguments = ("generate --lines --raw --stop", "\n", f"--model {checkpoint} --max-new-tokens 2")
    process = start(*arguments)
    process.stdin.write(f"{PROMPT}\n")
    process.stdin.flush()
    assert process.stdout.readline().endswith("\n")
    process.stdout.close()
    process.stdin.write(f"{PROMPT}\n" * 50)
    process.stdin.close()
    assert (process.wait(timeout=120), process.stderr.read()) == (0, "")
    process.stderr.close()


@pytest.mark.slow
def test_ctrl_c_ends_cleanly(checkpoint, expected):
    """It comes while the second prompt is awaited: the first answer was shown as soon as it was
    there.
    """
    process = start(f"generate --lines --model {checkpoint} --max-new-tokens 20 --dtype fp32")
    process.stdin.write(f"{PROMPT}\n")
    process.stdin.flush()
    shown = "".join(process.stdout.readline() for _ in range(expected().count("\n") + 1))
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert (result.code, shown + result.out, result.err) == (130, expected() + "\n\n", "")
