"""The command itself: fast help, one-line errors, exit statuses."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from command_line import LISTING_MODULES, fails, finish, run, start

from layerskip_core.errors import LayerSkipError


def test_the_installed_command_says_its_version():
    installed = Path(sys.executable).with_name("layerskip")
    assert finish(start("--version", command=(str(installed),))).out == version("layerskip") + "\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["finetune", "--help"]], ids=" ".join)
def test_help_loads_no_library_of_models(arguments):
    result = finish(start(*arguments, command=LISTING_MODULES))
    assert result.code == 0 and result.out
    assert not {"torch", "transformers", "datasets", "numpy"} & set(result.err.split())


def test_help_names_every_command():
    result = run("--help")
    assert result.code == 0
    for name in ("finetune", "sweep-exits", "generate", "bench", "data"):
        assert f"  {name} " in result.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generat"], "No such command 'generat'"),
        (["generate", "--spek", "3"], "--spek"),  # "No such option", worded by click or by typer
        (["generate", "x", "--exit", "half"], "Invalid value for '--exit'"),
        (["generate", "x", "--threads", "-1"], "Invalid value for '--threads'"),
        (["data", "--samples", "-1"], "Invalid value for '--samples'"),
    ],
)
def test_wrong_usage_is_status_2(arguments, named):
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert named in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LayerSkipError("--exit must be [bold]1[/bold], got " + "x" * 200), "--exit must be [bold]1[/bold], got " + "x" * 200),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_an_error_is_one_line_as_it_stands(monkeypatch, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr("layerskip_core.data.load_examples", fail)
    fails(line, "data")


def test_an_interrupted_command_ends_with_130(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("layerskip_core.data.load_examples", interrupt)
    result = run("data")
    assert (result.code, result.out, result.err.strip()) == (130, "", "")
