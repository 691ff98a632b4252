"""Predicts the speed of settings that draft from their acceptance and from the time of each kind of forward pass."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from statistics import fmean
from typing import NamedTuple

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...config.packing import Quantization
from ...data.examples import Example
from ...model.backend import Submodel
from ...model.drafting import beyond_exit
from ...model.exit_blocks import features_of
from ..outputs import Output, Outputs, require_outputs
from .pass_times import PassTimes, Stretch, averages, pass_times, plain_seconds, stretch_of
from .runs import Progress, measure_prompt

# Each setting is timed along several answers, so that a slow moment of the machine does not hit one setting alone: as many as
# about so many seconds allow, because the times of short passes vary more.
_FEWEST, _MOST, _SECONDS = 3, 12, 10.0


@dataclass(frozen=True)
class Rounds:
    """Counts of simulated self-speculation over known outputs. `plain_steps` are the steps without drafts."""

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    plain_steps: int = 0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    def __add__(self, other: "Rounds") -> "Rounds":
        return Rounds(
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            self.rounds + other.rounds,
            self.plain_steps + other.plain_steps,
        )

    def seconds(self, times: PassTimes) -> float:
        """Predicted seconds of all steps after the prefill."""
        return self.drafted * times.draft + self.rounds * times.rest + self.plain_steps * times.plain


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
) -> Rounds:
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
    return Rounds(drafted, accepted, rounds, plain)


@dataclass(frozen=True)
class Prediction:
    """The prediction for one setting."""

    rounds: Rounds
    times: PassTimes
    tokens_per_second: float
    speedup: float  # over the plain steps timed with it, so that a later change of the machine's speed cancels out


class Side(NamedTuple):
    """What drafts: the first `exit_layer` layers of the model itself, or of its low-bit copy."""

    weights: Quantization | None
    exit_layer: int


def side_of(setting: DecodingConfig) -> Side:
    """What drafts in self-speculative decoding; for an early exit, the layers that answer."""
    assert setting.exit_layer is not None
    return Side(setting.draft_weights, setting.exit_layer)


@dataclass(frozen=True)
class Predictions:
    """Predictions by setting.

    `agreement`: for each exit and copy, the share of the autoregressive tokens that it would also have chosen. `context`: the
    tokens before the passes that were timed.
    """

    agreement: dict[Side, float]
    settings: dict[DecodingConfig, Prediction]
    context: list[int]

    def promising(self, count: int) -> list[DecodingConfig]:
        """The settings with the highest predicted speedup, best first."""
        return sorted(self.settings, key=lambda setting: -self.settings[setting].speedup)[:count]


def predict(
    loaded: Decoder,
    examples: Sequence[Example],
    settings: Sequence[DecodingConfig],
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
) -> Generator[Progress, None, Predictions]:
    """Decodes every prompt once, autoregressively, and times rounds of each setting along a few answers. Yields progress.

    Settings that draft with the same layers stand together. Raises LayerSkipError when no prompt could be answered.
    """
    total = len(examples) + _MOST * len(settings)
    sides = list(dict.fromkeys(map(side_of, settings)))
    plain = DecodingConfig("autoregressive", max_new_tokens=max_new_tokens, stop=stop)
    measure_prompt(loaded, examples[0].prompt, plain)  # warm-up
    answered: list[_Answered] = []
    outputs = []
    for number, example in enumerate(examples, start=1):
        output = measure_prompt(loaded, example.prompt, plain)
        outputs.append(output)
        if output.error is None:
            prompt_ids = loaded.encode_prompt(example.prompt)
            room = min(max_new_tokens, loaded.backend.max_positions - len(prompt_ids))
            answered.append(_Answered(prompt_ids, output, room, _choices(loaded, prompt_ids, output.ids, sides)))
        yield Progress(number, total, "prediction")
    require_outputs(Outputs(tuple(outputs)))
    times: dict[DecodingConfig, list[PassTimes]] = {setting: [] for setting in settings}
    typical, done, started = _typical_first(answered), len(examples), time.perf_counter()
    for visit in range(_MOST):
        if visit >= _FEWEST and time.perf_counter() - started > _SECONDS:
            yield Progress(total, total, "prediction")
            break
        stretch, timed = typical[visit % len(typical)].stretch, list[tuple[DecodingConfig, PassTimes]]()
        for _, alike in groupby(settings[:: -1 if visit % 2 else 1], key=side_of):
            step = plain_seconds(loaded, stretch)
            for setting in alike:
                timed += [(setting, passes) for passes in pass_times(loaded, stretch, setting, step)]
                done += 1
                yield Progress(done, total, "prediction")
        for setting, passes in timed:
            # Beside plain steps of its own group, a setting would be ranked by the noise of these few.
            times[setting].append(replace(passes, plain=fmean(each.plain for _, each in timed)))
    predictions = {
        setting: _prediction(answered, setting, averages(passes), loaded.ends(setting.stop))
        for setting, passes in times.items()
        if passes
    }
    tokens = sum(len(answer.output.ids) for answer in answered)
    agreeing = {side: sum(answer.agreeing(side) for answer in answered) for side in sides}
    return Predictions({side: count / tokens for side, count in agreeing.items()}, predictions, typical[0].context)


def _choices(
    loaded: Decoder, prompt_ids: Sequence[int], output_ids: Sequence[int], sides: Sequence[Side]
) -> dict[Side, list[int]]:
    """The choices of each exit and copy along an output, see `agreement`."""
    choices: dict[Side, list[int]] = {}
    for weights in dict.fromkeys(side.weights for side in sides):
        exits = [side.exit_layer for side in sides if side.weights == weights]
        found = agreement(loaded, prompt_ids, output_ids, exits, weights)
        choices |= {Side(weights, exit_layer): chosen for exit_layer, chosen in found.items()}
    return choices


@dataclass(frozen=True)
class _Answered:
    """A prompt with its autoregressive output and the choices of each exit and copy along it."""

    prompt_ids: list[int]
    output: Output
    room: int
    choices: dict[Side, list[int]]

    @property
    def stretch(self) -> Stretch:
        """What is timed of it."""
        return stretch_of(self.prompt_ids, self.output.ids)

    @property
    def context(self) -> list[int]:
        """The prompt with half the output: the average context length of its steps."""
        return [*self.prompt_ids, *self.output.ids[: len(self.output.ids) // 2]]

    def agreeing(self, side: Side) -> int:
        """How many of the output's tokens the exit or copy would also have chosen."""
        return sum(choice == token for choice, token in zip(self.choices[side], self.output.ids, strict=True))


