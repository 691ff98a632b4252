"""Predicts the speed of settings that draft from their acceptance and from the time of each kind of forward pass."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import eq
from typing import NamedTuple

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...config.packing import Quantization
from ...data.examples import Example
from ...decoding import DecodeStats
from ...model.backend import Submodel
from ...model.drafting import beyond_exit
from ...model.exit_blocks import features_of
from ..outputs import Output, require_outputs
from .measure import Progress, measure_prompt
from .pass_times import PassTimes, Side, TimedPart, averages, side_of, timed_part, timed_visits

# Each setting is timed along several answers, so that a slow moment of the machine does not hit one setting alone: as many as
# about so many seconds allow, because the times of short passes vary more.
_FEWEST, _MOST, _SECONDS = 3, 12, 10.0


class Prediction(NamedTuple):
    """The prediction for one setting; `speedup` is over the plain steps timed with it, whatever the machine's speed later."""

    rounds: DecodeStats
    times: PassTimes
    tokens_per_second: float
    speedup: float


@dataclass(frozen=True)
class Predictions:
    """Predictions by setting.

    `agreement`: for each exit and copy, the share of the autoregressive tokens that it would also have chosen. `context`: the
    tokens before the passes that were timed.
    """

    agreement: dict[Side, float]
    settings: dict[DecodingConfig, Prediction]
    context: list[int]


