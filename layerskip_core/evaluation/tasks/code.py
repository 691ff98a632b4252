"""Python programs scored by their tests: HumanEval (Chen et al., 2021) and MBPP (Austin et al.,
2021), by pass@k.

HumanEval's prompts are cut before the final newline, which tokenizers merge with the indentation
after it. MBPP's prompts have three shots, their solutions between [BEGIN] and [DONE].
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import NamedTuple

from ...config.evaluation import UNSANDBOXED, TaskConfig
from ...data import Example, Record
from ...errors import ConfigError, require
from ...splits import TEST, VALIDATION
from ..metrics import pass_at_k, rouge
from ..sandbox import LAYERS, run_tests, standing_layers
from . import BARE, Task, TaskLoader, framed, rows_for, rows_of, shots_and_rest

_HUMANEVAL = "openai/openai_humaneval"
_HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")
_MBPP = "google-research-datasets/mbpp"
_MBPP_FORM = "You are an expert Python programmer, and here is your task: {prompt}\n[BEGIN]\n"
_MBPP_STOP = ("[DONE]",)
_MBPP_SHOTS = 3
_MBPP_SHOT_IDS = range(2, 11)
_MBPP_SPLITS = {"test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
_NEEDS_FLAG = "pass@k needs `allow_code_execution`, which runs what the model writes; without it the answers get ROUGE-2 only"


class _Problem(NamedTuple):
    """A prompt and its reference answer. The program is `head`, the answer, then `tests`."""

    example: Example
    head: str
    tests: str


def humaneval(config: TaskConfig) -> Task:
    every = rows_of(str(config.data), _HUMANEVAL, "test")
    rows, notes = rows_for(every, [row.key for row in every], config, str(config.data))
    problems = []
    for row in rows:
        head, solution, test, name = (
            _code(row, column) for column in ("prompt", "canonical_solution", "test", "entry_point")
        )
        prompt = head.rstrip()
        example = Example(prompt, head[len(prompt) :] + solution)
        problems.append(_Problem(example, head, f"{test}\ncheck({name.strip()})\n"))
    return _task(replace(config, shots=0), problems, BARE, _HUMANEVAL_STOP, notes=notes)


def mbpp(config: TaskConfig) -> Task:
    """Problems in the full or sanitized form. Shots are problems 2, 3, 4, ...; a file without these
    uses its first rows.
    """
    require(
        config.split in _MBPP_SPLITS,
        "split",
        f"one of {', '.join(_MBPP_SPLITS)} for `task` mbpp",
        config.split,
    )
    count = _MBPP_SHOTS if config.shots is None else config.shots
    data = str(config.data)
    rows = rows_of(data, _MBPP, config.split, name="full")
    solutions = rows_of(data, _MBPP, "prompt", name="full") if data == _MBPP else rows
    known = {
        number: row for row in solutions if isinstance(number := row.fields.get("task_id"), int)
    }
    shots = [known[number] for number in _MBPP_SHOT_IDS if number in known][:count]
    has_splits = data == _MBPP
    if data == _MBPP:
        require(len(shots) == count, "shots", f"at most {len(shots)} for `task` mbpp", count)
    else:
        by_split = {
            split: [row for number, row in known.items() if number in own]
            for split, own in _MBPP_SPLITS.items()
        }
        has_splits = bool(by_split[VALIDATION] and by_split[TEST])
        asked = by_split[config.split] or by_split[VALIDATION] or by_split[TEST]
        shots, rows = (
            (shots, asked) if len(shots) == count and asked else shots_and_rest(rows, count, data)
        )
    solved = [_mbpp_problem(row).example for row in shots]
    solved = [Example(example.prompt, example.completion + "\n[DONE]") for example in solved]
    rows, notes = rows_for(rows, [row.key for row in rows], config, data, has_splits)
    return _task(
        replace(config, shots=count),
        map(_mbpp_problem, rows),
        _MBPP_FORM,
        _MBPP_STOP,
        solved,
        notes,
    )


def _mbpp_problem(row: Record) -> _Problem:
    """Reads a row of the full or the sanitized form. The setup runs after the answer: in row 367 it
    uses the answer's class.
    """
    text = _code(row, row.first_column(("text", "prompt")))
    tests = _code(row, "test_list", list)
    example = Example(f"{text} Your code should pass these tests:\n\n{tests}", _code(row, "code"))
    setup = _code(row, "test_setup_code") if row.fields.get("test_setup_code") else ""
    setup = setup or (_code(row, "test_imports", list) if row.fields.get("test_imports") else "")
    return _Problem(example, "", f"{setup}\n{tests}")


def _code(row: Record, column: str, kind: type = str) -> str:
    """A text, or a list of texts joined by newlines, not by spaces like prose."""
    if not isinstance(value := row.value(column), kind):
        raise row.fault(f"{column} must be a {'text' if kind is str else 'list of texts'}", value)
    return "\n".join(row.texts(column))


def _task(
    config: TaskConfig,
    rows: Iterable[_Problem],
    form: str,
    stop: tuple[str, ...],
    solved: Sequence[Example] = (),
    notes: tuple[str, ...] = (),
) -> Task:
    """A task with `problem_samples` answers per problem."""
    problems = list(rows)
    count = config.problem_samples
    prompts, template = framed(
        config.prompting.asked, form, BARE, (problem.example for problem in problems), solved
    )
    examples = tuple(example for example in prompts for _ in range(count))
    references = [[example.completion] for example in examples]

    @cache  # strategies often give the same answer
    def passes(number: int, answer: str) -> bool:
        return not run_tests(problems[number].head + answer, problems[number].tests)

    def score(predictions: Sequence[str]) -> dict[str, list[float]]:
        starts = range(0, len(predictions), count)
        scores = {}
        if config.allow_code_execution:
            passed = [passes(number // count, text) for number, text in enumerate(predictions)]
            scores = pass_at_k([passed[start : start + count] for start in starts], config.pass_k)
        by_answer = rouge(predictions, references, ("rouge2",))["rouge2"]
        return scores | {"rouge2": [fmean(by_answer[start : start + count]) for start in starts]}

    metric = f"pass@{config.pass_k[0]}" if config.allow_code_execution else "rouge2"
    return Task(
        examples,
        config,
        metric,
        score,
        stop,
        template,
        notes=(*notes, *_notes(config)),
        answers_per_prompt=count,
    )


def _notes(config: TaskConfig) -> tuple[str, ...]:
    if not config.allow_code_execution:
        return (_NEEDS_FLAG,)
    standing = standing_layers()
    if not {"files", "file names"} & set(standing) and config.allow_code_execution != UNSANDBOXED:
        raise ConfigError(
            "`allow_code_execution` needs a sandbox that protects files, and this machine has none (neither Landlock nor "
            "namespaces): the programs that the model writes could read, change and remove your files; "
            f"`allow_code_execution` {UNSANDBOXED} runs them all the same"
        )
    missing = [layer for layer in LAYERS if layer not in standing]
    return (
        (f"on this machine the sandbox does not restrict: {', '.join(missing)}",) if missing else ()
    )


HUMANEVAL = TaskLoader(humaneval, ("template",), _HUMANEVAL, max_new_tokens=512)
MBPP = TaskLoader(mbpp, ("shots", "template"), _MBPP, max_new_tokens=512)
