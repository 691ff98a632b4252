"""Packages import only packages below them, and no modules import each other in a circle."""

import ast
import tomllib
from functools import cache
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
ROOT = CHECKOUT / "layerskip_core"

# From the bottom up. Packages of one level do not import each other.
LEVELS = [
    {"errors", "interruption", "processor", "splits"},
    {"config", "files", "embedded"},
    {"data", "prompting", "model", "losses"},
    {"grammar"},
    {"checkpoint"},
    {"decoding"},
    {"training", "evaluation", "calibration", "export", "serving"},
    {"harness", "language_model"},
]
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}


def modules(root):
    """Name -> syntax tree, of every module below a folder; a package has the name of its folder."""
    trees = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = (
            ast.parse(file.read_text()),
            file,
        )
    return trees


def imports(name, tree, file, known, types):
    """The modules that a module imports, in functions too; with `types` also those under `if
    TYPE_CHECKING`.
    """
    for_types = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for_types |= {*ast.walk(node)}
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and (types or node not in for_types):
            base = package[: len(package) - (node.level - 1)]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                target = ".".join([*base, alias.name])
                yield target if target in known else ".".join(base)


@cache
def graph(root=ROOT, types=False):
    trees = modules(root)
    return {
        name: set(imports(name, tree, file, trees, types)) - {name}
        for name, (tree, file) in trees.items()
    }


def test_no_package_imports_a_package_above_it():
    edges = [(name, target) for name, targets in graph().items() if name for target in targets]
    tops = [
        (name.split(".")[0], target.split(".")[0], f"{name} imports {target}")
        for name, target in edges
    ]
    assert [
        text for top, other, text in tops if top != other and LEVEL_OF[top] <= LEVEL_OF[other]
    ] == []
    # Edges are found at all
    assert {"data", "model", "checkpoint"} <= {other for top, other, _ in tops if top == "training"}


def test_measurements_and_reports_know_each_other_only_through_the_results_below_both():
    beside = {
        "sandbox": {"tasks", "measure", "report"},
        "tasks": {"measure", "report"},
        "measure": {"report"},
        "report": {"tasks", "measure", "sandbox"},
    }
    inside = [
        (name, target)
        for name, targets in graph().items()
        for target in targets
        if name.startswith("evaluation.")
    ]
    parts = [
        (name.split(".")[1], target.split(".")[1])
        for name, target in inside
        if target.startswith("evaluation.")
    ]
    assert [(part, other) for part, other in parts if other in beside.get(part, ())] == []
    # Edges are found at all
    assert {("measure", "results"), ("report", "results"), ("tasks", "sandbox")} <= set(parts)


def circle(edges):
    """What remains of a graph (node -> nodes) without the nodes that no circle leads to, or that
    lead to none.
    """
    remaining = dict(edges)
    while True:
        reached = {target for targets in remaining.values() for target in targets}
        kept = {
            name: targets & remaining.keys()
            for name, targets in remaining.items()
            if name in reached and targets & remaining.keys()
        }
        if len(kept) == len(remaining):
            return sorted(kept)
        remaining = kept


def test_no_modules_or_folders_import_each_other_in_a_circle():
    """Nor does a module beside a folder: what lies in one package has an order, from the bottom
    up.
    """
    modules = graph()
    circles = {}
    for package in {name.rpartition(".")[0] for name in modules if name}:
        start = f"{package}." if package else ""
        child_of = {
            name: name.removeprefix(start).split(".")[0]
            for name in modules
            if name.startswith(start) and name
        }
        edges = {child: set() for child in child_of.values()}
        for name, child in child_of.items():
            edges[child] |= {child_of[target] for target in modules[name] if target in child_of} - {
                child
            }
        circles[package] = circle(edges)
    assert {package: names for package, names in circles.items() if names} == {}


def test_no_modules_import_each_other_in_a_circle_for_types_either():
    assert circle(graph(types=True)) == []
    assert circle(graph(CHECKOUT / "cli", types=True)) == []


def test_every_package_is_in_the_wheel():
    """setuptools leaves out what pyproject.toml does not list, and an editable installation does
    not show it.
    """
    with (ROOT.parent / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    files = [*ROOT.rglob("__init__.py"), *(ROOT.parent / "cli").rglob("__init__.py")]
    there = {
        ".".join(file.parent.relative_to(ROOT.parent).parts).replace("cli", "layerskip_cli")
        for file in files
    }
    assert there == set(listed)
