"""Flags come from the fields of the configs: every command that decodes has those of decoding."""

import json
import shutil
from dataclasses import fields

import pytest
from command_line import fails, run
from typer.main import get_command

from cli.main import app
from cli.options import flags_in, flags_of, with_flags
from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.save import write_info
from layerskip_core.config.evaluation import TaskConfig
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.options import PANELS
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.prompting import PromptingConfig
from layerskip_core.config.training import ExitBlockSettings, FinetuneConfig, RecipeSettings, RetentionSettings

COMMANDS = get_command(app).commands
SHARED = (PromptingConfig, PackingConfig, MachineConfig)


def names_of(command):
    return {flag for parameter in COMMANDS[command].params for flag in parameter.opts}


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "sweep-exits"])
def test_every_command_that_decodes_has_the_flags_of_decoding(command):
    shared = {flags_of(field, option)[0] for config in SHARED for field, option in flags_in(config).items()}
    shared |= {"--draft-confidence", "--temperature", "--top-k", "--top-p", "--stop", "--lookup", "--exit-confidence", "--skip"}
    assert {"--draft-confidence", "--temperature", "--stop", "--template", "--quantize", "--threads"} <= shared
    assert shared - names_of(command) == ({"--exit-confidence"} if command == "sweep-exits" else set())


def test_inspect_has_those_of_prompting_and_the_machine():
    assert {"--template", "--system", "--raw", "--device", "--dtype", "--threads", "--max-new-tokens"} <= names_of("inspect")


@pytest.mark.parametrize("config", [*SHARED, TaskConfig, RecipeSettings, RetentionSettings, ExitBlockSettings, FinetuneConfig])
def test_every_field_is_a_flag(config):
    """Except configs, whose fields are flags, and what another field decides."""
    without = {field.name for field in fields(config)} - flags_in(config).keys()
    nested = {"generation", "sampling", "prompting", "data", "recipe", "retention", "exit_blocks"}
    assert without <= nested | {"draft_layers", "adaptive"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_flag_under_a_heading(name):
    text = run(name, "--help").out
    headings = [line[:-1] for line in text.splitlines() if line[:1].isalpha() and line.endswith(":")]
    order = [panel for panel in ("Arguments", *PANELS, "Other") if panel in headings]
    assert headings == order and set(headings) <= {"Arguments", *PANELS, "Other"}
    assert all(flag in text for flag in names_of(name) if flag.startswith("--"))


def test_the_headings_of_finetune():
    text = run("finetune", "--help").out
    places = [text.index(f"\n{heading}:\n") for heading in ("Recipe", "Exit blocks", "Optimisation", "Data", "Adapters", "Run")]
    assert places == sorted(places)
    flags = ("--pmax", "--feature", "--lr ", "--samples")
    assert all(place < text.index(flag) < end for place, flag, end in zip(places, flags, places[1:], strict=False))


def test_errors_name_flags_on_the_command_line():
    assert with_flags("`num_draft_tokens` must be below 64 with `exact`, `data` x, `nothing` and `layerskip bench`") == (
        "--spec must be below 64 with --exact, --data x, `nothing` and `layerskip bench`"
    )


def test_a_flag_that_two_configs_share_reaches_both(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "reference": "b"}\n')
    fails("--seed must be a whole number in 0..4294967295, got 4294967296", "bench", "--seed", "4294967296")
    fails("--problem-samples must be at least 10, for --pass-k, got 2", "bench", "--pass-k", "1,10", "--problem-samples", "2")
    fails("--raw must be given without --template, got --template chat", "bench", "--raw", "--template", "chat")
    fails("--system must be given with a chat template, got a raw prompt", "inspect", "x", "--raw", "--system", "s")
    fails("--draft-weights must be a name, or several with commas, got ','", "bench", "--draft-weights", ",")


def test_the_template_that_was_applied_is_in_the_statistics(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] + m['content'] }}\n{% endfor %}")
    write_info(str(folder), CheckpointInfo())
    fixed = ("--model", str(folder), "--max-new-tokens", "3", "--dtype", "fp32")

    def applied(*arguments):
        result = run("generate", "hi", *fixed, *arguments, "--stats", "--strategy", "autoregressive")
        assert result.code == 0, result.err
        return result.out, result.err.partition("; prompt template: ")[2].rstrip("\n")

    chat, system, raw, text = (
        applied(),
        applied("--system", "Be short."),
        applied("--raw"),
        applied("--template", "{prompt}!"),
    )
    assert [chat[1], system[1], raw[1], text[1]] == ["chat", "chat with a system message", "raw", "'{prompt}!'"]
    assert applied("--template", "raw") == raw != chat
    assert run("generate", "systemBe short.\nuserhi\n", "--raw", *fixed, "--strategy", "autoregressive").out == system[0]
    benched = run("bench", *fixed, "--samples", "1", "--repeats", "1", "--format", "json", "--system", "Be short.")
    assert json.loads(benched.out)["config"]["prompt_template"] == "chat with a system message"
