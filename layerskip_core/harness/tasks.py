"""Tasks of lm-evaluation-harness: loading them by name, what they ask a model, and the scores of its responses."""

import difflib
import io
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from ..config.checks import refused, require
from ..config.evaluation import HARNESS, TaskConfig
from ..data.records import quiet_datasets
from ..errors import ConfigError, DataError, LayerSkipError, first_line
from ..prompting import CHAT, RAW
from . import require_harness

LIKELIHOOD, ROLLING, GENERATION = "loglikelihood", "loglikelihood_rolling", "generate_until"
_SEEDS = {"random": 0, "numpy": 1234, "shots": 1234}  # lm-eval's own
_RESAMPLES = 1000  # for the standard errors that have no formula; lm-eval draws 100 times as often, which takes minutes
_UNUSED = ("data", "metric", "prompt_column", "completion_column")


@dataclass(frozen=True)
class Scores:
    """What lm-eval computes of responses, by `TASK METRIC`, or `TASK METRIC FILTER` where several filters read the answers.

    `stderr`: standard errors, of the metrics that have one. `samples`: the number of rows, by task.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    samples: dict[str, int]


class HarnessTasks:
    """Loaded tasks. `requests` comes first, then `scores` as often as there are models."""

    def __init__(self, loaded: Mapping[str, Any], config: TaskConfig) -> None:
        """`loaded`: as lm-eval's TaskManager returns it. Raises ConfigError for tasks that cannot run here."""
        self._loaded, self._config = loaded, config
        self.notes = tuple(note for name, task in self._tasks.items() if (note := _set_shots(name, task, config.shots)))
        for name, task in self._tasks.items():
            task.set_fewshot_seed(seed=config.seed or _SEEDS["shots"])
            _require_runnable(name, task)

    @property
    def _tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self._loaded["tasks"]
        return tasks

    def requests(self, render_chat: Callable[..., str], tokenizer_name: str) -> list[Any]:
        """Every request of every task: lm-eval's Instances, with `task_name`, `request_type` and `args`.

        `render_chat`: messages as text, used if the chat template was asked for. Raises ConfigError for requests of a kind that
        is none of LIKELIHOOD, ROLLING and GENERATION, and for tasks without rows.
        """
        random.seed(_SEEDS["random"])  # as lm-eval does: some tasks draw from these
        numpy.random.seed(_SEEDS["numpy"])
        chat = self._config.prompting.asked == CHAT
        for name, task in self._tasks.items():
            quiet = redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO())  # a progress bar for each task
            with _blaming(f"the rows of {HARNESS}{name} cannot be asked"), quiet[0], quiet[1]:
                task.build_all_requests(
                    limit=self._config.samples or None,
                    system_instruction=self._config.prompting.system,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    chat_template=render_chat if chat else None,
                    tokenizer_name=tokenizer_name if chat else "",
                )
            for instance in task.instances:
                kind = instance.request_type
                require(kind in (LIKELIHOOD, ROLLING, GENERATION), "task", "made of texts to score or to generate", kind)
        return [instance for task in self._tasks.values() for instance in task.instances]

    def scores(self, responses: Mapping[int, Any]) -> Scores:
        """The scores of responses, by the `id` of their requests. Tasks with a request that has none are left out."""
        from lm_eval.evaluator import evaluate

        answered = {
            name: task for name, task in self._tasks.items() if all(id(instance) in responses for instance in task.instances)
        }
        if not answered:
            return Scores({}, {}, {})
        for task in answered.values():
            task.build_all_requests = lambda instances=tuple(task.instances), **_: _ask_again(instances)
        chosen = self._loaded if len(answered) == len(self._tasks) else {"tasks": answered}
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # so few resamples are not worth processes
        with (
            _blaming(f"answers to {HARNESS}{','.join(answered)} cannot be scored"),
            redirect_stdout(sys.stderr),
        ):  # it resamples
            limit = self._config.samples or None
            found = evaluate(_recorded(responses), chosen, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False)
        return _scores_of(found["results"])


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """A task's files and code raise errors of any kind; they become DataErrors, with `what` before the first line."""
    try:
        yield
    except LayerSkipError:
        raise
    except Exception as error:
        raise DataError(f"`task`: {what}: {first_line(error)}") from error


