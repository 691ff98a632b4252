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
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from ..config.evaluation import HARNESS, TaskConfig
from ..data import quiet_datasets
from ..errors import DataError, LayerSkipError, first_line, refused, require
from ..prompting import CHAT, RAW
from . import require_harness

GENERATION = "generate_until"
_KINDS = ("loglikelihood", "loglikelihood_rolling", GENERATION)
_SEEDS = {"random": 0, "numpy": 1234, "shots": 1234}  # lm-eval's own
_RESAMPLES = 1000  # for the standard errors that have no formula; lm-eval draws 100 times as often, which takes minutes
_UNUSED = ("data", "metric", "prompt_column", "completion_column")


class HarnessTasks:
    """Loaded tasks. `requests` comes first, then `scores` as often as there are models. `notes` are for the user."""

    def __init__(self, loaded: Mapping[str, Any], config: TaskConfig) -> None:
        """`loaded`: as lm-eval's TaskManager returns it. Raises ConfigError for tasks that cannot run here."""
        self._loaded, self._config = loaded, config
        self._tasks: dict[str, Any] = loaded["tasks"]
        self.notes: list[str] = []
        for name, task in self._tasks.items():
            named, repeats = f"{HARNESS}{name}", task.get_config("repeats") or 1
            safe = "one that runs no code of the model (humaneval and mbpp of layerskip run it in a sandbox)"
            require(not getattr(task, "UNSAFE_CODE", False), "task", safe, named)
            require(not getattr(task, "MULTIMODAL", False), "task", "one of text alone", named)
            once = "one that asks once; `python -m layerskip_core.harness` runs the others"
            require(repeats == 1, "task", once, f"{named}, which asks {repeats} times")
            own, shots = task.get_config("num_fewshot"), config.shots
            if own == 0 and shots:
                self.notes.append(f"{named} is always asked without shots")
            elif own is None or shots is not None:
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=config.seed or _SEEDS["shots"])

    def requests(self, render_chat: Callable[..., str], tokenizer_name: str) -> list[Any]:
        """Every request of every task: lm-eval's Instances, with `task_name`, `request_type` and `args`.

        `render_chat`: messages as text, used if the chat template was asked for. Raises ConfigError for requests that neither
        score texts nor generate them, DataError for tasks whose rows cannot be asked.
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
        requests = [instance for task in self._tasks.values() for instance in task.instances]
        for request in requests:
            kind = request.request_type
            require(kind in _KINDS, "task", "made of texts to score or to generate", kind)
        return requests

    def scores(self, responses: Mapping[int, Any]) -> dict[str, Any]:
        """What lm-eval computes of responses, by the `id` of their requests. Tasks with a request that has none are left out.

        `metrics` and `stderr` (standard errors, of the metrics that have one), by `TASK METRIC`, or by `TASK METRIC FILTER`
        where several filters read the answers; `samples`: the number of rows, by task.
        """
        from lm_eval.api.model import LM
        from lm_eval.evaluator import evaluate

        class Recorded(LM):  # type: ignore[misc]
            """A model that gives the responses."""

            def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
                return [responses[id(request)] for request in requests]

            loglikelihood_rolling = generate_until = loglikelihood

        found: dict[str, dict[str, Any]] = {"metrics": {}, "stderr": {}, "samples": {}}
        answered = {name: task for name, task in self._tasks.items() if all(id(each) in responses for each in task.instances)}
        if not answered:
            return found
        for task in answered.values():
            for request in task.instances:
                request.resps, request.filtered_resps = [], {}
            task.build_all_requests = lambda **_: None  # some tasks would draw other requests
        chosen = self._loaded if len(answered) == len(self._tasks) else {"tasks": answered}
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # so few resamples are not worth processes
        with (
            _blaming(f"answers to {HARNESS}{','.join(answered)} cannot be scored"),
            redirect_stdout(sys.stderr),  # it resamples
        ):
            limit = self._config.samples or None
            results = evaluate(Recorded(), chosen, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False)["results"]
        for task_name, values in results.items():
            if "sample_len" in values:
                found["samples"][task_name] = int(values["sample_len"])
            for key, value in values.items():  # such as `acc,none` and `acc_stderr,none`: a metric and a filter
                metric, comma, chosen_by = key.partition(",")
                if comma and not isinstance(value, str) and math.isfinite(value):
                    name = f"{task_name} {metric.removesuffix('_stderr')}" + ("" if chosen_by == "none" else f" {chosen_by}")
                    found["stderr" if metric.endswith("_stderr") else "metrics"][name] = float(value)
        return found


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
    for name in _UNUSED:
        require(getattr(config, name) is None, name, f"left out for `task` {HARNESS}...", getattr(config, name))
    template, folder = config.prompting.asked, config.include_path
    require(template in (None, RAW, CHAT), "template", f"chat or raw for `task` {HARNESS}...", template)
    require(folder is None or Path(folder).is_dir(), "include_path", "a folder with task files", folder)
    from lm_eval.tasks import TaskManager

    quiet_datasets()
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    names = config.harness_tasks
    local = "without the hub, `include_path` names a folder with task files whose rows are local"
    for built_in in (False, True):  # the built-in ones take seconds to list
        with _blaming("task files cannot be read"):
            manager = TaskManager(include_path=folder, include_defaults=built_in)
        found = {
            name: [name] if name.endswith(".yaml") and Path(name).is_file() else manager.match_tasks([name]) for name in names
        }
        if missing := [name for name in names if not found[name]]:
            if not built_in:
                continue
            near = difflib.get_close_matches(missing[0], manager.all_tasks, 3)
            what = f"a task of lm-eval ({len(manager.all_tasks)} are known), of `include_path`, or a .yaml file"
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise refused("task", what, f"{HARNESS}{missing[0]}{hint}")
        with _blaming(f"{HARNESS}{','.join(names)} cannot be loaded ({local})"):
            try:
                return HarnessTasks(manager.load(list(dict.fromkeys(chain(*found.values())))), config)
            except KeyError:
                if built_in:  # else it may be a group of built-in tasks
                    raise
    raise AssertionError
