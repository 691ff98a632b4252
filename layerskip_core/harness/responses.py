"""A model's responses to the requests of lm-eval's tasks, by several strategies at once, for the commands of this package."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..config.evaluation import BenchConfig, SweepConfig
from ..data.examples import Example
from ..evaluation.measure.comparison import differences
from ..evaluation.measure.runs import Progress, answer_in_batches, drafts_tokens, measure_interleaved, timed_examples
from ..evaluation.outputs import Output, Outputs
from ..evaluation.results import Difference
from .generation import AnswerSettings
from .likelihood import likelihoods
from .model import LayerSkipLM
from .tasks import GENERATION, LIKELIHOOD

Responses = dict[int, Any]
"""By the `id` of a request: what lm-eval takes as its response."""


@dataclass(frozen=True)
class Generated:
    """Of every method: its responses, all its outputs, those that were timed in each repeat, and where its answers differ from
    the first method's."""

    responses: list[Responses]
    answers: list[Outputs]
    repeats: list[list[Outputs]]
    differing: list[tuple[Difference, ...]]


def scored(lm: LayerSkipLM, requests: Sequence[Any], depths: Sequence[int]) -> Generator[Progress, None, dict[int, Responses]]:
    """The responses to requests for log-likelihoods, by the number of layers; one pass of the model gives all depths."""
    asked = []
    found: dict[int, Responses] = {depth: {} for depth in depths}
    for request in requests:
        if request.request_type == LIKELIHOOD:
            asked.append((request, lm.text.pair(*request.args)))
        elif request.request_type != GENERATION:
            asked += [(request, window) for window in lm.text.windows(request.args[0])]
            for responses in found.values():
                responses[id(request)] = 0.0
    computed = likelihoods(lm.decoder.backend, [pair for _, pair in asked], depths, lm.batch_size)
    for done, (place, by_depth) in enumerate(computed, start=1):
        request = asked[place][0]
        for depth, likelihood in by_depth.items():
            if request.request_type == LIKELIHOOD:
                found[depth][id(request)] = tuple(likelihood)
            else:
                found[depth][id(request)] += likelihood.total
        yield Progress(done, len(asked), "log-likelihoods")
    return found


def generated(
    lm: LayerSkipLM,
    requests: Sequence[Any],
    methods: Sequence[DecodingConfig],
    config: SweepConfig | BenchConfig,
    repeats: int,
) -> Generator[Progress, None, Generated | None]:
    """The answers to requests for generation by every method, None if there are no such requests.

    `config`: the batch size, how many prompts of each task are timed, and a limit of tokens instead of the task's.

    Raises LayerSkipError when every prompt failed with the first method.
    """
    asked = [request for request in requests if request.request_type == GENERATION]
    if not asked:
        return None
    responses: list[Responses] = [{} for _ in methods]
    answers: list[list[Output]] = [[] for _ in methods]
    measured: list[list[list[Output]]] = [[[] for _ in range(repeats)] for _ in methods]
    differing: list[list[Difference]] = [[] for _ in methods]
    for task, of_task in groupby(asked, lambda request: request.task_name):
        every = list(of_task)
        for settings, places in lm.by_settings([request.args[1] for request in every]):
            group, start = [every[place] for place in places], len(answers[0])
            settings = replace(settings, max_new_tokens=config.generation.max_new_tokens or settings.max_new_tokens)
            decoder = _Given.of(lm, settings)
            examples = [Example(request.args[0], "") for request in group]
            own = [settings.of(method) for method in methods]
            batched: list[Outputs] = []
            if config.batch_size > 1:
                batched = yield from _named(task, answer_in_batches(decoder, examples, own, config.batch_size))
            times: list[list[Outputs]] = [[] for _ in methods]
            if chosen := timed_examples(examples, config.timed):
                times = yield from _named(task, measure_interleaved(decoder, chosen, own, repeats))
            outputs = batched or [repeated[0] for repeated in times]
            for number, output in enumerate(outputs):
                answers[number] += output.each
                for repeat, part in enumerate(times[number]):
                    measured[number][repeat] += part.each
                for request, each in zip(group, output.each, strict=True):
                    responses[number][id(request)] = lm.answer(each.ids, settings)
                if drafts_tokens(methods[number]) and not settings.sampling.temperature:
                    found = differences(decoder, examples, output, outputs[0])
                    differing[number] += [replace(each, sample=each.sample + start) for each in found]
    return Generated(
        responses,
        [Outputs(tuple(each)) for each in answers],
        [[Outputs(tuple(repeat)) for repeat in of_method if repeat] for of_method in measured],
        [tuple(each) for each in differing],
    )


def _named(task: str, events: "Generator[Progress, None, Any]") -> "Generator[Progress, None, Any]":
    """The progress of a task's requests under its name."""
    while True:
        try:
            progress = next(events)
        except StopIteration as end:
            return end.value
        yield replace(progress, phase=f"{task} {progress.phase}")


@dataclass(frozen=True)
class _Given(Decoder):
    """The model for prompts that lm-eval has already put into their form."""

    lm: LayerSkipLM | None = None
    settings: AnswerSettings | None = None

    @classmethod
    def of(cls, lm: LayerSkipLM, settings: AnswerSettings) -> "_Given":
        own = {each.name: getattr(lm.decoder, each.name) for each in fields(Decoder)}
        return cls(**own | {"lm": lm, "settings": settings})

    def encode_prompt(self, prompt: str, turns: Sequence[tuple[str, str]] = ()) -> list[int]:
        assert self.lm is not None and self.settings is not None
        return self.lm.prompt(prompt, self.settings)
