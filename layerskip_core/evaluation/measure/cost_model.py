"""Predicts the speed of settings from their acceptance and the time of each kind of pass, measured
along answers.
"""

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain, groupby, islice
from operator import eq, mul
from statistics import fmean, median
from typing import NamedTuple

import numpy
import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig, DraftProfile
from ...config.model import PackingConfig, Quantization
from ...data import Example
from ...decoding import DecodeStats, decode
from ...decoding.drafters.exit import drafter_name
from ...model import ModelSpec
from ...model.backend import Submodel, beyond_exit, states_at
from ...model.configuration import LAYER_KINDS
from ...model.vocabulary import most_probable
from ..results import Output, Result, require_outputs
from . import Progress, measure_prompt

# Answers along which every setting is timed; more, within about 10 s, if passes are short, because
# their times vary more.
_FEWEST = 3
_MOST = 12
_SECONDS = 10.0
_STEPS = 32  # plain steps timed per answer, in its middle
# Timed rounds per setting and answer; fewer of long drafts
_ROUNDS = 10
_FEWEST_ROUNDS = 3
_DRAFTS = 96
_FEW_STEPS = 8  # plain steps timed where nothing else was measured
_STORED = {"int8": 1.0, "int4": 0.625}  # bytes per weight, with scales
# How many are timed; bytes
_SUMS = 5
_MOST_SUMMED = 1 << 30
_ROWS = 17  # of the longest pass timed for adaptive drafting
_TIMES = 5  # timed passes per number of rows

Side = tuple[Quantization | None, int]
"""The drafter: its weights (None: the model's own) and number of layers."""


def side_of(setting: DecodingConfig) -> Side:
    """The drafter of self-speculative decoding, or the layers of an early exit; 0 layers for other
    strategies.
    """
    return setting.draft_weights, setting.exit_layer or 0


class PassTimes(NamedTuple):
    """Seconds on this machine."""

    draft: float  # one draft token: layers 0..E-1 and the head
    # A round's verification, with layers 0..E-1 for the last draft, or for all tokens after low-bit
    # drafts
    verify: float
    other: float  # the rest of a round
    plain: float  # an autoregressive step, timed next to the rounds
    length: float = 0.0  # the mean number of drafts in these rounds


Part = tuple[list[int], int]
"""(ids, limit): the context, and how many tokens of the answer are decoded after it to time passes."""


