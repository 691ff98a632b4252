"""Predicts the speed of settings from their acceptance and the time of each kind of pass, measured
along answers.
"""

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, islice
from statistics import fmean, median

import numpy
import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig, DraftProfile
from ...config.model import PackingConfig, Quantization
from ...data import Example
from ...decoding import DecodeStats, decode
from ...decoding.drafters.submodel import drafter_name
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
# Of the sum that the memory's bandwidth is compared with
_SUMS = 5  # how many are timed
_MOST_SUMMED = 1 << 30  # bytes
_ROWS = 17  # of the longest pass timed for adaptive drafting
_TIMES = 5  # timed passes per number of rows

Side = tuple[Quantization | None, int]
"""The drafter: its weights (None: the model's own) and number of layers."""


def side_of(setting: DecodingConfig) -> Side:
    """The drafter of self-speculative decoding, or the layers of an early exit; 0 layers for other
    strategies.
    """
    return setting.draft_weights, setting.exit_layer or 0


@dataclass(frozen=True)
class PassTimes:
    """Seconds on this machine."""

    draft: float  # one draft token: layers 0..E-1 and the head
    # A round's verification, with layers 0..E-1 for the last draft, or for all tokens after low-bit
    # drafts
    verify: float
    other: float  # the rest of a round
    plain: float  # an autoregressive step, timed next to the rounds
    length: float = 0.0  # the mean number of drafts in these rounds

    @property
    def milliseconds(self) -> dict[str, float]:
        """For reports, without the length."""
        names = ("draft", "verify", "other", "plain")
        return {name: 1000 * getattr(self, name) for name in names}


@dataclass(frozen=True)
class Part:
    """What passes are timed along: `limit` tokens of an answer after these ids."""

    ids: list[int]
    limit: int