def load_tasks(config: TaskConfig) -> HarnessTasks:
    """The tasks of `config.task`: names and groups of lm-eval, patterns of them, or files that end in .yaml.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, or a setting is not one of these tasks'.
        DataError: the rows of a task cannot be read, as without the hub.
    """
    require_harness()
    _refuse_unused(config)
    from lm_eval.tasks import TaskManager

    quiet_datasets()
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    names, folder = config.harness_tasks, config.include_path
    for built_in in (False, True):  # the built-in ones take seconds to list
        with _blaming("task files cannot be read"):
            manager = TaskManager(include_path=folder, include_defaults=built_in)
        matched = {name: _matches(manager, name) for name in names}
        missing = [name for name, tasks in matched.items() if not tasks]
        if missing and not built_in:
            continue
        if missing:
            raise _unknown(missing[0], manager.all_tasks)
        try:
            return HarnessTasks(manager.load(list(dict.fromkeys(task for tasks in matched.values() for task in tasks))), config)
        except ConfigError:
            raise
        except Exception as error:  # datasets, the hub client and a task's own code raise many kinds
            if isinstance(error, KeyError) and not built_in:  # a group of built-in tasks
                continue
            raise DataError(
                f"`task` {HARNESS}{','.join(names)} cannot be loaded: {first_line(error)}; without the hub, `include_path` "
                "names a folder with task files whose rows are local"
            ) from error
    raise AssertionError


def _matches(manager: Any, name: str) -> list[str]:
    if name.endswith(".yaml"):
        return [name] if Path(name).is_file() else []
    return list(manager.match_tasks([name]))


def _unknown(name: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, 3)
    what = f"a task of lm-eval ({len(known)} are known), of `include_path`, or a .yaml file"
    return refused("task", what, f"{HARNESS}{name}" + (f"; did you mean {', '.join(near)}?" if near else ""))


def _refuse_unused(config: TaskConfig) -> None:
    """Raises ConfigError for settings that lm-eval's tasks bring themselves."""
    for name in _UNUSED:
        require(getattr(config, name) is None, name, f"left out for `task` {HARNESS}...", getattr(config, name))
    template = config.prompting.asked
    require(template in (None, RAW, CHAT), "template", f"chat or raw for `task` {HARNESS}...", template)
    folder = config.include_path
    require(folder is None or Path(folder).is_dir(), "include_path", "a folder with task files", folder)


def _set_shots(name: str, task: Any, shots: int | None) -> str | None:
    """Gives a task as many shots as were asked for, or its own number. Returns a note if it takes none."""
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0 and shots:
        return f"{HARNESS}{name} is always asked without shots"
    if shots is not None or own is None:
        task.set_config(key="num_fewshot", value=shots or 0)
    return None


def _require_runnable(name: str, task: Any) -> None:
    named = f"{HARNESS}{name}"
    if getattr(task, "UNSAFE_CODE", False):
        raise refused("task", "one that runs no code of the model (humaneval and mbpp of layerskip run it in a sandbox)", named)
    require(not getattr(task, "MULTIMODAL", False), "task", "one of text alone", named)
    repeats = task.get_config("repeats") or 1
    once = "one that asks once; `python -m layerskip_core.harness` runs the others"
    require(repeats == 1, "task", once, f"{named}, which asks {repeats} times")


def _ask_again(instances: Sequence[Any]) -> None:
    """In place of building the requests anew for each model: some tasks would draw others."""
    for instance in instances:
        instance.resps, instance.filtered_resps = [], {}


def _recorded(responses: Mapping[int, Any]) -> Any:
    """A model that gives known responses."""
    from lm_eval.api.model import LM

    class Recorded(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            return [responses[id(request)] for request in requests]

        loglikelihood_rolling = generate_until = loglikelihood

    return Recorded()


def _scores_of(results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """lm-eval's keys are `acc,none` and `acc_stderr,none`: a metric and the filter that read the answers."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    samples: dict[str, int] = {}
    for task, values in results.items():
        if "sample_len" in values:
            samples[task] = int(values["sample_len"])
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or isinstance(value, str) or not math.isfinite(value):
                continue
            name = f"{task} {metric.removesuffix('_stderr')}" + ("" if chosen == "none" else f" {chosen}")
            (stderr if metric.endswith("_stderr") else metrics)[name] = float(value)
    return Scores(metrics, stderr, samples)
