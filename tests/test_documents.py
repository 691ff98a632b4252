"""The documents: links lead somewhere, and the commands, flags and names in them exist."""

import ast
import re
from pathlib import Path
from pkgutil import resolve_name
from textwrap import dedent

import pytest
from typer.main import get_command

import layerskip_core
from cli.main import app

ROOT = Path(__file__).parents[1]
CORE = ROOT / "layerskip_core"
FOLDERS = (ROOT / name for name in ("cli", "examples", "layerskip_core", "tests"))
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in folder.rglob("*.md"))]
)
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))
COMMANDS = get_command(app).commands


def text_of(path):
    return path.read_text(encoding="utf-8")


def anchors(path):
    """The anchors that GitHub gives the headings of a document."""
    return set(map(anchor_of, re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)))


def anchor_of(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def flags_of(command):
    return {
        flag
        for parameter in COMMANDS[command].params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_commands(document):
    """Every call of `layerskip` is checked, in examples and in prose."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for command, rest in re.findall(
        r"\blayerskip ([a-z][a-z-]*)((?:[^`|>\n]|\\\n)*)", text_of(document)
    ):
        assert command in COMMANDS
        unknown = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest)) - flags_of(command)
        assert not unknown, f"layerskip {command} {rest}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_scripts_import_is_there(script):
    for node in ast.walk(ast.parse(text_of(script))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(
            ("layerskip_core", "layerskip_cli")
        ):
            for name in node.names:
                resolve_name(f"{node.module}.{name.name}")


@pytest.mark.parametrize("name", ["README.md", "cli/README.md"])
def test_flags_in_prose(name):
    known = {"--help", "--help-all", "--debug", "--version"}.union(*map(flags_of, COMMANDS))
    assert set(re.findall(r"`(--[a-z][a-z0-9-]*)", text_of(ROOT / name))) <= known


def test_every_command_has_an_example():
    examples = text_of(ROOT / "cli" / "README.md")
    assert [name for name in COMMANDS if f"\nlayerskip {name}" not in examples] == []
    assert [name for name in COMMANDS if f"\n## {name}\n" not in examples] == []


def test_the_python_example_is_the_tested_one():
    """tests/test_front_door.py runs the example of the package's docstring."""
    tested = layerskip_core.__doc__.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
    shown = re.search(
        r"^```python\n(.*?)^```$", text_of(ROOT / "README.md"), re.MULTILINE | re.DOTALL
    )[1]
    assert dedent(tested).strip() == shown.strip()


@pytest.mark.parametrize(
    "heading, module",
    [
        ("How to add an architecture", "layerskip_core/model/architectures.py"),
        ("How to add a task", "tests/toy_task.py"),
        ("How to add a drafter", "tests/decoding/repeating_drafter.py"),
    ],
)
def test_how_tos_show_code_that_is_tested(heading, module):
    how_to = text_of(CORE / "README.md").partition(f"\n## {heading}\n")[2]
    example = re.search(r"^```python\n(.*?)^```$", how_to, re.MULTILINE | re.DOTALL)
    assert example and example[1] in text_of(ROOT / module)
