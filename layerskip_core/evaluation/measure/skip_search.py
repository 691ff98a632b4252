"""Searches the layers that the drafts of Draft & Verify skip (Zhang et al., ACL 2024), on a task's validation rows.

Layers are left out one by one, each time the one that costs the least agreement with the model's own greedy outputs (the paper
uses Bayesian optimisation). The predicted speedup decides how many, and the draft length.
"""

from collections.abc import Generator, Sequence
from operator import eq
from typing import NamedTuple

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig, DecodingOptions
from ...config.model import Quantization
from ...decoding import DecodeStats
from ...decoding.drafters.exit import kept_layers
from ...errors import LayerSkipError, require
from ...model.backend import run_spans, states_at
from ..results import require_outputs
from ..tasks import Task, other_rows
from . import Progress, measure_prompt
from .cost_model import PassTimes, Prediction, averages, prediction_of, simulate, timed_visits

_PROMPTS = 8
_TOKENS = 48  # of each output
# Tokens that are drafted at once: they attend to the target's keys and values of the tokens before them, and to their own.
_BLOCK = 8
_CONTEXT = 256  # tokens before timed rounds
_CANDIDATES = 8  # layers tried at each size: the cheapest ones when last tried
_PATIENCE = 5  # sizes without a better prediction, after which the search ends
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12)  # of drafts
_FINALISTS = 3  # sets whose pass times are measured, with the best draft length and with twice as long drafts
_VISITS = 3  # to each of them


class Probe:
    """A prompt with the model's own greedy output, for which drafts without some layers are computed."""

    def __init__(self, loaded: Decoder, prompt_ids: Sequence[int], output_ids: Sequence[int], weights: Quantization | None):
        self.prompt_ids, self.output_ids = list(prompt_ids), list(output_ids)
        self._model, self._side = loaded.backend, loaded.backend.draft_sides[weights]
        model = self._model
        ids, first = [*prompt_ids, *output_ids][:-1], len(prompt_ids) - 1
        tokens = torch.tensor(ids, device=model.device)
        self._first, self._cache = first, model.new_cache(1, len(ids))
        self._cache.steps_back = len(ids) - first
        with torch.inference_mode():
            if first:
                model.run_layers(model.embed(tokens[:first]), 0, model.num_layers, self._cache.span(0, first))
            embedded, stops = model.embed(tokens[first:]), range(1, model.num_layers + 1)
            self._states = {0: embedded} | states_at(model, embedded, stops, self._cache.span(first, len(ids)))

    def choices(self, skip: tuple[int, ...]) -> list[int]:
        """The greedy draft at each position of the output, given the prompt and the output before it."""
        exit_layer, spans = kept_layers(skip, self._model.num_layers)
        if not self._side.shares_states:
            exit_layer, spans = 0, ((0, exit_layer), *spans)
        hidden, first = self._states[exit_layer], self._first
        cache = self._cache.branch([0], [first], [first + len(hidden)])  # which drafts write to
        blocks = [(start, min(start + _BLOCK, len(hidden))) for start in range(0, len(hidden), _BLOCK)]
        with torch.inference_mode():
            # The last block first, because its keys and values are seen by none of the others.
            parts = [
                run_spans(self._side.layers, hidden[start:stop], spans, cache.span(first + start, first + stop))
                for start, stop in reversed(blocks)
            ]
            chosen = self._side.whole.choose(self._side.whole.unembed(torch.cat(parts[::-1])))
        return chosen.tolist()


class SkipSet(NamedTuple):
    """Skipped layers, the draft at each position of each probe's output, and how many of these agree with the output."""

    skip: tuple[int, ...]
    choices: list[list[int]]
    agreeing: int


