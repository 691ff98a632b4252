"""The documents: links lead somewhere, the commands, flags and names in them exist, and the map of the code is true."""

import re
from pathlib import Path
from pkgutil import resolve_name
from textwrap import dedent

import pytest
from test_imports import LEVEL_OF
from typer.main import get_command

import layerskip_core
from cli.main import app
from layerskip_core.model.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
CORE = ROOT / "layerskip_core"
FOLDERS = (ROOT / name for name in ("cli", "examples", "layerskip_core", "tests"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in folder.rglob("*.md"))])
COMMANDS = get_command(app).commands


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def text_of(path):
    return path.read_text(encoding="utf-8")


def block(path, language, number=0):
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(path), re.MULTILINE | re.DOTALL)[number]


def anchors(path):
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flags_of(command):
    return {flag for parameter in COMMANDS[command].params for flag in (*parameter.opts, *parameter.secondary_opts)}


def test_a_newcomer_reads_the_readme_in_two_minutes():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 120


def test_the_readme_lists_every_architecture():
    names = re.search(r"^- Architectures: (.*?)\.", text_of(ROOT / "README.md"), re.MULTILINE)[1].split(", ")
    assert len(names) == len(ARCHITECTURES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands(document):
    """Every call of `layerskip`, in examples and in prose."""
    for command, rest in re.findall(r"\blayerskip ([a-z][a-z-]*)((?:[^`|>\n]|\\\n)*)", text_of(document)):
        assert command in COMMANDS
        unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) - flags_of(command)
        assert not unknown, f"layerskip {command} {rest}"


@pytest.mark.parametrize("name", ["README.md", "cli/README.md"])
def test_flags_in_prose(name):
    known = {"--help", "--debug", "--version"}.union(*map(flags_of, COMMANDS))
    assert set(re.findall(r"`(--[a-z][a-z-]*)", text_of(ROOT / name))) <= known


def test_every_command_has_an_example():
    examples = text_of(ROOT / "cli" / "README.md")
    assert [name for name in COMMANDS if f"\nlayerskip {name}" not in examples] == []
    assert [name for name in COMMANDS if f"\n## {name}\n" not in examples] == []


def test_the_python_example_is_the_tested_one():
    """tests/test_front_door.py runs the example of the package's docstring."""
    assert (
        dedent(layerskip_core.__doc__.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]).strip()
        == block(ROOT / "README.md", "python").strip()
    )


def test_names_in_the_table_from_paper_to_code():
    names = re.findall(r"`((?:decoding|evaluation|losses|model|training)\.[\w.]+)`", text_of(CORE / "README.md"))
    assert len(names) > 15
    for name in names:
        resolve_name(f"layerskip_core.{name}")


@pytest.mark.parametrize(
    ("heading", "module"),
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


def test_the_map_has_the_order_in_which_packages_import():
    """Held against the imports by tests/test_imports.py."""
    order = re.findall(r"^(\w+)(?:/|\.py) ", block(CORE / "README.md", ""), re.MULTILINE)
    levels = [LEVEL_OF[package] for package in order]
    assert order and levels == sorted(levels)


def test_the_map_names_every_module():
    """A module counts only in the lines of its own package, which are indented under the package's line."""
    named, packages = set(), []
    for line in block(CORE / "README.md", "").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        package = re.match(r" *([a-z_]+)/", line)
        packages = [*packages[:depth], package[1]] if package else packages[:depth]
        named |= {"/".join([*packages, name]) for name in re.findall(r"(?<![\w/])[a-z_0-9]+\.py\b", line)}
    modules = {path.relative_to(CORE).as_posix() for path in CORE.rglob("*.py") if not path.name.startswith("__")}
    assert named == modules
