"""The parts of evaluation: measurements and reports know each other only through the results below both."""

import ast
from pathlib import Path

import pytest

import layerskip_core.evaluation

ROOT = Path(layerskip_core.evaluation.__file__).parent
# What each part must not import, because it stands above the part or beside it.
FORBIDDEN = {
    "sandbox": {"tasks", "measure", "report", "output_folder"},
    "tasks": {"measure", "report", "output_folder"},
    "measure": {"report", "output_folder"},
    "report": {"tasks", "measure", "sandbox", "output_folder"},
}


def imported_parts(path):
    """The parts of evaluation that a module two levels below layerskip_core.evaluation imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            yield from [node.module.split(".")[0]] if node.module else [name.name for name in node.names]


@pytest.mark.parametrize("part", FORBIDDEN)
def test_no_part_imports_one_above_or_beside_it(part):
    modules = list((ROOT / part).glob("*.py"))
    imported = {name for path in modules for name in imported_parts(path)}
    assert len(modules) > 1
    assert not imported & FORBIDDEN[part]
