"""What a model is evaluated on: prompts with references, how answers end and how they are scored."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...config.checks import require
from ...config.evaluation import TaskConfig
from ...errors import ConfigError, DataError
from . import code, language_modelling, summaries
from . import pairs as text
from .task import Task

__all__ = ["TASKS", "Task", "load_task"]

_LOADERS: dict[str, Callable[[TaskConfig], Task]] = {
    "commands": text.parsing,
    "topv2": text.parsing,
    "jsonl": text.prompts,
    "cnn_dm": summaries.cnn_dm,
    "xsum": summaries.xsum,
    "humaneval": code.humaneval,
    "mbpp": code.mbpp,
    "lm": language_modelling.language_modelling,
}
TASKS = tuple(_LOADERS)
_WITH_SHOTS = ("jsonl", "cnn_dm", "xsum", "mbpp")
_WITH_SAMPLING = ("humaneval", "mbpp")


def load_task(config: TaskConfig) -> Task:
    """The task's rows, read at once. Without a task, `data` is of prompts and references, or a folder of TOPv2 files.

    Raises:
        ConfigError: there is no such task, or a setting that the task does not have.
        DataError: no such data, no such column, no rows, a malformed row, or a row without a prompt.
    """
    name = config.task or _task_of(config.data)
    if name not in TASKS:
        if "/" not in name and not Path(name).suffix and not Path(name).exists():
            raise ConfigError(f"`task` must be one of {', '.join(TASKS)}, or data with prompts and references; got {name}")
        config = replace(config, data=config.data or name)
        name = _task_of(name)
    _refuse_unused(name, config)
    task = _LOADERS[name](replace(config, task=config.task or config.data or name))
    if not task.examples:
        raise DataError(f"`data` {task.config.data} has no rows in split {config.split}")
    for number, example in enumerate(task.examples, start=1):
        if not example.prompt.strip():
            raise DataError(
                f"`data` {task.config.data}: a task needs a prompt in every row, found none in row {number} of those read"
            )
    return task


def _task_of(data: str | None) -> str:
    if data is None or data == "commands":
        return "commands"
    return "topv2" if data == "topv2" or Path(data).is_dir() else "jsonl"


def _refuse_unused(name: str, config: TaskConfig) -> None:
    require(config.metric is None or name == "jsonl", "metric", "used with `task` jsonl", f"`task` {name}")
    require(not config.shots or name in _WITH_SHOTS, "shots", f"0 for `task` {name}", config.shots)
    require(config.template is None or name != "lm", "template", "left out for `task` lm", config.template)
    sampled = config.temperature > 0
    require(not sampled or name in _WITH_SAMPLING, "temperature", f"0 for `task` {name}", config.temperature)
    require(config.data is not None or name != "jsonl", "data", "given for `task` jsonl", "none")
