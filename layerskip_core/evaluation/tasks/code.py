"""Python programs scored by their tests: HumanEval (Chen et al., 2021) and MBPP (Austin et al.,
2021), by pass@k.

HumanEval's prompts are cut before the final newline, which tokenizers merge with the indentation
after it. MBPP's prompts have three shots, their solutions between [BEGIN] and [DONE]. By the
template `chat` both ask for a code block, without shots (as EvalPlus does: Liu et al., 2023).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import NamedTuple

from ...config.evaluation import UNSANDBOXED, TaskConfig
from ...data import Example, Record
from ...errors import ConfigError, require
from ...prompting import CHAT
from ...splits import TEST, VALIDATION
from ..metrics import pass_at_k, rouge
from ..sandbox import LAYERS, run_tests, standing_layers
from .task import BARE, Task, TaskLoader, framed, rows_for, rows_of, shots_and_rest

_HUMANEVAL = "openai/openai_humaneval"
_HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")
_MBPP = "google-research-datasets/mbpp"
_MBPP_FORM = "You are an expert Python programmer, and here is your task: {prompt}\n[BEGIN]\n"
_MBPP_STOP = ("[DONE]",)
_MBPP_SHOTS = 3
_MBPP_SHOT_IDS = range(2, 11)
_MBPP_SPLITS = {"test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
_CHAT_FORM = (
    "Please provide a self-contained Python script that solves the following problem in a markdown "
    "code block:\n```python\n{prompt}\n```"
)
_CODE_BLOCK = re.compile(r"```[\w+-]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_NEEDS_FLAG = "pass@k needs `allow_code_execution`, which runs what the model writes; without it the answers get ROUGE-2 only"


class _Problem(NamedTuple):
    """A prompt and its reference answer. The program is `head`, the answer, then `tests`. By the
    template `chat` it is `preamble`, the answer's first code block, then `tests`.
    """

    example: Example
    head: str
    tests: str
    preamble: str = ""

    def program(self, answer: str, is_chat: bool) -> str:
        """What runs before the tests."""
        if not is_chat:
            return self.head + answer
        blocks = _CODE_BLOCK.findall(answer)
        return self.preamble + (blocks[0] if blocks else answer)


def humaneval(config: TaskConfig) -> Task:
    source = str(config.data)
    every = rows_of(source, _HUMANEVAL, "test")
    rows, notes = rows_for(every, [row.key for row in every], config, source)
    problems = []
    for row in rows:
        head = _code(row, "prompt")
        prompt = head.rstrip()
        solution = head[len(prompt) :] + _code(row, "canonical_solution")
        name = _code(row, "entry_point").strip()
        tests = f"{_code(row, 'test')}\ncheck({name})\n"
        # Imports and helpers, which an answer in chat may leave out
        preamble = head[: max(0, head.rfind(f"def {name}("))]
        problems.append(_Problem(Example(prompt, solution), head, tests, preamble))
    return _task(replace(config, shots=0), problems, BARE, _HUMANEVAL_STOP, notes=notes)


def mbpp(config: TaskConfig) -> Task:
    """Problems in the full or sanitized form. Shots are problems 2, 3, 4, ...; a file without these
    uses its first rows.
    """
    needed = f"one of {', '.join(_MBPP_SPLITS)} for `task` mbpp"
    require(config.split in _MBPP_SPLITS, "split", needed, config.split)
    usual = 0 if config.prompting.asked == CHAT else _MBPP_SHOTS
    count = usual if config.shots is None else config.shots
    source = str(config.data)
    rows = rows_of(source, _MBPP, config.split, name="full")
    if source == _MBPP:
        has_splits = True
        shots = _shot_rows(rows_of(source, _MBPP, "prompt", name="full"), count)
        require(len(shots) == count, "shots", f"at most {len(shots)} for `task` mbpp", count)
    else:
        by_split: dict[str, list[Record]] = {}
        for split, numbers in _MBPP_SPLITS.items():
            by_split[split] = [row for row in rows if row.fields.get("task_id") in numbers]
        has_splits = bool(by_split[VALIDATION] and by_split[TEST])
        asked = by_split[config.split] or by_split[VALIDATION] or by_split[TEST]
        shots = _shot_rows(rows, count)
        if len(shots) == count and asked:
            rows = asked
        else:
            shots, rows = shots_and_rest(rows, count, source)
    solved = []
    for row in shots:
        example = _mbpp_problem(row).example
        solved.append(Example(example.prompt, f"{example.completion}\n[DONE]"))
    rows, notes = rows_for(rows, [row.key for row in rows], config, source, has_splits)
    problems = map(_mbpp_problem, rows)
    config = replace(config, shots=count)
    return _task(config, problems, _MBPP_FORM, _MBPP_STOP, solved, notes)


def _shot_rows(rows: Sequence[Record], count: int) -> list[Record]:
    """The first of the problems that the data set sets aside for shots, in their order."""
    numbered = {row.fields.get("task_id"): row for row in rows}
    return [numbered[number] for number in _MBPP_SHOT_IDS if number in numbered][:count]


def _mbpp_problem(row: Record) -> _Problem:
    """Reads a row of the full or the sanitized form. The setup runs after the answer: in row 367 it
    uses the answer's class.
    """
    text = _code(row, row.first_column(("text", "prompt")))
    tests = _code(row, "test_list", list)
    example = Example(f"{text} Your code should pass these tests:\n\n{tests}", _code(row, "code"))
    setup = ""
    if row.fields.get("test_setup_code"):
        setup = _code(row, "test_setup_code")
    elif row.fields.get("test_imports"):
        setup = _code(row, "test_imports", list)
    return _Problem(example, "", f"{setup}\n{tests}")


def _code(row: Record, column: str, kind: type = str) -> str:
    """A text, or a list of texts joined by newlines, not by spaces like prose."""
    value = row.value(column)
    if not isinstance(value, kind):
        needed = "text" if kind is str else "list of texts"
        raise row.fault(f"{column} must be a {needed}", value)
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
    is_chat = config.prompting.asked == CHAT
    if is_chat:
        form = _CHAT_FORM
        stop = ()  # an answer may have text before its code block
    prompts, template = framed(
        config.prompting.asked, form, BARE, (problem.example for problem in problems), solved
    )
    examples = tuple(example for example in prompts for _ in range(count))
    references = [[example.completion] for example in examples]

    @cache  # strategies often give the same answer
    def passes(number: int, answer: str) -> bool:
        problem = problems[number]
        return not run_tests(problem.program(answer, is_chat), problem.tests)

    def score(predictions: Sequence[str]) -> dict[str, list[float]]:
        starts = range(0, len(predictions), count)  # of the answers to each problem
        scores = {}
        if config.allow_code_execution:
            passed = [passes(number // count, text) for number, text in enumerate(predictions)]
            verdicts = [passed[start : start + count] for start in starts]
            scores = pass_at_k(verdicts, config.pass_k)
        by_answer = rouge(predictions, references, ("rouge2",))["rouge2"]
        scores["rouge2"] = [fmean(by_answer[start : start + count]) for start in starts]
        return scores

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
    protects_files = bool({"files", "file names"} & set(standing))
    if not protects_files and config.allow_code_execution != UNSANDBOXED:
        raise ConfigError(
            "`allow_code_execution` needs a sandbox that protects files, and this machine has none (neither Landlock nor "
            "namespaces): the programs that the model writes could read, change and remove your files; "
            f"`allow_code_execution` {UNSANDBOXED} runs them all the same"
        )
    missing = [layer for layer in LAYERS if layer not in standing]
    if not missing:
        return ()
    return (f"on this machine the sandbox does not restrict: {', '.join(missing)}",)


HUMANEVAL = TaskLoader(humaneval, ("template",), _HUMANEVAL, max_new_tokens=512)
MBPP = TaskLoader(mbpp, ("shots", "template"), _MBPP, max_new_tokens=512)
