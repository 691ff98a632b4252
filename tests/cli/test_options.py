"""Flags come from the fields of the configs: every command that decodes has those of decoding."""

import json
import shutil
from typing import get_args

import pytest
from command_line import fails, run
from typer.main import get_command

from cli.main import app
from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.save import write_info
from layerskip_core.config.evaluation import BASELINES
from layerskip_core.config.options import Panel

COMMANDS = get_command(app).commands
DECODING = {
    "--temperature", "--top-k", "--top-p", "--stop", "--lookup", "--skip", "--max-new-tokens", "--seed", "--template",
    "--prompt-template", "--system", "--raw", "--quantize", "--draft-weights", "--draft-head", "--draft-vocab",
    "--exact", "--device", "--dtype", "--threads", "--model",
}  # fmt: skip


def names_of(command):
    return {flag for parameter in COMMANDS[command].params for flag in parameter.opts}


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "sweep-exits"])
def test_every_command_that_decodes_has_the_flags_of_decoding(command):
    assert names_of(command) >= DECODING
    assert ("--exit-confidence" in names_of(command)) == (command != "sweep-exits")
    assert ("--policy" in names_of(command)) == (command in ("generate", "chat"))


def test_flags_that_a_command_does_not_have():
    assert "--dtype" not in names_of("compare") and "--seed" not in names_of("serve")
    assert names_of("generate") - names_of("chat") >= {"--logprobs", "--prompt-logprobs"}
    assert not names_of("sweep-exits") & {
        "--exit",
        "--spec",
        "--strategy",
    } and "--exits" not in names_of("bench")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_flag_under_a_heading(name):
    """In commands with many flags --help shows those that people use, --help-all all of them."""
    flags = [flag for flag in names_of(name) if flag.startswith("--")]
    short = run(name, "--help").out
    text = run(name, "--help-all").out if "--help-all" in flags else short
    if len(flags) > 20:
        assert 8 <= short.count("\n  --") <= 14
    headings = [
        line[:-1] for line in text.splitlines() if line[:1].isalpha() and line.endswith(":")
    ]
    order = [
        panel for panel in ("Arguments", "Common", *get_args(Panel), "Other") if panel in headings
    ]
    assert headings == order
    assert all(flag in text for flag in flags)


@pytest.mark.parametrize("spelling", ["--lr", "--learning-rate", "--learning_rate"])
def test_other_spellings_of_a_flag_set_it(spelling):
    fails("--lr must be a number in (0, 100], got 101.0", "finetune", spelling, "101", "--dry_run")
    assert names_of("finetune") >= {"--p-max", "--e-scale"}


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("generate --max-tokens", "--max-new-tokens"),
        ("generate --max_length", "--max-new-tokens"),
        ("finetune --model_name_or_path", "--model"),
        ("finetune --bf16", "--dtype bf16"),
        ("serve --num-speculative-tokens", "--spec"),
        ("compare --bf16", None),  # which has no --dtype
    ],
)
def test_flags_of_other_programs_are_answered_with_ours(typed, meant):
    last = run(typed, "8").err.splitlines()[-1]
    command, flag = typed.split()
    assert last.startswith(f"error: no such option: {flag.replace('_', '-')}")
    assert (f"; did you mean {meant}? (see layerskip {command} --help)" in last) == (
        meant is not None
    )


def test_choices_are_in_the_help_and_precisions_have_their_names_of_torch_too(checkpoint):
    text = " ".join(run("bench --help-all").out.replace("-\n", "-").split()).replace("- ", "-")
    assert "--dtype <auto|fp32|bf16>" in text and "--draft-weights <int8|int4,...>" in text
    assert f"--baselines <str> Also these decoders: {', '.join(BASELINES)}." in text
    flags = ("generate", "hi", f"--model {checkpoint} --max-new-tokens 2 --stats --dtype")
    assert [f", {name} on cpu" in run(*flags, name).err for name in ("bfloat16", "float32")] == [
        True,
        True,
    ]
    fails("--dtype must be one of auto, fp32, bf16, got float16", *flags, "float16")


def test_a_flag_that_two_configs_share_reaches_both(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "reference": "b"}\n')
    fails(
        "--seed must be a whole number in 0..4294967295, got 4294967296", "bench --seed 4294967296"
    )
    fails(
        "--problem-samples must be at least 10, for --pass-k, got 2",
        "bench --pass-k 1,10 --problem-samples 2",
    )
    fails(
        "--raw must be given without --template, got --template chat", "bench --raw --template chat"
    )
    fails(
        "--system must be given with a chat template, got a raw prompt",
        "inspect",
        "x",
        "--raw --system s",
    )
    fails(
        "--draft-weights must be a name, or several with commas, got ','", "bench --draft-weights ,"
    )


def test_the_template_that_was_applied_is_in_the_statistics(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + m['content'] }}\n{% endfor %}"
    )
    write_info(str(folder), CheckpointInfo())
    fixed = f"--model {folder} --max-new-tokens 3 --dtype fp32"

    def applied(*arguments):
        result = run("generate", "hi", fixed, *arguments, "--stats --strategy autoregressive")
        assert result.code == 0, result.err
        return result.out, result.err.partition("; prompt template: ")[2].rstrip("\n")

    flags = ((), ("--system", "Be short."), ("--raw",), ("--template {prompt}!",))
    chat, system, raw, text = (applied(*arguments) for arguments in flags)
    assert [chat[1], system[1], raw[1], text[1]] == [
        "chat",
        "chat with a system message",
        "raw",
        "'{prompt}!'",
    ]
    assert applied("--template raw") == raw != chat
    assert (
        run(
            "generate", "systemBe short.\nuserhi\n", "--raw", fixed, "--strategy autoregressive"
        ).out
        == system[0]
    )
    benched = run("bench", fixed, "--samples 1 --repeats 1 --format json --system", "Be short.")
    assert json.loads(benched.out)["config"]["prompt_template"] == "chat with a system message"
