"""A task in one module, for the test that tasks need no other edit than their line in TASKS."""

from collections.abc import Sequence

from layerskip_core.config.evaluation import TaskConfig
from layerskip_core.data import Example
from layerskip_core.evaluation.tasks.task import Task, TaskLoader


def load(config: TaskConfig) -> Task:
    """Numbers to count on from; `digits` is 1 for an answer with a digit in it."""
    examples = tuple(
        Example(f"{number} {number + 1}", f" {number + 2}") for number in range(config.samples)
    )
    return Task(examples, config, "digits", digits)


def digits(predictions: Sequence[str]) -> dict[str, list[float]]:
    return {"digits": [float(any(map(str.isdigit, text))) for text in predictions]}


TOY = TaskLoader(load, max_new_tokens=8)
