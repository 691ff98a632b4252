"""The command itself: fast help, one-line errors, exit statuses; and `layerskip data`: rows as JSON
lines.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from command_line import ENVIRONMENT, LISTING_MODULES, fails, finish, run, start

from layerskip_core.errors import LayerSkipError


@pytest.fixture
def failing(monkeypatch):
    def arrange(error):
        def fail(*_):
            raise error

        monkeypatch.setattr("layerskip_core.data.load_examples", fail)

    return arrange


def test_the_installed_command_says_its_version():
    installed = Path(sys.executable).with_name("layerskip")
    assert finish(start("--version", command=(str(installed),))).out == version("layerskip") + "\n"


def test_help_loads_no_library_of_models():
    result = finish(start(command=LISTING_MODULES), stdin="--version\nfinetune --help")
    assert result.code == 0 and result.out
    assert not {"torch", "transformers", "datasets", "numpy"} & set(result.err.split())


def test_what_is_not_there_is_told_before_a_library_of_models_is_loaded():
    no_file = "no.csv: there is no such file"
    no_model = "no model 'none': needed embedded, "
    told = {
        "finetune --data no.csv": f"--data {no_file}",
        "bench --data no.csv": f"--data {no_file}",
        "finetune --validation no.csv": f"--validation {no_file}",
        "bench --task no.csv": f"--task {no_file}",
        "finetune --model none": no_model,
        "generate hi --model none": no_model,
        "export none": no_model,
    }
    result = finish(start(command=LISTING_MODULES), stdin="\n".join(told))
    *errors, modules = result.err.splitlines()
    assert len(errors) == len(told) and result.out == ""
    for error, expected in zip(errors, told.values(), strict=True):
        assert error.startswith(f"error: {expected}")
    assert not {"torch", "transformers", "datasets", "numpy"} & set(modules.split())


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["generat"], "no such command 'generat'; did you mean 'generate'? (see layerskip --help)"),
        (
            ["generate --spek 3"],
            "no such option: --spek; did you mean --spec? (see layerskip generate --help)",
        ),
        (
            ["generate", "x", "--max-tokens 3"],
            "--max-tokens; did you mean --max-new-tokens? (see layerskip generate",
        ),
        (["generate", "x", "y"], "unexpected extra argument"),
        (["generate", "x", "--spec"], "'--spec' requires an argument"),
        (["generate", "x", "--exit half"], "--exit must be a whole number of at least 1, got half"),
        (["generate", "x", "--top_p=z"], "--top-p must be a number in (0, 1], got z"),
        (["generate", "x", "--spec -3"], "--spec must be a whole number in 1..10000, got -3"),
        (["generate", "x", "--strategy lokup"], "autoregressive, got lokup; did you mean lookup?"),
        (["generate", "x", "--dtype fp23"], "got fp23; did you mean fp32?"),
        (["generate", "x", "--exit 99"], "--exit must be in 1..23, got 99 (model has 24 layers)"),
        (
            ["generate", "x", "--lines"],
            "--lines and --jsonl read standard input; give no PROMPT with them",
        ),
        (["bench --task comands"], "got comands; did you mean commands?"),
        (
            ["data --split tset"],
            "--split must be one of train, validation, test, compositional, sealed, got tset",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments, line):
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and line in result.err


def test_what_fails_while_running_is_status_1(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x"}\n')
    for arguments, line in (
        (
            ["generate", "x", "--model", str(rows)],
            f"error: the file {str(rows)!r} is no model: needed embedded, ",
        ),
        (["generate", "x", "--model embeded"], "error: no model 'embeded': needed embedded, "),
        (["generate", "x" * 9000], "error: the prompt"),  # does not fit into the context
        (["compare", str(tmp_path / "none")], "error: RUNS"),
    ):
        result = run(*arguments)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(line) and result.err.count("\n") == 1


@pytest.mark.parametrize(
    "error, line",
    [
        (
            LayerSkipError("--exit must be [bold]1[/bold], got " + "x" * 200),
            "--exit must be [bold]1[/bold], got " + "x" * 200,
        ),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (LayerSkipError("several\nlines\r\n\n  of it\u2028\n"), "several lines of it"),
        (LayerSkipError("\x1b[31mred\x07 half \ud83c"), r"\x1b[31mred\x07 half \ud83c"),
        (LayerSkipError("x" * 5000), "x" * 2000 + "..."),
        (KeyError("weight"), "KeyError: 'weight'; --debug shows where"),
        (MemoryError(), "out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "out of memory: CUDA out of memory. Tried",
        ),
        (
            RecursionError("too deep"),
            "something is nested too deeply: too deep; --debug shows where",
        ),
        (BaseException("a panic of Rust"), "BaseException: a panic of Rust; --debug shows where"),
    ],
    ids=repr,
)
def test_an_error_is_one_line_as_it_stands(failing, error, line):
    failing(error)
    fails(line, "data")


@pytest.mark.parametrize("arguments", ["--debug data", "data --debug", "data --debug --samples 2"])
def test_debug_shows_where(failing, arguments):
    failing(KeyError("weight"))
    result = run(arguments)
    assert (result.code, result.out) == (1, "")
    first, *between, last = result.err.splitlines()
    assert (first, last) == (
        "Traceback (most recent call last):",
        "error: KeyError: 'weight'; --debug shows where",
    )
    assert any("in fail" in line for line in between)


def test_debug_by_the_environment_and_a_prompt_of_that_name(failing, monkeypatch):
    failing(LayerSkipError("no"))
    for value, lines in (("", 1), ("0", 1), ("1", 3)):
        monkeypatch.setenv("LAYERSKIP_DEBUG", value)
        assert (run("data").err.count("\n") >= lines) and (lines > 1) == (
            "Traceback" in run("data").err
        )
    monkeypatch.delenv("LAYERSKIP_DEBUG")
    result = run("generate", "--model", "nonesuch", "--", "--debug")
    assert (result.code, result.err.count("\n")) == (1, 1) and result.err.startswith(
        "error: no model 'nonesuch'"
    )


CLOSED = "error: [Errno 9] Bad file descriptor\n"
FULL = "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "arguments, streams, code, error",
    [
        ("data", "<&-", 0, ""),
        ("--help", "2>&-", 0, ""),
        ("data", "<&- 2>/dev/full", 0, ""),
        ("--version", ">&-", 1, CLOSED),
        ("data", "<&- >&-", 1, CLOSED),
        ("data", ">/dev/full", 1, FULL),
        ("generate --help", ">/dev/full", 1, FULL),
        ("data", ">&- 2>/dev/full", 1, ""),
        ("data", "<&- >&- 2>&-", 1, ""),
    ],
)
def test_streams_as_the_shell_left_them(arguments, streams, code, error):
    result = finish(
        start("-c", f'exec "{sys.executable}" -m cli {arguments} {streams}', command=("/bin/sh",))
    )
    assert (result.code, result.err) == (code, error)
    assert bool(result.out) == (code == 0)


@pytest.mark.slow
def test_a_model_is_loaded_and_answers_whatever_the_streams_are(checkpoint):
    command = (
        f'exec "{sys.executable}" -m cli generate x --stats --max-new-tokens 3 --model {checkpoint}'
    )
    result = finish(start("-c", f"{command} <&- 2>&-", command=("/bin/sh",)))
    assert (result.code, result.err) == (0, "") and result.out
    command = f'"{sys.executable}" -m cli generate x --stats --max-new-tokens 3 --model {checkpoint} 2>&1 >answer | true'
    assert finish(start("-c", command, command=("/bin/sh",))).code == 0
    assert Path("answer").read_text()


def test_a_descriptor_that_was_closed_is_taken_by_no_file(tmp_path):
    """Else what C code prints on it would go into the file."""
    script = "import sys, os\nfrom cli import console\nconsole.open_streams()\nos._exit(open(sys.argv[1], 'w').fileno())"
    command = f'exec "{sys.executable}" -c "{script}" {tmp_path}/file <&- >&- 2>&-'
    assert finish(start("-c", command, command=("/bin/sh",))).code > 2


def test_an_interrupted_command_ends_with_130(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("layerskip_core.data.load_examples", interrupt)
    result = run("data")
    assert (result.code, result.out, result.err.strip()) == (130, "", "")


TEXT = "a text of valid Unicode that is not empty"
ODD = "a\udcffb"  # as an argument arrives that is no UTF-8


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("generate", ODD), r"the prompt must be valid Unicode, got '\udcff' in it"),
        (("inspect", ODD), r"the prompt must be valid Unicode, got '\udcff' in it"),
        (("generate", "x", "--stop", ODD), rf"--stop must be {TEXT}, or several, got a\udcffb"),
        (("generate", "x", "--stop", ""), f"--stop must be {TEXT}, or several, got an empty one"),
        (("finetune --prompt-template", ODD + "{prompt}"), r"--template must be valid Unicode, got a\udcffb{prompt}"),
        (("generate", "x", "--dtype", ODD), r"--dtype must be one of auto, fp32, bf16, got a\udcffb"),
        *(
            ((command, ""), f"{command.split()[1]} must be {TEXT}, got an empty one")
            for command in (
                "data --data", "generate --model", "finetune --output", "import --output",
                "sweep-exits --from", "inspect --output",
            )
        ),
        (("import", ""), f"--model must be {TEXT}, got an empty one"),
    ],
)  # fmt: skip
def test_odd_and_empty_arguments(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(named, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_any_locale(tmp_path, locale):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "n\u00e9 \u65e5", "completion": "\U0001f3e0"}\n', encoding="utf-8")
    result = finish(start(f"data --data {file}", env={**ENVIRONMENT, **locale}, encoding="utf-8"))
    assert (result.code, result.out, result.err) == (0, file.read_text(encoding="utf-8"), "")
    result = finish(start("data --data né.csv", env={**ENVIRONMENT, **locale}))
    # 2: a path of bytes is no text
    assert (result.out, result.err.count("\n")) == ("", 1) and result.code in (1, 2)
