"""Tasks of lm-evaluation-harness: scores through every exit (`sweep-exits`) and by strategy
(`bench`).
"""

import difflib
import io
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig, decoding
from ..config.evaluation import HARNESS, BenchConfig, SweepConfig, TaskConfig
from ..config.resolution import require_exit_layer
from ..data import Example, quiet_datasets
from ..errors import ConfigError, DataError, LayerSkipError, first_line, refused, require
from ..evaluation.measure.bench import strategies_of
from ..evaluation.measure.figures import environment, result_of, setting_of
from ..evaluation.measure.measuring import Measured, Progress, depth_of, drafts_tokens, measure
from ..evaluation.measure.sweep import usual_exits
from ..evaluation.results import RunRecord
from ..evaluation.tasks.task import Task
from ..prompting import CHAT, RAW
from . import require_harness

if TYPE_CHECKING:
    from .model import LayerSkipLM

GENERATION = "generate_until"
_KINDS = ("loglikelihood", "loglikelihood_rolling", GENERATION)
_SEEDS = {"random": 0, "numpy": 1234, "shots": 1234}  # lm-eval's own
# Bootstrap samples for standard errors without a formula; lm-eval's 100,000 take minutes
_RESAMPLES = 1000
_UNUSED = ("data", "metric", "prompt_column", "completion_column")
_HERE = f"left out for `task` {HARNESS}..."


class HarnessTasks:
    """Loaded tasks. Call `requests` first, then `scores` once per setting. `notes` are for the
    user.
    """

    def __init__(
        self, loaded: Mapping[str, Any], config: TaskConfig, log_samples: bool = False
    ) -> None:
        """`loaded`: as lm-eval's TaskManager returns it. Raises ConfigError for tasks that cannot
        run here.
        """
        self._loaded = loaded
        self._config = config
        self._log_samples = log_samples
        self._tasks: dict[str, Any] = loaded["tasks"]
        self.notes: list[str] = []
        for name, task in self._tasks.items():
            _require_text_task(name, task)
            own_shots = task.get_config("num_fewshot")
            if own_shots == 0 and config.shots:
                self.notes.append(f"{HARNESS}{name} is always asked without shots")
            elif own_shots is None or config.shots is not None:
                task.set_config(key="num_fewshot", value=config.shots or 0)
            task.set_fewshot_seed(seed=config.seed or _SEEDS["shots"])

    def requests(self, render_chat: Callable[..., str], tokenizer_name: str) -> list[Any]:
        """Every request (lm-eval's Instances), numbered; `render_chat`: messages as text. Raises
        ConfigError, DataError.
        """
        random.seed(_SEEDS["random"])  # as lm-eval does: some tasks draw from these
        numpy.random.seed(_SEEDS["numpy"])
        chat = self._config.prompting.asked == CHAT
        for name, task in self._tasks.items():
            with _blaming(f"the rows of {HARNESS}{name} cannot be asked"), _quiet():
                task.build_all_requests(
                    limit=self._config.samples or None,
                    system_instruction=self._config.prompting.system,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    chat_template=render_chat if chat else None,
                    tokenizer_name=tokenizer_name if chat else "",
                )
        requests: list[Any] = []
        for task in self._tasks.values():
            for request in task.instances:
                kind = request.request_type
                require(kind in _KINDS, "task", "made of texts to score or to generate", kind)
                request.number = len(requests)
                requests.append(request)
        return requests

    def scores(self, responses: Mapping[int, Any]) -> dict[str, Any]:
        """lm-eval's scores of the tasks whose requests all have `responses` (by request number).

        `metrics` and `stderr` by `TASK METRIC[ FILTER]`; `samples`: rows by task; `logged`:
        lm-eval's records of rows.
        """
        from lm_eval.api.model import LM
        from lm_eval.evaluator import evaluate

        class Recorded(LM):  # type: ignore[misc]
            """A model that gives the responses."""

            def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
                return [responses[request.number] for request in requests]

            loglikelihood_rolling = generate_until = loglikelihood

        answered = {}
        for name, task in self._tasks.items():
            if all(request.number in responses for request in task.instances):
                answered[name] = task
        if not answered:
            return {"metrics": {}, "stderr": {}, "samples": {}, "logged": []}
        for task in answered.values():
            for request in task.instances:
                request.resps = []
                request.filtered_resps = {}
            # Some tasks would draw other requests the second time
            task.build_all_requests = lambda **_: None
        # Groups have scores of their own, if all of their tasks do
        chosen = self._loaded if len(answered) == len(self._tasks) else {"tasks": answered}
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # not worth processes for so few samples
        named = f"answers to {HARNESS}{','.join(answered)}"
        # It prints that it bootstraps
        with _blaming(f"{named} cannot be scored"), redirect_stdout(sys.stderr):
            results = evaluate(
                Recorded(),
                chosen,
                limit=self._config.samples or None,
                bootstrap_iters=_RESAMPLES,
                log_samples=self._log_samples,
            )
        return _by_name(results)


