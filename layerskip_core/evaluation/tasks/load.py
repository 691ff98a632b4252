"""Loads a task by name, or data with prompts and references as one."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

from ...config.checks import require
from ...config.evaluation import HARNESS, TaskConfig
from ...errors import ConfigError, DataError
from . import TASKS
from .task import Task, TaskLoader


def load_task(config: TaskConfig) -> Task:
    """The task with all its rows. If no task is named, `data` is a file of prompts and references or a TOPv2 folder.

    Raises:
        ConfigError: there is no such task, or the task does not have a setting that was given.
        DataError: the data or a column is missing, there are no rows, a row is malformed, or its prompt is empty.
    """
    name = config.task or _task_of(config.data)
    if name not in TASKS:
        if "/" not in name and not Path(name).suffix and not Path(name).exists():
            raise ConfigError(
                f"`task` must be one of {', '.join(TASKS)}, {HARNESS}TASK, or data with prompts and references; got {name}"
            )
        config = replace(config, data=config.data or name)
        name = _task_of(name)
    loader = _loader(name)
    _refuse_unused(name, loader, config)
    task = loader.load(replace(config, task=config.task or config.data or name))
    if not task.examples:
        raise DataError(f"`data` {task.config.data} has no rows in split {config.split}")
    for number, example in enumerate(task.examples, start=1):
        if not example.prompt.strip():
            raise DataError(f"`data` {task.config.data}: every row needs a prompt, found none in row {number} of those read")
    return task


def _task_of(data: str | None) -> str:
    if data is None or data == "commands":
        return "commands"
    return "topv2" if data == "topv2" or Path(data).is_dir() else "jsonl"


def _loader(name: str) -> TaskLoader:
    module, _, attribute = TASKS[name].partition(":")
    loader = vars(import_module(module, __package__))[attribute]
    assert isinstance(loader, TaskLoader), f"TASKS[{name!r}] must name a TaskLoader"
    return loader


def _refuse_unused(name: str, loader: TaskLoader, config: TaskConfig) -> None:
    accepts = loader.accepts
    require(config.metric is None or "metric" in accepts, "metric", f"left out for `task` {name}", config.metric)
    require(not config.shots or "shots" in accepts, "shots", f"0 for `task` {name}", config.shots)
    template = config.prompting.asked
    require(template is None or "template" in accepts, "template", f"left out for `task` {name}", template)
    require(config.data is not None or not loader.needs_data, "data", f"given for `task` {name}", "none")