def timed_part(
    loaded: Decoder, prompt_ids: Sequence[int], output_ids: Sequence[int], steps: int = _STEPS
) -> Part:
    """The whole answer, or its middle `steps` tokens. The limit has one more, so that the last can
    be a draft.
    """
    start = max(0, (len(output_ids) - steps) // 2)
    ids = [*prompt_ids, *output_ids[:start]]
    in_context = loaded.backend.spec.context - len(ids)
    return Part(ids, max(1, min(len(output_ids) - start + 1, in_context)))


@dataclass(frozen=True)
class _TimedStep:
    """A step after the prefill: its drafts, and seconds."""

    drafted: int
    draft: float
    verify: float
    total: float


def pass_times(
    loaded: Decoder, part: Part, setting: DecodingConfig, plain: float
) -> PassTimes | None:
    """Mean pass times of greedy rounds along an answer (None: no round fits). `plain`: the mean
    autoregressive step.
    """
    most = max(_FEWEST_ROUNDS, min(_ROUNDS, _DRAFTS // setting.num_draft_tokens))
    rounds = [step for step in _timed_steps(loaded, part, setting, most) if step.drafted]
    if not rounds:
        return None
    drafted = sum(step.drafted for step in rounds)
    return PassTimes(
        draft=sum(step.draft for step in rounds) / drafted,
        verify=fmean(step.verify for step in rounds),
        other=fmean(step.total - step.draft - step.verify for step in rounds),
        plain=plain,
        length=drafted / len(rounds),
    )


def _timed_steps(
    loaded: Decoder, part: Part, setting: DecodingConfig, most: int
) -> list[_TimedStep]:
    greedy = replace(setting, max_new_tokens=part.limit, stop=(), temperature=0.0, lookup=0)
    # The answer's end is known, so EOS ids are not needed
    decoding = decode(loaded.backend, part.ids, greedy)
    steps = []
    before = DecodeStats()
    started = time.perf_counter()
    for _ in islice(decoding, 1 + most):
        total = time.perf_counter() - started
        now = decoding.stats
        steps.append(
            _TimedStep(
                now.drafted - before.drafted,
                now.draft_seconds - before.draft_seconds,
                now.verify_seconds - before.verify_seconds,
                total,
            )
        )
        before = now
        started = time.perf_counter()
    return steps[1:]  # without the prefill


def plain_step(loaded: Decoder) -> float:
    """Seconds of a plain step: the mean of a few after a short prompt."""
    part = Part(loaded.encode_prompt("a"), _FEW_STEPS)
    steps = _timed_steps(loaded, part, DecodingConfig("autoregressive"), _FEW_STEPS)
    return fmean(step.total for step in steps)


def speed_of(loaded: Decoder, stats: DecodeStats) -> float:
    """Estimated speedup of rounds with drafts over a few timed steps of plain decoding."""
    tokens = stats.accepted + stats.rounds
    return plain_step(loaded) * tokens / (stats.draft_seconds + stats.verify_seconds)


def bandwidth(loaded: Decoder, step: float, positions: float = 0.0) -> dict[str, float]:
    """Bytes that a plain step reads (weights, KV entries of `positions`); bytes per second of it,
    and of a sum over as many.
    """
    total = _bytes_read(loaded, positions)
    memory = torch.ones(int(min(total, _MOST_SUMMED)) // 4 + 1, device=loaded.backend.device)
    times = []
    for _ in range(_SUMS):
        started = time.perf_counter()
        memory.sum().item()
        times.append(time.perf_counter() - started)
    return {
        "bytes_per_token": total,
        "bytes_per_second": total / step,
        "sum_bytes_per_second": 4 * len(memory) / min(times),
    }


def _bytes_read(loaded: Decoder, positions: float) -> float:
    backend = loaded.backend
    spec = backend.spec
    width = float(backend.dtype.itemsize)
    stored = width
    for name, size in _STORED.items():
        if name in backend.implementation.partition(")")[0]:
            stored = size
    # Our own kernels count what they read
    total = float(getattr(backend, "bytes_read", stored * spec.weights_read(1)))
    if isinstance(spec, ModelSpec):  # other specs do not know the KV entries of a layer
        for layer, kind in enumerate(spec.kinds):
            if kind in LAYER_KINDS:
                seen = min(positions, spec.window_of(kind) or positions)
                total += 2 * width * spec.of_layer(layer).keys * seen
    return total


Visit = dict[DecodingConfig, PassTimes]
"""The pass times of the settings along one answer."""


def timed_visits(
    loaded: Decoder, parts: Iterable[Part], settings: Sequence[DecodingConfig]
) -> Iterator[Visit]:
    """Times rounds of each setting along each part that has room for them, and plain steps next to
    each drafter's.
    """
    for number, part in enumerate(parts):
        timed: Visit = {}
        # There and back, so that no drafter is always the first
        ordered = settings[::-1] if number % 2 else settings
        for _, of_drafter in groupby(ordered, key=side_of):
            steps = _timed_steps(loaded, part, DecodingConfig("autoregressive"), _STEPS)
            if not steps:  # an answer of one token
                continue
            plain = fmean(step.total for step in steps)
            for setting in of_drafter:
                times = pass_times(loaded, part, setting, plain)
                if times is not None:
                    timed[setting] = times
        if timed:
            # One plain step for all: its noise must not rank drafters
            plain = fmean(each.plain for each in timed.values())
            timed = {setting: replace(times, plain=plain) for setting, times in timed.items()}
        yield timed


def averages(times: Sequence[PassTimes]) -> PassTimes:
    """Trimmed means, without the lowest and highest tenth. Medians would overestimate speed: a few
    rounds take much longer.
    """
    left_out = len(times) // 10
    means = {}
    for field in fields(PassTimes):
        seconds = sorted(getattr(each, field.name) for each in times)
        means[field.name] = fmean(seconds[left_out : len(seconds) - left_out])
    return PassTimes(**means)


def interpolated(length: float, known: Iterable[PassTimes]) -> PassTimes:
    """Round times interpolated to a mean draft length."""
    ordered = sorted(known, key=lambda times: times.length)
    lengths = [times.length for times in ordered]
    values = {}
    for field in fields(PassTimes):
        column = [getattr(times, field.name) for times in ordered]
        values[field.name] = float(numpy.interp(length, lengths, column))
    return PassTimes(**values)


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
    blocks = {}
    for exit_layer, block in drafting.exit_blocks.items():
        if exit_layer in exits:
            blocks[exit_layer] = block
    if first:
        # The prompt runs on the model's own weights, as when a copy drafts
        places = cache.span(0, first)
        states = states_at(model, model.embed(tokens[:first]), exits, places)
        for exit_layer in blocks:
            model.exit_blocks[exit_layer].write(model, states, None, places)
    choices = dict[int, list[int]]()
    places = cache.span(first, len(tokens))
    states = states_at(drafting.layers, drafting.layers.embed(tokens[first:]), exits, places)
    for exit_layer, hidden in states.items():
        submodel = Submodel(exit_layer, block=blocks.get(exit_layer))
        logits, _ = beyond_exit(drafting, submodel, hidden, places, None)
        choices[exit_layer] = drafting.head(submodel).choose(logits).tolist()
    return choices


def simulate(
    choices: Sequence[int],
    output: Sequence[int],
    num_draft_tokens: int,
    most_tokens: int,
    eos_ids: frozenset[int],
) -> DecodeStats:
    """The rounds of greedy self-speculation that produce `output`, limited to `most_tokens`, given
    `agreement`'s choices.

    Drafts after a wrong one are unknown; they are assumed to stop where the output ends.
    """
    position = 1  # the first token comes from the prefill
    plain = 0
    drafted = 0
    accepted = 0
    rounds = 0
    while position < len(output):
        count = min(num_draft_tokens, most_tokens - position - 1)
        if output[-1] in eos_ids:
            count = min(count, len(output) - position)
        if count == 0:
            plain += 1
            position += 1
            continue
        right = 0
        rest = len(output) - position
        while right < min(count, rest) and choices[position + right] == output[position + right]:
            right += 1
            if output[position + right - 1] in eos_ids:
                count = right  # drafting ends there
        wrong = position + right
        if right < count and wrong < len(choices) and choices[wrong] in eos_ids:
            count = right + 1
        drafted += count
        accepted += right
        rounds += 1
        position += min(right + 1, rest)
    return DecodeStats(
        drafted=drafted, accepted=accepted, rounds=rounds, steps_by_drafter={"plain": plain}
    )


@dataclass(frozen=True)
class Predictions:
    """What was predicted, by setting; `speedups` are over the plain steps timed with them."""

    speedups: dict[DecodingConfig, float]
    times: dict[DecodingConfig, PassTimes]
    # The share of plain tokens that each drafter would choose too
    agreement: dict[Side, float]
    context: list[int]  # of a typical step


def predicted_speedup(
    rounds: DecodeStats, times: PassTimes, prefill: float, tokens: int, answers: int
) -> float:
    """prefill + drafts * t_draft(E) + rounds * t_verify(E, d) + plain steps * t_plain, for `tokens`
    of several answers, against plain steps alone.
    """
    seconds = prefill + rounds.drafted * times.draft + rounds.rounds * (times.verify + times.other)
    seconds += rounds.steps_by_drafter.get("plain", 0) * times.plain
    return (prefill + (tokens - answers) * times.plain) / seconds


@dataclass(frozen=True)
class _Answer:
    """A prompt and its output by plain decoding."""

    prompt_ids: list[int]
    output: Output


def predict(
    loaded: Decoder,
    examples: Sequence[Example],
    settings: Sequence[DecodingConfig],
    plain: DecodingConfig,
) -> Generator[Progress, None, Predictions]:
    """Decodes every prompt once by `plain`, greedily, and times rounds of each setting along a few
    answers. Yields progress.

    Up to three draft lengths per drafter are timed, others interpolated. Raises LayerSkipError when
    no prompt could be answered.
    """
    total = len(examples) + _MOST
    plain = replace(plain, temperature=0.0)
    agreeing = Counter[Side]()
    rounds = dict.fromkeys(settings, DecodeStats())
    measure_prompt(loaded, examples[0].prompt, plain)  # warm-up
    outputs: list[Output] = []
    answers: list[_Answer] = []
    for example in examples:
        output = measure_prompt(loaded, example.prompt, plain)
        outputs.append(output)
        if output.error is None:
            answer = _Answer(loaded.encode_prompt(example.prompt), output)
            answers.append(answer)
            choices = _choices(loaded, answer, settings)
            for side, chosen in choices.items():
                pairs = zip(chosen, output.ids, strict=True)
                agreeing[side] += sum(own == other for own, other in pairs)
            context = loaded.backend.spec.context - len(answer.prompt_ids)
            most = min(plain.max_new_tokens, context)
            for setting in settings:
                rounds[setting] += simulate(
                    choices[side_of(setting)],
                    output.ids,
                    setting.num_draft_tokens,
                    most,
                    loaded.ends(plain.stop),
                )
        yield Progress(len(outputs), total, "prediction", comparing=True)
    require_outputs(outputs)
    typical = _typical_first(answers)
    visits: list[Visit] = []
    to_time = _lengths_to_time(settings)
    for timed in timed_visits(loaded, _parts(loaded, typical, to_time), to_time):
        visits.append(timed)
        yield Progress(len(examples) + len(visits), total, "prediction", comparing=True)
    if len(visits) < _MOST:
        yield Progress(total, total, "prediction", comparing=True)

    tokens = sum(len(answer.output.ids) for answer in answers)
    prefill = sum(answer.output.steps[0].seconds for answer in answers)
    known = _times_by_side(visits)
    speedups = {}
    times = {}
    for setting, stats in rounds.items():
        if side_of(setting) in known:
            length = stats.drafted / max(stats.rounds, 1)
            times[setting] = interpolated(length, known[side_of(setting)])
            speedups[setting] = predicted_speedup(
                stats, times[setting], prefill, tokens, len(answers)
            )
    shares = {side: count / tokens for side, count in agreeing.items()}
    ids = typical[0].output.ids
    middle = [*typical[0].prompt_ids, *ids[: len(ids) // 2]]
    return Predictions(speedups, times, shares, middle)


def _choices(
    loaded: Decoder, answer: _Answer, settings: Sequence[DecodingConfig]
) -> dict[Side, list[int]]:
    """The choices of each drafter along an answer: all exits of a copy in one pass."""
    exits: dict[Quantization | None, list[int]] = {}
    for weights, exit_layer in dict.fromkeys(map(side_of, settings)):
        exits.setdefault(weights, []).append(exit_layer)
    choices: dict[Side, list[int]] = {}
    for weights, exit_layers in exits.items():
        by_exit = agreement(loaded, answer.prompt_ids, answer.output.ids, exit_layers, weights)
        for exit_layer, chosen in by_exit.items():
            choices[weights, exit_layer] = chosen
    return choices


def _typical_first(answers: Sequence[_Answer]) -> list[_Answer]:
    """Ordered from the median length of prompt and answer outwards."""
    ordered = sorted(answers, key=lambda each: len(each.prompt_ids) + len(each.output.ids))
    middle = len(ordered) // 2
    outwards = sorted(range(len(ordered)), key=lambda place: abs(place - middle))
    return [ordered[place] for place in outwards]


def _lengths_to_time(settings: Sequence[DecodingConfig]) -> list[DecodingConfig]:
    """The shortest, middle and longest drafts of each drafter."""
    chosen = []
    for _, of_drafter in groupby(settings, key=side_of):
        group = list(of_drafter)
        for place in sorted({0, len(group) // 2, len(group) - 1}):
            chosen.append(group[place])
    return chosen


def _times_by_side(visits: Sequence[Visit]) -> dict[Side, list[PassTimes]]:
    """For each drafter, the averages of each of its timed settings."""
    of_settings: dict[DecodingConfig, list[PassTimes]] = {}
    for visit in visits:
        for setting, times in visit.items():
            of_settings.setdefault(setting, []).append(times)
    by_side: dict[Side, list[PassTimes]] = {}
    for setting, all_times in of_settings.items():
        by_side.setdefault(side_of(setting), []).append(averages(all_times))
    return by_side


def _parts(
    loaded: Decoder, answers: Sequence[_Answer], settings: Sequence[DecodingConfig]
) -> Iterator[Part]:
    """The answers in turn, until enough time has passed; long enough for two rounds of the longest
    drafts.
    """
    longest = max((setting.num_draft_tokens for setting in settings), default=0)
    started = time.perf_counter()
    for visit in range(_MOST):
        if visit < _FEWEST or time.perf_counter() - started < _SECONDS:
            answer = answers[visit % len(answers)]
            steps = max(_STEPS, 2 * longest)
            yield timed_part(loaded, answer.prompt_ids, answer.output.ids, steps)


def draft_profile(
    loaded: Decoder, results: Sequence[Result], packing: PackingConfig, context: Sequence[int]
) -> DraftProfile:
    """Acceptance and draft times of rows that drafted by an exit or a copy, and pass times after
    `context`.
    """
    acceptance: dict[str, float] = {}
    drafts: dict[str, float] = {}
    for result in results:  # of several draft lengths the last one counts, which is the longest
        if result.strategy != "self-speculative" or result.exit_layer is None:
            continue
        name = drafter_name(result.draft_weights, result.exit_layer, loaded.backend.num_layers)
        if result.acceptance_by_position:
            acceptance[name] = _mean_acceptance(result.acceptance_by_position)
        if result.pass_times_ms:
            drafts[name] = result.pass_times_ms["draft"]
    passes = _times_by_rows(loaded, context)
    return DraftProfile(acceptance, passes, drafts, packing.draft_head, packing.draft_vocab)


def _mean_acceptance(by_position: Sequence[float]) -> float:
    """Each position weighted by the share of rounds that reach it."""
    reaching = 1.0
    tested = 0.0
    accepted = 0.0
    for share in by_position:
        tested += reaching
        reaching *= share
        accepted += reaching
    return accepted / tested


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
    for _ in range(_TIMES + 1):  # the first is a warm-up
        for rows in range(1, _ROWS + 1):
            places = cache.span(start, start + rows)
            started = time.perf_counter()
            hidden = backend.run_layers(
                backend.embed(ids[-1:].expand(rows)), 0, backend.num_layers, places
            )
            most_probable(backend.unembed(hidden)).tolist()  # waits for the device
            times[rows - 1].append(1000 * (time.perf_counter() - started))
    return tuple(median(of_rows[1:]) for of_rows in times)