def search_skips(
    loaded: Decoder, task: Task, generation: DecodingOptions, weights: Quantization | None = None
) -> Generator[Progress, None, tuple[DecodingOptions, float, Prediction]]:
    """Yields progress; returns `skip` and draft length, agreement, prediction. Raises ConfigError, LayerSkipError."""
    sizes = loaded.backend.num_layers - 1
    require(sizes > 0, "search_skips", "used with a model of two layers or more", sizes + 1)
    rows = other_rows(task, _PROMPTS, ("validation", "train"))
    limit = min(_TOKENS, generation["max_new_tokens"])
    plain = DecodingConfig("autoregressive", max_new_tokens=limit, stop=task.stop)
    outputs = [measure_prompt(loaded, row.prompt, plain) for row in rows]
    require_outputs(outputs)
    answered = [(row.prompt, output) for row, output in zip(rows, outputs, strict=True) if output.error is None]
    probes = [Probe(loaded, loaded.encode_prompt(prompt), output.ids, weights) for prompt, output in answered]
    prefill = sum(output.steps[0].seconds for _, output in answered)
    tokens = sum(len(probe.output_ids) for probe in probes)
    if tokens == len(probes):
        raise LayerSkipError("answers of two tokens or more are needed to search the layers to skip")

    def predicted(candidate: SkipSet, drafts: int, times: PassTimes, prefill: float = 0.0) -> Prediction:
        rounds = (
            simulate(choices, probe.output_ids, drafts, limit, loaded.ends(plain.stop))
            for choices, probe in zip(candidate.choices, probes, strict=True)
        )
        return prediction_of(sum(rounds, DecodeStats()), times, prefill, tokens, len(probes))

    half = max(1, (sizes + 1) // 2)
    (known,) = _timed(loaded, probes, weights, [(tuple(range(half + 1, sizes + 2)), 4)])
    ranked: list[tuple[float, int, SkipSet]] = []  # the best draft length of each set, by its predicted speedup
    for size, candidate in enumerate(eliminated(probes, sizes + 1), start=1):
        # First by a draft's number of layers; the most promising sets are timed afterwards.
        times = known._replace(draft=known.draft * (sizes + 1 - size) / half)
        speedups = {drafts: predicted(candidate, drafts, times).speedup for drafts in _LENGTHS}
        drafts = max(_LENGTHS, key=speedups.__getitem__)
        ranked.append((speedups[drafts], drafts, candidate))
        best = max(range(size), key=lambda place: ranked[place][0])
        done = size - best > _PATIENCE
        yield Progress(sizes if done else size, sizes, "layers to skip")
        if done:
            break
    promising = sorted(ranked, key=lambda entry: -entry[0])[:_FINALISTS]
    finalists = [(candidate, factor * drafts) for _, drafts, candidate in promising for factor in (1, 2)]
    measured = _timed(loaded, probes, weights, [(candidate.skip, drafts) for candidate, drafts in finalists])
    predictions = [predicted(*finalist, times, prefill) for finalist, times in zip(finalists, measured, strict=True)]
    best = max(range(len(finalists)), key=lambda place: predictions[place].speedup)
    candidate, drafts = finalists[best]
    return {"skip": candidate.skip, "num_draft_tokens": drafts}, candidate.agreeing / tokens, predictions[best]


def eliminated(probes: Sequence[Probe], num_layers: int) -> Generator[SkipSet, None, None]:
    """Sets of 1 to L-1 skipped layers, one more each time; of equally costly layers the last: fewer states are recomputed."""
    skip: tuple[int, ...] = ()
    agreement = dict.fromkeys(range(1, num_layers + 1), 0)  # without the layer, when it was last tried
    candidates = list(agreement)
    for _ in range(num_layers - 1):
        tried = {}
        for layer in candidates:
            less = tuple(sorted((*skip, layer)))
            choices = [probe.choices(less) for probe in probes]
            agreement[layer] = sum(sum(map(eq, own, probe.output_ids)) for probe, own in zip(probes, choices, strict=True))
            tried[layer] = SkipSet(less, choices, agreement[layer])
        best = max(tried, key=lambda layer: (tried[layer].agreeing, layer))
        skip = tried[best].skip
        del agreement[best]
        candidates = sorted(agreement, key=lambda layer: (-agreement[layer], -layer))[:_CANDIDATES]
        yield tried[best]


def _timed(
    loaded: Decoder, probes: Sequence[Probe], weights: Quantization | None, asked: Sequence[tuple[tuple[int, ...], int]]
) -> list[PassTimes]:
    """Pass times of each set and draft length, visited in turn, after a prompt of median length or its end."""
    by_length = sorted(probes, key=lambda probe: len(probe.prompt_ids))
    context = by_length[len(by_length) // 2].prompt_ids[-_CONTEXT:]
    settings = [DecodingConfig("draft-and-verify", None, drafts, skip=skip, draft_weights=weights) for skip, drafts in asked]
    visits = list(timed_visits(loaded, [(context, loaded.backend.spec.context - len(context))] * _VISITS, settings))
    if not all(visits):
        raise LayerSkipError("prompts that leave room for rounds of drafts are needed to search the layers to skip")
    return [averages([visit[setting] for visit in visits]) for setting in settings]
