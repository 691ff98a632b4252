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
from itertools import chain, groupby
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig, decoding
from ..config.evaluation import HARNESS, BenchConfig, SweepConfig, TaskConfig
from ..config.resolution import require_exit_layer
from ..data import Example, quiet_datasets
from ..errors import DataError, LayerSkipError, first_line, refused, require
from ..evaluation.measure import Measured, Progress, depth_of, drafts_tokens, measure
from ..evaluation.measure.bench import strategies_of
from ..evaluation.measure.figures import environment, result_of, setting_of
from ..evaluation.measure.sweep import usual_exits
from ..evaluation.results import RunRecord
from ..evaluation.tasks import Task
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
            named = f"{HARNESS}{name}"
            repeats = task.get_config("repeats") or 1
            safe = "one that runs no code of the model (humaneval and mbpp of layerskip run it in a sandbox)"
            require(not getattr(task, "UNSAFE_CODE", False), "task", safe, named)
            require(not getattr(task, "MULTIMODAL", False), "task", "one of text alone", named)
            once = "one that asks once; `python -m layerskip_core.harness` runs the others"
            require(repeats == 1, "task", once, f"{named}, which asks {repeats} times")
            own = task.get_config("num_fewshot")
            shots = config.shots
            if own == 0 and shots:
                self.notes.append(f"{named} is always asked without shots")
            elif own is None or shots is not None:
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=config.seed or _SEEDS["shots"])

    def requests(self, render_chat: Callable[..., str], tokenizer_name: str) -> list[Any]:
        """Every request (lm-eval's Instances), numbered; `render_chat`: messages as text. Raises
        ConfigError, DataError.
        """
        random.seed(_SEEDS["random"])  # as lm-eval does: some tasks draw from these
        numpy.random.seed(_SEEDS["numpy"])
        chat = self._config.prompting.asked == CHAT
        for name, task in self._tasks.items():
            # A progress bar for each task
            quiet = redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO())
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
        for number, request in enumerate(requests):
            request.number = number
            kind = request.request_type
            require(kind in _KINDS, "task", "made of texts to score or to generate", kind)
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

        scored: dict[str, Any] = {"metrics": {}, "stderr": {}, "samples": {}, "logged": []}
        answered = {
            name: task
            for name, task in self._tasks.items()
            if all(each.number in responses for each in task.instances)
        }
        if not answered:
            return scored
        for task in answered.values():
            for request in task.instances:
                request.resps = []
                request.filtered_resps = {}
            # Some tasks would draw other requests the second time
            task.build_all_requests = lambda **_: None
        chosen = self._loaded if len(answered) == len(self._tasks) else {"tasks": answered}
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # not worth processes for so few samples
        limit = self._config.samples or None
        named = f"answers to {HARNESS}{','.join(answered)}"
        # It prints that it bootstraps
        with _blaming(f"{named} cannot be scored"), redirect_stdout(sys.stderr):
            results = evaluate(
                Recorded(),
                chosen,
                limit=limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=self._log_samples,
            )
        for task_name, rows in results.get("samples", {}).items():
            scored["logged"] += [{"task": task_name, **row} for row in rows]
        for task_name, values in results["results"].items():
            if "sample_len" in values:
                scored["samples"][task_name] = int(values["sample_len"])
            # Such as `acc,none` and `acc_stderr,none`: a metric and a filter
            for key, value in values.items():
                metric, comma, chosen_by = key.partition(",")
                if comma and not isinstance(value, str) and math.isfinite(value):
                    name = f"{task_name} {metric.removesuffix('_stderr')}" + (
                        "" if chosen_by == "none" else f" {chosen_by}"
                    )
                    scored["stderr" if metric.endswith("_stderr") else "metrics"][name] = float(
                        value
                    )
        return scored


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
        require(
            getattr(config, name) is None,
            name,
            f"left out for `task` {HARNESS}...",
            getattr(config, name),
        )
    template = config.prompting.asked
    folder = config.include_path
    require(
        template in (None, RAW, CHAT), "template", f"chat or raw for `task` {HARNESS}...", template
    )
    require(
        folder is None or Path(folder).is_dir(), "include_path", "a folder with task files", folder
    )
    from lm_eval.tasks import TaskManager

    quiet_datasets()
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    names = config.harness_tasks
    local = "without the hub, `include_path` names a folder with task files whose rows are local"
    for built_in in (False, True):  # the built-in ones take seconds to list
        with _blaming("task files cannot be read"):
            manager = TaskManager(include_path=folder, include_defaults=built_in)
        files = {name: [name] for name in names if name.endswith(".yaml") and Path(name).is_file()}
        matches = {name: files.get(name) or manager.match_tasks([name]) for name in names}
        if missing := [name for name in names if not matches[name]]:
            if not built_in:
                continue
            near = difflib.get_close_matches(missing[0], manager.all_tasks, 3)
            what = f"a task of lm-eval ({len(manager.all_tasks)} are known), of `include_path`, or a .yaml file"
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise refused("task", what, f"{HARNESS}{missing[0]}{hint}")
        with _blaming(f"{HARNESS}{','.join(names)} cannot be loaded ({local})"):
            try:
                return HarnessTasks(
                    manager.load(list(dict.fromkeys(chain(*matches.values())))), config, log_samples
                )
            except KeyError:
                if built_in:  # else it may be a group of built-in tasks
                    raise
    raise AssertionError