def predict(
    loaded: Decoder, examples: Sequence[Example], settings: Sequence[DecodingConfig], plain: DecodingConfig
) -> Generator[Progress, None, Predictions]:
    """Decodes every prompt once by `plain`, greedily, and times rounds of each setting along a few answers. Yields progress.

    Settings that draft with the same layers stand together. Raises LayerSkipError when no prompt could be answered.
    """
    total, plain, ends = len(examples) + _MOST, replace(plain, temperature=0.0), loaded.ends(plain.stop)
    rounds, agreeing = dict.fromkeys(settings, DecodeStats()), dict.fromkeys(map(side_of, settings), 0)
    exits: dict[Quantization | None, list[int]] = {}
    for weights, exit_layer in agreeing:
        exits.setdefault(weights, []).append(exit_layer)
    measure_prompt(loaded, examples[0].prompt, plain)  # warm-up
    outputs: list[Output] = []
    answered: list[tuple[list[int], Output]] = []  # with the prompt's tokens
    for number, example in enumerate(examples, start=1):
        outputs.append(output := measure_prompt(loaded, example.prompt, plain))
        if output.error is None:
            prompt_ids = loaded.encode_prompt(example.prompt)
            answered.append((prompt_ids, output))
            room = min(plain.max_new_tokens, loaded.backend.max_positions - len(prompt_ids))
            choices: dict[Side, list[int]] = {}
            for weights, layers in exits.items():
                found = agreement(loaded, prompt_ids, output.ids, layers, weights)
                choices |= {(weights, exit_layer): chosen for exit_layer, chosen in found.items()}
            for side, chosen in choices.items():
                agreeing[side] += sum(map(eq, chosen, output.ids))
            for setting in settings:
                rounds[setting] += simulate(choices[side_of(setting)], output.ids, setting.num_draft_tokens, room, ends)
        yield Progress(number, total, "prediction")
    require_outputs(outputs)
    # From the answer of median length with its prompt to the longest and the shortest.
    by_length = enumerate(sorted(answered, key=lambda pair: len(pair[0]) + len(pair[1].ids)))
    typical = [pair for _, pair in sorted(by_length, key=lambda numbered: abs(numbered[0] - len(answered) // 2))]
    times: dict[DecodingConfig, list[PassTimes]] = {setting: [] for setting in settings}
    for number, timed in enumerate(timed_visits(loaded, _parts(loaded, typical), settings), start=len(examples) + 1):
        for setting, passes in timed.items():
            times[setting].append(passes)
        yield Progress(number, total, "prediction")
    if number < total:
        yield Progress(total, total, "prediction")
    tokens, prefill = sum(len(output.ids) for _, output in answered), sum(output.steps[0].seconds for _, output in answered)
    predictions = {
        setting: prediction_of(rounds[setting], averages(passes), prefill, tokens, len(answered))
        for setting, passes in times.items()
        if passes
    }
    prompt_ids, output = typical[0]
    context = [*prompt_ids, *output.ids[: len(output.ids) // 2]]  # the average one of its steps
    return Predictions({side: count / tokens for side, count in agreeing.items()}, predictions, context)


def _parts(loaded: Decoder, answered: Sequence[tuple[list[int], Output]]) -> Iterator[TimedPart]:
    """The answers in turn, until enough time has passed."""
    started = time.perf_counter()
    for visit in range(_MOST):
        if visit < _FEWEST or time.perf_counter() - started < _SECONDS:
            prompt_ids, output = answered[visit % len(answered)]
            yield timed_part(loaded, prompt_ids, output.ids)


@torch.inference_mode()
def agreement(
    loaded: Decoder,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    exit_layers: Sequence[int],
    weights: Quantization | None = None,
) -> dict[int, list[int]]:
    """For each exit, its greedy choice at each position of the output, given the prompt and the output before it.

    One pass over an output serves all exits: greedy drafts are compared only after accepted ones, so the context of a compared
    draft is always the autoregressive output. For low-bit drafts (`weights`) this is an approximation: in the loop they attend
    to the target's keys and values of the prompt and of earlier rounds, here to the target's of the prompt and else to their
    own. So it is for exit blocks with a feature: here every draft has the target's own, in the loop the first of a round.
    """
    model, drafting = loaded.backend, loaded.backend.draft_sides[weights]
    ids, first = [*prompt_ids, *output_ids], len(prompt_ids) - 1
    tokens = torch.tensor([ids[:-1]], device=model.device)
    positions = torch.arange(len(ids) - 1)[None]
    cache, choices, features = model.new_cache(1, len(ids)), {}, None
    exits = sorted(set(exit_layers))
    blocks = {exit_layer: block for exit_layer, block in drafting.exit_blocks.items() if exit_layer in exits}
    if not all(block.stands_alone for block in blocks.values()):
        finals = model.normed(model.run_layers(model.embed(tokens), 0, model.num_layers, positions, cache))
        features = features_of(finals)
    if first:
        hidden = model.embed(tokens[:, :first])
        for start, stop in pairwise([0, *exits]):
            hidden = model.run_layers(hidden, start, stop, positions[:, :first], cache)
            if stop in blocks:
                block, before = model.exit_blocks[stop], None if features is None else features[:, :first]
                model.write_kv(block.enter(hidden, before), block.layer, block.layer + 1, positions[:, :first], cache)
    after = None if features is None else features[:, first:]
    hidden = drafting.embed(tokens[:, first:])
    for start, stop in pairwise([0, *exits]):
        hidden = drafting.run_layers(hidden, start, stop, positions[:, first:], cache)
        submodel = Submodel(stop, block=blocks.get(stop))
        logits, _ = beyond_exit(drafting, submodel, hidden, positions[:, first:], cache, after)
        chosen = logits.argmax(-1)[0]
        choices[stop] = (chosen if drafting.vocabulary is None else drafting.vocabulary.tokens(chosen)).tolist()
    return choices


def simulate(
    choices: Sequence[int], output: Sequence[int], num_draft_tokens: int, room: int, eos_ids: frozenset[int]
) -> DecodeStats:
    """The rounds of greedy self-speculation that produce `output`, of at most `room` tokens; `choices` are `agreement`'s.

    Exact with one exception: the drafts after a wrong one are unknown, and an EOS among them would end the round early. They
    are assumed to end where the output ends.
    """
    position, plain = 1, 0  # the first token comes from the prefill
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
        while right < count and position + right < len(output) and choices[position + right] == output[position + right]:
            right += 1
            if output[position + right - 1] in eos_ids:
                count = right
        if right < count and position + right < len(choices) and choices[position + right] in eos_ids:
            count = right + 1
        new = min(right + 1, len(output) - position)
        drafted, accepted, rounds, position = drafted + count, accepted + right, rounds + 1, position + new
    return DecodeStats(drafted=drafted, accepted=accepted, rounds=rounds, steps_by_drafter={"plain": plain})


def prediction_of(rounds: DecodeStats, times: PassTimes, prefill: float, tokens: int, answers: int) -> Prediction:
    """For `tokens` of several answers, of which `prefill` seconds gave the first one each.

    Time = prefill + drafts * t_draft(E) + rounds * t_verify(E, d) + plain steps * t_plain.
    """
    seconds = prefill + rounds.drafted * times.draft + rounds.rounds * (times.verify + times.other)
    seconds += rounds.steps_by_drafter.get("plain", 0) * times.plain
    return Prediction(rounds, times, tokens / seconds, (prefill + (tokens - answers) * times.plain) / seconds)