def _require_text_task(name: str, task: Any) -> None:
    """Raises ConfigError for a task that cannot run here."""
    named = f"{HARNESS}{name}"
    safe = (
        "one that runs no code of the model (humaneval and mbpp of layerskip run it in a sandbox)"
    )
    require(not getattr(task, "UNSAFE_CODE", False), "task", safe, named)
    require(not getattr(task, "MULTIMODAL", False), "task", "one of text alone", named)
    repeats = task.get_config("repeats") or 1
    once = "one that asks once; `python -m layerskip_core.harness` runs the others"
    require(repeats == 1, "task", once, f"{named}, which asks {repeats} times")


def _by_name(results: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results as `HarnessTasks.scores` returns them."""
    scored: dict[str, Any] = {"metrics": {}, "stderr": {}, "samples": {}, "logged": []}
    for task, rows in results.get("samples", {}).items():
        scored["logged"] += [{"task": task, **row} for row in rows]
    for task, values in results["results"].items():
        if "sample_len" in values:
            scored["samples"][task] = int(values["sample_len"])
        # Such as `acc,none` and `acc_stderr,none`: a metric and a filter
        for key, value in values.items():
            metric, comma, chosen_by = key.partition(",")
            if not comma or isinstance(value, str) or not math.isfinite(value):
                continue
            kind = "stderr" if metric.endswith("_stderr") else "metrics"
            name = f"{task} {metric.removesuffix('_stderr')}"
            if chosen_by != "none":
                name += f" {chosen_by}"
            scored[kind][name] = float(value)
    return scored


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bar that lm-eval shows for each task."""
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        yield


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Errors of any kind, from a task's files and code, become DataErrors: `what`, then the error's
    first line.
    """
    try:
        yield
    except LayerSkipError:
        raise
    except Exception as error:
        raise DataError(f"`task`: {what}: {first_line(error)}") from error


def load_tasks(config: TaskConfig, log_samples: bool = False) -> HarnessTasks:
    """The tasks of `config.task`: names, groups and patterns, or .yaml files. Raises ConfigError,
    and DataError for rows.
    """
    require_harness()
    for name in _UNUSED:
        require(getattr(config, name) is None, name, _HERE, getattr(config, name))
    template = config.prompting.asked
    accepted = f"chat or raw for `task` {HARNESS}..."
    require(template in (None, RAW, CHAT), "template", accepted, template)
    folder = config.include_path
    has_folder = folder is None or Path(folder).is_dir()
    require(has_folder, "include_path", "a folder with task files", folder)
    from lm_eval.tasks import TaskManager

    quiet_datasets()
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    names = config.harness_tasks
    local = "without the hub, `include_path` names a folder with task files whose rows are local"
    loading = f"{HARNESS}{','.join(names)} cannot be loaded ({local})"
    for built_in in (False, True):  # the built-in ones take seconds to list
        with _blaming("task files cannot be read"):
            manager = TaskManager(include_path=folder, include_defaults=built_in)
        chosen: dict[str, None] = {}
        missing = []
        for name in names:
            is_file = name.endswith(".yaml") and Path(name).is_file()
            matches = [name] if is_file else manager.match_tasks([name])
            chosen |= dict.fromkeys(matches)
            if not matches:
                missing.append(name)
        if missing and built_in:
            raise _unknown_task(missing[0], manager.all_tasks)
        if missing:
            continue
        with _blaming(loading):
            try:
                return HarnessTasks(manager.load(list(chosen)), config, log_samples)
            except KeyError:
                if built_in:  # else it may be a group of built-in tasks
                    raise
    raise AssertionError


def _unknown_task(name: str, known: Sequence[str]) -> ConfigError:
    what = f"a task of lm-eval ({len(known)} are known), of `include_path`, or a .yaml file"
    near = difflib.get_close_matches(name, known, 3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return refused("task", what, f"{HARNESS}{name}{hint}")


def sweep_scores(
    loaded: Decoder, tasks: HarnessTasks, config: SweepConfig
) -> Generator[Progress, None, RunRecord]:
    """Yields progress, returns the record: full depth and each exit alone. Raises ConfigError,
    LayerSkipError.
    """
    usual = SweepConfig()
    for name in ("specs", "exit_confidences"):
        given = getattr(config, name)
        require(given == getattr(usual, name), name, f"{_HERE}, which measures exits alone", given)
    for exit_layer in config.exits:
        require_exit_layer(exit_layer, loaded.backend.num_layers, may_be_last=True, field="exits")
    exits = tuple(sorted(set(config.exits or usual_exits(loaded))))
    methods = [decoding("autoregressive", config.generation)]
    for exit_layer in exits:
        methods.append(decoding("early-exit", config.generation, exit_layer=exit_layer))
    return (yield from _run(loaded, tasks, methods, replace(config, exits=exits), repeats=1))


def bench_scores(
    loaded: Decoder, tasks: HarnessTasks, config: BenchConfig
) -> Generator[Progress, None, RunRecord]:
    """Yields progress, returns the record of the strategies; drafters run on tasks that generate.
    Raises likewise.
    """
    require(
        not config.baselines,
        "baselines",
        f"{_HERE}; lm-eval has the model type hf",
        ",".join(config.baselines),
    )
    methods = strategies_of(loaded, config, loaded.recommended(config.packing))
    config = replace(config, strategies=tuple(dict.fromkeys(method.strategy for method in methods)))
    return (yield from _run(loaded, tasks, methods, config, config.repeats))


def _run(
    loaded: Decoder,
    tasks: HarnessTasks,
    methods: list[DecodingConfig],
    config: SweepConfig | BenchConfig,
    repeats: int,
) -> Generator[Progress, None, RunRecord]:
    temperature = config.generation.get("temperature")
    require(not temperature, "temperature", f"{_HERE}, whose tasks say how to sample", temperature)
    require(not config.packing.exact, "exact", _HERE, config.packing.exact)
    from .model import LayerSkipLM  # needs lm-eval

    # Log-likelihoods are not timed
    lm = LayerSkipLM(loaded, batch_size=config.batch_size if config.batch_size > 1 else "auto")
    requests = tasks.requests(lm.apply_chat_template, lm.tokenizer_name)
    generated = [request for request in requests if request.request_type == GENERATION]
    scored = [request for request in requests if request.request_type != GENERATION]
    if not generated:
        methods = [method for method in methods if not drafts_tokens(method)]
    by_depth = yield from _log_likelihoods(lm, scored, methods)
    measured = yield from _generated(lm, generated, methods, config, repeats)
    results = []
    logged: list[dict[str, Any]] = []
    for number, method in enumerate(methods):
        responses = dict(by_depth[depth_of(method, loaded.backend.num_layers)])
        result = setting_of(method)
        if measured:
            result = result_of(measured[number], measured[0])
            for request, row in zip(generated, measured[number].answers, strict=True):
                stop = lm.answering(method, request.args[1]).stop
                responses[request.number] = lm.answer(row.output.ids, stop)
        scores = tasks.scores(responses)
        logged += [{"result": number, **row} for row in scores.pop("logged")]
        results.append(replace(result, **scores))
    machine = environment(loaded)
    machine["versions"]["lm_eval"] = version("lm_eval")
    named = asdict(config)
    named["quality_metric"] = next(iter(results[0].metrics), None)
    named["prompt_template"] = config.task.prompting.asked or "raw"
    return RunRecord(named, machine, tuple(results), samples=tuple(logged))


def _log_likelihoods(
    lm: "LayerSkipLM", requests: list[Any], methods: list[DecodingConfig]
) -> Generator[Progress, None, dict[int | None, dict[int, Any]]]:
    """Responses to requests that score texts, by depth and the request's number."""
    num_layers = lm.decoder.backend.num_layers
    by_depth: dict[int | None, dict[int, Any]] = {}
    for method in methods:
        by_depth[depth_of(method, num_layers)] = {}
    depths = sorted(depth for depth in by_depth if depth is not None)
    for done, (place, responses) in enumerate(lm.score(requests, depths), start=1):
        for depth, response in responses.items():
            by_depth[depth][requests[place].number] = response
        yield Progress(done, len(requests), "log-likelihoods")
    return by_depth


def _generated(
    lm: "LayerSkipLM",
    requests: list[Any],
    methods: list[DecodingConfig],
    config: SweepConfig | BenchConfig,
    repeats: int,
) -> Generator[Progress, None, list[Measured]]:
    """Measures the answers of each method to requests that generate text, by task and
    `generation_kwargs`.
    """
    measured: list[Measured] = []
    limit = config.generation.get("max_new_tokens")

    def alike(request: Any) -> tuple[str, Any]:
        return request.task_name, request.args[1]

    for (task, asked), group in groupby(requests, key=alike):
        settings = [lm.answering(method, asked, limit) for method in methods]
        encode = partial(lm.prompt, max_new_tokens=settings[0].max_new_tokens)
        decoder = _TemplatedDecoder(**vars(lm.decoder), encode=encode)
        examples = tuple(Example(request.args[0], "") for request in group)
        unscored = Task(examples, config.task, "", lambda _: {})
        more = yield from measure(decoder, unscored, settings, config, repeats, name=task)
        measured = list(map(add, measured, more)) if measured else more
    return measured


@dataclass(frozen=True)
class _TemplatedDecoder(Decoder):
    """A decoder for prompts that lm-eval has already templated."""

    encode: Callable[[str], list[int]] = lambda _: []

    def encode_prompt(self, prompt: str, turns: Sequence[tuple[str, str]] = ()) -> list[int]:
        return self.encode(prompt)
