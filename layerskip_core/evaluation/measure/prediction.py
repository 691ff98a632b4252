"""Predicts the speed of settings: from the choices of exits along plain answers, and from the
times of passes.
"""

import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...config.model import Quantization
from ...data import Example
from ...decoding import DecodeStats
from ...model.backend import Submodel, beyond_exit, states_at
from ..results import Output, require_outputs
from .measuring import Progress, measure_prompt
from .passes import (
    STEPS_TIMED,
    DraftLayers,
    Part,
    PassTimes,
    Visit,
    averages,
    draft_layers,
    interpolated,
    timed_part,
    timed_visits,
)

# Answers along which every setting is timed; more, within about 10 s, if passes are short, because
# their times vary more.
_FEWEST = 3
_MOST = 12
_SECONDS = 10.0


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
    agreement: dict[DraftLayers, float]
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
    agreeing = Counter[DraftLayers]()
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
                    choices[draft_layers(setting)],
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
        if draft_layers(setting) in known:
            length = stats.drafted / max(stats.rounds, 1)
            times[setting] = interpolated(length, known[draft_layers(setting)])
            speedups[setting] = predicted_speedup(
                stats, times[setting], prefill, tokens, len(answers)
            )
    shares = {side: count / tokens for side, count in agreeing.items()}
    ids = typical[0].output.ids
    middle = [*typical[0].prompt_ids, *ids[: len(ids) // 2]]
    return Predictions(speedups, times, shares, middle)


def _choices(
    loaded: Decoder, answer: _Answer, settings: Sequence[DecodingConfig]
) -> dict[DraftLayers, list[int]]:
    """The choices of each drafter along an answer: all exits of a copy in one pass."""
    exits: dict[Quantization | None, list[int]] = {}
    for weights, exit_layer in dict.fromkeys(map(draft_layers, settings)):
        exits.setdefault(weights, []).append(exit_layer)
    choices: dict[DraftLayers, list[int]] = {}
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
    for _, of_drafter in groupby(settings, key=draft_layers):
        group = list(of_drafter)
        for place in sorted({0, len(group) // 2, len(group) - 1}):
            chosen.append(group[place])
    return chosen


def _times_by_side(visits: Sequence[Visit]) -> dict[DraftLayers, list[PassTimes]]:
    """For each drafter, the averages of each of its timed settings."""
    of_settings: dict[DecodingConfig, list[PassTimes]] = {}
    for visit in visits:
        for setting, times in visit.items():
            of_settings.setdefault(setting, []).append(times)
    by_side: dict[DraftLayers, list[PassTimes]] = {}
    for setting, all_times in of_settings.items():
        by_side.setdefault(draft_layers(setting), []).append(averages(all_times))
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
            steps = max(STEPS_TIMED, 2 * longest)
            yield timed_part(loaded, answer.prompt_ids, answer.output.ids, steps)