def sweep_scores(
    loaded: Decoder, tasks: HarnessTasks, config: SweepConfig
) -> Iterator[Progress | RunRecord]:
    """Yields progress, then the record: full depth and each exit alone. Raises ConfigError,
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
    methods += [
        decoding("early-exit", config.generation, exit_layer=exit_layer) for exit_layer in exits
    ]
    yield from _run(loaded, tasks, methods, replace(config, exits=exits), repeats=1)


def bench_scores(
    loaded: Decoder, tasks: HarnessTasks, config: BenchConfig
) -> Iterator[Progress | RunRecord]:
    """Yields progress, then the record of the strategies; drafters run on tasks that generate.
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
    yield from _run(loaded, tasks, methods, config, config.repeats)


def _run(
    loaded: Decoder,
    tasks: HarnessTasks,
    methods: list[DecodingConfig],
    config: SweepConfig | BenchConfig,
    repeats: int,
) -> Iterator[Progress | RunRecord]:
    temperature = config.generation.get("temperature")
    require(not temperature, "temperature", f"{_HERE}, whose tasks say how to sample", temperature)
    require(not config.packing.exact, "exact", _HERE, config.packing.exact)
    from .model import LayerSkipLM  # needs lm-eval

    # Log-likelihoods are not timed
    lm = LayerSkipLM(loaded, batch_size=config.batch_size if config.batch_size > 1 else "auto")
    requests = tasks.requests(lm.apply_chat_template, lm.tokenizer_name)
    generated = [request for request in requests if request.request_type == GENERATION]
    if not generated:
        methods = [method for method in methods if not drafts_tokens(method)]
    scored = [request for request in requests if request.request_type != GENERATION]
    depths = [depth_of(method, loaded.backend.num_layers) for method in methods]
    # Responses to `scored`, by request
    by_depth: dict[int | None, dict[int, Any]] = {depth: {} for depth in depths}
    likelihoods = lm.score(scored, sorted({depth for depth in depths if depth is not None}))
    for done, (place, responses) in enumerate(likelihoods, start=1):
        for layers, response in responses.items():
            by_depth[layers][scored[place].number] = response
        yield Progress(done, len(scored), "log-likelihoods")
    measured = yield from _generated(lm, generated, methods, config, repeats)
    results = []
    logged = list[dict[str, Any]]()
    for number, (method, depth) in enumerate(zip(methods, depths, strict=True)):
        responses = dict(by_depth[depth])
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
    metric = next(iter(results[0].metrics), None)
    template = config.task.prompting.asked or "raw"
    named = {"quality_metric": metric, "prompt_template": template}
    yield RunRecord(asdict(config) | named, machine, tuple(results), samples=tuple(logged))


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
    for (task, asked), group in groupby(
        requests, key=lambda request: (request.task_name, request.args[1])
    ):
        settings = [lm.answering(method, asked, limit) for method in methods]
        given = _Given(
            **vars(lm.decoder), encode=partial(lm.prompt, max_new_tokens=settings[0].max_new_tokens)
        )
        examples = tuple(Example(request.args[0], "") for request in group)
        unscored = Task(examples, config.task, "", lambda _: {})
        more = yield from measure(given, unscored, settings, config, repeats, name=task)
        measured = list(map(add, measured, more)) if measured else more
    return measured


@dataclass(frozen=True)
class _Given(Decoder):
    """A decoder for prompts that lm-eval has already templated."""

    encode: Callable[[str], list[int]] = lambda _: []

    def encode_prompt(self, prompt: str, turns: Sequence[tuple[str, str]] = ()) -> list[int]:
        return self.encode(prompt)
