"""Rows that ask for Python functions, for `layerskip finetune`: MBPP's training split, and the
documented functions of a folder of sources.

Usage: python rows.py MBPP.jsonl SOURCES OUT.jsonl    e.g. a checkout of TheAlgorithms/Python (MIT)
"""

import ast
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# The prompt of `layerskip bench --task humaneval --template chat`
PROMPT = (
    "Please provide a self-contained Python script that solves the following problem in a markdown "
    "code block:\n```python\n{problem}\n```"
)
MBPP_TRAINING = range(601, 975)
LINES = range(4, 40)  # of a function; longer ones are seldom answers to a prompt
CHARACTERS = 1100  # of a row, some 350 tokens: the time of a step grows with its longest row
Row = dict[str, str]


def row(problem: str, program: str) -> Row:
    return {
        "prompt": PROMPT.format(problem=problem.strip()),
        "completion": f"```python\n{program.strip()}\n```",
    }


def mbpp(file: Path) -> Iterator[Row]:
    for line in file.read_text(encoding="utf-8").splitlines():
        problem = json.loads(line)
        if problem["task_id"] in MBPP_TRAINING:
            tests = "\n".join(problem["test_list"])
            text = f"{problem['text']} Your code should pass these tests:\n\n{tests}"
            yield row(text, problem["code"].replace("\r\n", "\n"))


def functions(folder: Path) -> Iterator[Row]:
    """The functions on the top level of modules that have a docstring and call nothing else of
    their module.
    """
    for file in sorted(folder.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        try:
            tree = ast.parse(source)
        except SyntaxError:  # of a newer Python than this one
            continue
        nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        others = {name for node in tree.body for name in _defined(node)}
        lines = source.splitlines()
        for node in nodes:
            used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            is_alone = not used & (others - {node.name})
            length = (node.end_lineno or 0) - node.lineno + 1
            is_puzzle = node.name in ("solution", "main")  # their names say nothing
            if is_puzzle or not (is_alone and length in LINES and ast.get_docstring(node)):
                continue
            needed = [ast.unparse(each) for each in imports if used & set(_bound(each))]
            head = "\n".join(needed) + "\n\n" if needed else ""
            documented = lines[node.lineno - 1 : node.body[0].end_lineno]
            whole = lines[node.lineno - 1 : node.end_lineno]
            yield row(head + "\n".join(documented), head + "\n".join(whole))


def _defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines, imports apart."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))


def _bound(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    for alias in node.names:
        yield (alias.asname or alias.name).partition(".")[0]


def main(file: Path, sources: Path, out: Path) -> None:
    rows = [
        each
        for each in (*mbpp(file), *functions(sources))
        if len(each["prompt"] + each["completion"]) <= CHARACTERS
    ]
    random.Random(0).shuffle(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    print(f"{out}: {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
