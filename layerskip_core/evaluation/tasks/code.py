"""Python programs scored by their tests: HumanEval (Chen et al., 2021) and MBPP (Austin et al., 2021), by pass@k.

HumanEval's prompts are function headers without their final line end. Tokenizers merge that line end with the indentation that
follows; after a separate one, models do not write code. Answers end as in Chen et al., section 3, or at a closing code fence of
an instruct model. MBPP's prompts are those of Austin et al., section 4: three solved problems, each between [BEGIN] and [DONE].
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

from ...config.checks import require
from ...config.evaluation import UNSANDBOXED, TaskConfig
from ...data.examples import Example
from ...data.records import Record, spread
from ...errors import ConfigError
from ..metrics import pass_at_k, rouge
from ..sandbox import LAYERS, run_tests, standing_layers
from .prompts import BARE, file_rows, forms, framed, hub_rows, shots_and_rest
from .task import Task, TaskLoader

_HUMANEVAL_HUB = "openai/openai_humaneval"
_HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")
_MBPP_HUB = "google-research-datasets/mbpp"
_MBPP_FORM = "You are an expert Python programmer, and here is your task: {prompt}\n[BEGIN]\n"
_MBPP_STOP = ("[DONE]",)
_MBPP_SHOTS = 3
_MBPP_SHOT_IDS = range(2, 11)
_MBPP_SPLITS = {"test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
_MAX_NEW_TOKENS = 512
_NEEDS_FLAG = "pass@k needs `allow_code_execution`, which runs what the model writes; without it the answers get ROUGE-2 only"


@dataclass(frozen=True)
class _Problem:
    """A prompt with its reference answer, the `head` before the answer in the program, and the tests after it."""

    example: Example
    head: str
    tests: str


def humaneval(config: TaskConfig) -> Task:
    every = file_rows(config.data) if config.data else hub_rows(_HUMANEVAL_HUB, "test")
    problems, template = _framed(
        forms(config.prompting.asked, BARE, BARE), map(_humaneval_problem, spread(every, config.samples))
    )
    return _task(replace(config, data=config.data or _HUMANEVAL_HUB, shots=0), problems, _HUMANEVAL_STOP, template)


def mbpp(config: TaskConfig) -> Task:
    """Problems in the full or the sanitized form. The shots are problems 2, 3, 4, ...; a file without these gives its first."""
    require(config.split in _MBPP_SPLITS, "split", f"one of {', '.join(_MBPP_SPLITS)} for `task` mbpp", config.split)
    count = _MBPP_SHOTS if config.shots is None else config.shots
    if config.data:
        shots, rows = _mbpp_file(config.data, count, _MBPP_SPLITS[config.split])
    else:
        solutions = hub_rows(_MBPP_HUB, "prompt", name="full")[1:]  # without problem 1
        require(count <= len(solutions), "shots", f"at most {len(solutions)} for `task` mbpp", count)
        shots, rows = solutions[:count], hub_rows(_MBPP_HUB, config.split, name="full")
    solved = [_mbpp_problem(row).example for row in shots]
    solved = [Example(example.prompt, example.completion + "\n[DONE]") for example in solved]
    asked = map(_mbpp_problem, spread(rows, config.samples))
    problems, template = _framed(forms(config.prompting.asked, _MBPP_FORM, BARE), asked, solved)
    return _task(replace(config, data=config.data or _MBPP_HUB, shots=count), problems, _MBPP_STOP, template)


def _mbpp_file(path: str, count: int, split: range) -> tuple[list[Record], list[Record]]:
    """`count` solved problems and the problems of the split, by task_id; by position if the file lacks some of them."""
    every = file_rows(path)
    known = {number: row for row in every if isinstance(number := row.fields.get("task_id"), int)}
    shots = [known[number] for number in _MBPP_SHOT_IDS if number in known][:count]
    rows = [row for number, row in known.items() if number in split]
    return (shots, rows) if len(shots) == count and rows else shots_and_rest(every, count, path)


def _framed(
    form: tuple[str, str | None], rows: Iterable[_Problem], solved: Sequence[Example] = ()
) -> tuple[list[_Problem], str | None]:
    """The problems with the prompts that `framed` makes."""
    problems = list(rows)
    examples, template = framed(*form, (problem.example for problem in problems), solved)
    return [replace(problem, example=example) for problem, example in zip(problems, examples, strict=True)], template


def _humaneval_problem(row: Record) -> _Problem:
    head = _code(row, "prompt")
    prompt = head.rstrip()
    example = Example(prompt, head[len(prompt) :] + _code(row, "canonical_solution"))
    name = _code(row, "entry_point").strip()
    return _Problem(example, head, f"{_code(row, 'test')}\ncheck({name})\n")


def _mbpp_problem(row: Record) -> _Problem:
    """The full form has `text` and `test_setup_code`, the sanitized one `prompt` and `test_imports`.

    The setup runs with the tests, after the answer: in row 367 it uses a class that the answer defines.
    """
    tests = _lines(row, "test_list")
    example = Example(
        f"{_code(row, row.first_column(('text', 'prompt')))} Your code should pass these tests:\n\n{tests}", _code(row, "code")
    )
    setup = _code(row, "test_setup_code") if row.fields.get("test_setup_code") else ""
    setup = setup or (_lines(row, "test_imports") if row.fields.get("test_imports") else "")
    return _Problem(example, "", f"{setup}\n{tests}")


def _code(row: Record, column: str) -> str:
    """A field that must be a text: other tasks join lists of sentences, but a program is one text."""
    if not isinstance(value := row.value(column), str):
        raise row.fault(f"{column} must be a text", value)
    return row.text(column)


def _lines(row: Record, column: str) -> str:
    if not isinstance(value := row.value(column), list):
        raise row.fault(f"{column} must be a list of texts", value)
    return "\n".join(row.texts(column))


def _task(config: TaskConfig, problems: Sequence[_Problem], stop: tuple[str, ...], template: str | None) -> Task:
    """A task with `problem_samples` answers to each problem."""
    answers = config.problem_samples
    examples = tuple(problem.example for problem in problems for _ in range(answers))
    resolved = replace(config, max_new_tokens=config.max_new_tokens or _MAX_NEW_TOKENS)
    references = [[example.completion] for example in examples]

    @cache  # strategies often give the same answer
    def passes(number: int, answer: str) -> bool:
        return run_tests(problems[number].head + answer, problems[number].tests).passed

    def score(predictions: Sequence[str]) -> dict[str, list[float]]:
        scores = _pass_scores(predictions, answers, config.pass_k, passes) if config.allow_code_execution else {}
        by_answer = rouge(predictions, references, ("rouge2",))["rouge2"]
        starts = range(0, len(by_answer), answers)
        return scores | {"rouge2": [fmean(by_answer[start : start + answers]) for start in starts]}

    metric = f"pass@{config.pass_k[0]}" if config.allow_code_execution else "rouge2"
    return Task(
        config.task or "", examples, resolved, metric, score, stop, template, notes=_notes(config), answers_per_prompt=answers
    )


def _pass_scores(
    predictions: Sequence[str], answers: int, ks: Sequence[int], passes: Callable[[int, str], bool]
) -> dict[str, list[float]]:
    verdicts: list[list[bool]] = [[] for _ in range(len(predictions) // answers)]
    for place, answer in enumerate(predictions):
        verdicts[place // answers].append(passes(place // answers, answer))
    return pass_at_k(verdicts, ks)


def _notes(config: TaskConfig) -> tuple[str, ...]:
    if not config.allow_code_execution:
        return (_NEEDS_FLAG,)
    standing = standing_layers()
    if not set(standing) - {"privileges"} and config.allow_code_execution != UNSANDBOXED:
        raise ConfigError(
            f"`allow_code_execution` needs a sandbox, and none works on this machine (no Landlock, seccomp or namespaces): the "
            f"programs that the model writes could read and change your files; `allow_code_execution` {UNSANDBOXED} runs them "
            "all the same"
        )
    missing = [layer for layer in LAYERS if layer not in standing]
    return (f"on this machine the sandbox does not restrict: {', '.join(missing)}",) if missing else ()


HUMANEVAL = TaskLoader(humaneval)
MBPP = TaskLoader(mbpp, accepts=("shots", "template"))