def _prediction(
    answered: Sequence[_Answered], setting: DecodingConfig, times: PassTimes, eos_ids: frozenset[int]
) -> Prediction:
    """Time = prefill + drafts * t_draft(E) + rounds * t_verify(E, d) + plain steps * t_plain."""
    side, drafts = side_of(setting), setting.num_draft_tokens
    rounds = sum(
        (simulate(answer.choices[side], answer.output.ids, drafts, answer.room, eos_ids) for answer in answered), Rounds()
    )
    tokens = sum(len(answer.output.ids) for answer in answered)
    prefill = sum(answer.output.steps[0].seconds for answer in answered)
    return prediction_of(rounds, times, prefill, tokens, len(answered))


def prediction_of(rounds: Rounds, times: PassTimes, prefill: float, tokens: int, answers: int) -> Prediction:
    """For `tokens` of several answers, of which `prefill` seconds gave the first one each."""
    seconds = prefill + rounds.seconds(times)
    return Prediction(rounds, times, tokens / seconds, (prefill + (tokens - answers) * times.plain) / seconds)


def _typical_first(answered: Sequence[_Answered]) -> list[_Answered]:
    """The answers, from that of median length with its prompt to the longest and the shortest."""
    by_length = sorted(answered, key=lambda answer: len(answer.prompt_ids) + len(answer.output.ids))
    middle = len(by_length) // 2
    return [by_length[place] for place in sorted(range(len(by_length)), key=lambda place: abs(place - middle))]