def timed_part(
    loaded: Decoder, prompt_ids: Sequence[int], output_ids: Sequence[int], steps: int = _STEPS
) -> Part:
    """The whole answer, or its middle `steps` tokens, with room for one more token, so that the
    last can be a draft.
    """
    start = max(0, (len(output_ids) - steps) // 2)
    ids = [*prompt_ids, *output_ids[:start]]
    return ids, max(1, min(len(output_ids) - start + 1, loaded.backend.spec.context - len(ids)))


def pass_times(
    loaded: Decoder, part: Part, setting: DecodingConfig, plain: float
) -> PassTimes | None:
    """Mean pass times of greedy rounds along an answer (None: no round fits). `plain`: the mean
    autoregressive step.
    """
    most = max(_FEWEST_ROUNDS, min(_ROUNDS, _DRAFTS // setting.num_draft_tokens))
    rounds = [step for step in _steps(loaded, part, setting, most) if step[0]]
    if not rounds:
        return None
    drafted, draft, verify, total = map(sum, zip(*rounds, strict=True))
    count = len(rounds)
    return PassTimes(
        draft / drafted, verify / count, (total - draft - verify) / count, plain, drafted / count
    )


def _steps(
    loaded: Decoder, part: Part, setting: DecodingConfig, most: int
) -> list[tuple[int, float, float, float]]:
    """Per step after the prefill: drafts, and seconds for drafting, verifying and in total."""
    ids, limit = part
    greedy = replace(setting, max_new_tokens=limit, stop=(), temperature=0.0, lookup=0)
    # The answer's end is known, so EOS ids are not needed
    decoding = decode(loaded.backend, ids, greedy)
    steps = []
    before = DecodeStats()
    started = time.perf_counter()
    for _ in islice(decoding, 1 + most):
        total = time.perf_counter() - started
        now = decoding.stats
        draft = now.draft_seconds - before.draft_seconds
        verify = now.verify_seconds - before.verify_seconds
        steps.append((now.drafted - before.drafted, draft, verify, total))
        before = now
        started = time.perf_counter()
    return steps[1:]


def plain_step(loaded: Decoder) -> float:
    """Seconds of a plain step: the mean of a few after a short prompt."""
    part = loaded.encode_prompt("a"), _FEW_STEPS
    return fmean(
        total for *_, total in _steps(loaded, part, DecodingConfig("autoregressive"), _FEW_STEPS)
    )


def speed_of(loaded: Decoder, stats: DecodeStats) -> float:
    """Estimated speedup of rounds with drafts over a few timed steps of plain decoding."""
    return (
        plain_step(loaded)
        * (stats.accepted + stats.rounds)
        / (stats.draft_seconds + stats.verify_seconds)
    )


def bandwidth(loaded: Decoder, step: float, positions: float = 0.0) -> dict[str, float]:
    """Bytes that a plain step reads (weights, KV entries of `positions`); bytes per second of it,
    and of a sum over as many.
    """
    backend = loaded.backend
    spec = loaded.backend.spec
    width = float(loaded.backend.dtype.itemsize)
    kind = backend.implementation.partition(")")[0]
    stored = next((size for name, size in _STORED.items() if name in kind), width)
    # Our own kernels count them
    total = float(getattr(backend, "bytes_read", stored * spec.weights_read(1)))
    if isinstance(spec, ModelSpec):  # other specs do not know the KV entries of a layer
        for layer, kind in enumerate(spec.kinds):
            keys = spec.of_layer(layer).keys if kind in LAYER_KINDS else 0
            total += 2 * width * keys * min(positions, spec.window_of(kind) or positions)
    memory = torch.ones(int(min(total, _MOST_SUMMED)) // 4 + 1, device=backend.device)
    times = []
    for _ in range(_SUMS):
        started = time.perf_counter()
        memory.sum().item()
        times.append(time.perf_counter() - started)
    summed = 4 * len(memory) / min(times)
    return {
        "bytes_per_token": total,
        "bytes_per_second": total / step,
        "sum_bytes_per_second": summed,
    }


def timed_visits(
    loaded: Decoder, parts: Iterable[Part], settings: Sequence[DecodingConfig]
) -> Iterator[dict[DecodingConfig, PassTimes]]:
    """Times rounds of each setting along each part that has room for them, and plain steps next to
    each drafter's.
    """
    for visit, part in enumerate(parts):
        timed: dict[DecodingConfig, PassTimes] = {}
        for _, alike in groupby(settings[:: -1 if visit % 2 else 1], key=side_of):
            # Empty for an answer of one token
            steps = _steps(loaded, part, DecodingConfig("autoregressive"), _STEPS)
            for setting in alike if steps else ():
                if passes := pass_times(loaded, part, setting, fmean(total for *_, total in steps)):
                    timed[setting] = passes
        # One for all: its noise must not rank drafters
        plain = fmean(each.plain for each in timed.values()) if timed else 0.0
        yield {setting: passes._replace(plain=plain) for setting, passes in timed.items()}


def averages(times: Sequence[PassTimes]) -> PassTimes:
    """Trimmed means, without the lowest and highest tenth. Medians would overestimate speed: a few
    rounds take much longer.
    """
    left_out = len(times) // 10
    return PassTimes(
        *(
            fmean(sorted(seconds)[left_out : len(times) - left_out])
            for seconds in zip(*times, strict=True)
        )
    )


def interpolated(length: float, known: Iterable[PassTimes]) -> PassTimes:
    """Round times interpolated to a mean draft length."""
    *columns, lengths = zip(*sorted(known, key=lambda times: times.length), strict=True)
    return PassTimes(
        *(float(numpy.interp(length, lengths, column)) for column in (*columns, lengths))
    )


@torch.inference_mode()
def agreement(
    loaded: Decoder,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    exit_layers: Sequence[int],
    weights: Quantization | None = None,
) -> dict[int, list[int]]:
    """Each exit's greedy choice at each output position; approximate for low-bit copies, which see
    their own KV entries.
    """
    model = loaded.backend
    drafting = loaded.backend.draft_sides[weights]
    ids = [*prompt_ids, *output_ids]
    first = len(prompt_ids) - 1
    tokens = torch.tensor(ids[:-1], device=model.device)
    cache = model.new_cache(1, len(ids))
    exits = sorted(set(exit_layers))
    blocks = {
        exit_layer: block
        for exit_layer, block in drafting.exit_blocks.items()
        if exit_layer in exits
    }
    if first:
        places = cache.span(0, first)
        states = states_at(model, model.embed(tokens[:first]), exits, places)
        for stop in blocks:
            model.exit_blocks[stop].write(model, states, None, places)
    choices = dict[int, list[int]]()
    places = cache.span(first, len(tokens))
    states = states_at(drafting.layers, drafting.layers.embed(tokens[first:]), exits, places)
    for stop, hidden in states.items():
        submodel = Submodel(stop, block=blocks.get(stop))
        logits, _ = beyond_exit(drafting, submodel, hidden, places, None)
        choices[stop] = drafting.head(submodel).choose(logits).tolist()
    return choices


def simulate(
    choices: Sequence[int],
    output: Sequence[int],
    num_draft_tokens: int,
    room: int,
    eos_ids: frozenset[int],
) -> DecodeStats:
    """The rounds of greedy self-speculation that produce `output`, of at most `room` tokens, given
    `agreement`'s choices.

    Drafts after a wrong one are unknown; they are assumed to stop where the output ends.
    """
    # The first token comes from the prefill
    position = 1
    plain = 0
    drafted = accepted = rounds = 0
    while position < len(output):
        count = min(num_draft_tokens, room - position - 1)
        if output[-1] in eos_ids:
            count = min(count, len(output) - position)
        if count == 0:
            plain += 1
            position += 1
            continue
        right = 0
        while (
            right < count
            and position + right < len(output)
            and choices[position + right] == output[position + right]
        ):
            right += 1
            if output[position + right - 1] in eos_ids:
                count = right
        if (
            right < count
            and position + right < len(choices)
            and choices[position + right] in eos_ids
        ):
            count = right + 1
        new = min(right + 1, len(output) - position)
        drafted = drafted + count
        accepted = accepted + right
        rounds = rounds + 1
        position = position + new
    return DecodeStats(
        drafted=drafted, accepted=accepted, rounds=rounds, steps_by_drafter={"plain": plain}
    )


class Prediction(NamedTuple):
    """The prediction for one setting; `speedup` is over the plain steps timed with it."""

    times: PassTimes
    speedup: float


def prediction_of(
    rounds: DecodeStats, times: PassTimes, prefill: float, tokens: int, answers: int
) -> Prediction:
    """prefill + drafts * t_draft(E) + rounds * t_verify(E, d) + plain steps * t_plain, for `tokens`
    of several answers.
    """
    seconds = prefill + rounds.drafted * times.draft + rounds.rounds * (times.verify + times.other)
    seconds += rounds.steps_by_drafter.get("plain", 0) * times.plain
    return Prediction(times, (prefill + (tokens - answers) * times.plain) / seconds)


def predict(
    loaded: Decoder,
    examples: Sequence[Example],
    settings: Sequence[DecodingConfig],
    plain: DecodingConfig,
) -> Generator[
    Progress, None, tuple[dict[DecodingConfig, Prediction], dict[Side, float], list[int]]
]:
    """Decodes every prompt once by `plain`, greedily, and times rounds of each setting along a few
    answers. Yields progress.

    Up to three draft lengths per drafter are timed, others interpolated. Returns predictions, the
    agreement of each drafter, and the context of a typical step. Raises LayerSkipError when no
    prompt could be answered.
    """
    total = len(examples) + _MOST
    plain = replace(plain, temperature=0.0)
    agreeing = Counter[Side]()
    rounds = dict.fromkeys(settings, DecodeStats())
    measure_prompt(loaded, examples[0].prompt, plain)  # warm-up
    outputs: list[Output] = []
    answered: list[tuple[list[int], Output]] = []  # (prompt ids, output)
    for number, example in enumerate(examples, start=1):
        outputs.append(output := measure_prompt(loaded, example.prompt, plain))
        if output.error is None:
            prompt_ids = loaded.encode_prompt(example.prompt)
            answered.append((prompt_ids, output))
            choices: dict[Side, list[int]] = {}
            for weights, sides in groupby(
                dict.fromkeys(map(side_of, settings)), key=lambda side: side[0]
            ):
                by_exit = agreement(
                    loaded, prompt_ids, output.ids, [exit_layer for _, exit_layer in sides], weights
                )
                choices |= {(weights, exit_layer): chosen for exit_layer, chosen in by_exit.items()}
            agreeing.update(
                {side: sum(map(eq, chosen, output.ids)) for side, chosen in choices.items()}
            )
            room = min(plain.max_new_tokens, loaded.backend.spec.context - len(prompt_ids))
            for setting in settings:
                drafted = choices[side_of(setting)]
                ends = loaded.ends(plain.stop)
                rounds[setting] += simulate(
                    drafted, output.ids, setting.num_draft_tokens, room, ends
                )
        yield Progress(number, total, "prediction", comparing=True)
    require_outputs(outputs)
    # Ordered from the median length of prompt and answer outwards.
    by_length = enumerate(sorted(answered, key=lambda pair: len(pair[0]) + len(pair[1].ids)))
    typical = [
        pair
        for _, pair in sorted(by_length, key=lambda numbered: abs(numbered[0] - len(answered) // 2))
    ]
    visits = list[dict[DecodingConfig, PassTimes]]()
    alike = [list(group) for _, group in groupby(settings, key=side_of)]
    to_time = [
        group[place] for group in alike for place in sorted({0, len(group) // 2, len(group) - 1})
    ]
    for timed in timed_visits(loaded, _parts(loaded, typical, to_time), to_time):
        visits.append(timed)
        yield Progress(len(examples) + len(visits), total, "prediction", comparing=True)
    if len(visits) < _MOST:
        yield Progress(total, total, "prediction", comparing=True)
    tokens = sum(len(output.ids) for _, output in answered)
    prefill = sum(output.steps[0].seconds for _, output in answered)
    known = dict[Side, list[PassTimes]]()
    answers = len(answered)
    for setting in dict.fromkeys(chain.from_iterable(visits)):
        known.setdefault(side_of(setting), []).append(
            averages([timed[setting] for timed in visits if setting in timed])
        )
    predictions = {
        setting: prediction_of(
            stats,
            interpolated(stats.drafted / max(stats.rounds, 1), known[side]),
            prefill,
            tokens,
            answers,
        )
        for setting, stats in rounds.items()
        if (side := side_of(setting)) in known
    }
    prompt_ids, output = typical[0]
    context = [*prompt_ids, *output.ids[: len(output.ids) // 2]]  # of the answer's middle step
    return predictions, {side: count / tokens for side, count in agreeing.items()}, context


def _parts(
    loaded: Decoder,
    answered: Sequence[tuple[list[int], Output]],
    settings: Sequence[DecodingConfig],
) -> Iterator[Part]:
    """The answers in turn, until enough time has passed; long enough for two rounds of the longest
    drafts.
    """
    steps = max([_STEPS, *(2 * setting.num_draft_tokens for setting in settings)])
    started = time.perf_counter()
    for visit in range(_MOST):
        if visit < _FEWEST or time.perf_counter() - started < _SECONDS:
            prompt_ids, output = answered[visit % len(answered)]
            yield timed_part(loaded, prompt_ids, output.ids, steps)


def draft_profile(
    loaded: Decoder, results: Sequence[Result], packing: PackingConfig, context: Sequence[int]
) -> DraftProfile:
    """Acceptance and draft times of rows that drafted by an exit or a copy, and pass times after
    `context`.
    """
    acceptance: dict[str, float] = {}
    drafts: dict[str, float] = {}
    for result in results:  # of several draft lengths the last one counts, which is the longest
        if result.strategy == "self-speculative" and result.exit_layer is not None:
            name = drafter_name(result.draft_weights, result.exit_layer, loaded.backend.num_layers)
            # Each position weighted by the share of rounds that reach it
            if by_position := result.acceptance_by_position:
                *tested, _ = survival = list(accumulate(by_position, mul, initial=1.0))
                acceptance[name] = sum(survival[1:]) / sum(tested)
            if result.pass_times_ms:
                drafts[name] = result.pass_times_ms["draft"]
    return DraftProfile(
        acceptance, _times_by_rows(loaded, context), drafts, packing.draft_head, packing.draft_vocab
    )


@torch.inference_mode()
def _times_by_rows(loaded: Decoder, context: Sequence[int]) -> tuple[float, ...]:
    """Median milliseconds of a target pass for each number of rows, after as much of the context as
    leaves room.
    """
    backend = loaded.backend
    before = context[: max(backend.spec.context - _ROWS, 0)]
    if not before:
        return ()
    start = len(before)
    end = len(before) + _ROWS
    cache = backend.new_cache(1, end)
    ids = torch.tensor(before, device=backend.device)
    backend.run_layers(backend.embed(ids), 0, backend.num_layers, cache.span(0, start))
    times: list[list[float]] = [[] for _ in range(_ROWS)]
    for _ in range(_TIMES + 1):
        for rows in range(1, _ROWS + 1):
            places = cache.span(start, start + rows)
            started = time.perf_counter()
            hidden = backend.run_layers(
                backend.embed(ids[-1:].expand(rows)), 0, backend.num_layers, places
            )
            most_probable(backend.unembed(hidden)).tolist()  # waits for the device
            times[rows - 1].append(1000 * (time.perf_counter() - started))
    return tuple(median(of_rows[1:]) for of_rows in times)
