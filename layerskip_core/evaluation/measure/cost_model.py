"""Predicts the speed of settings that draft from their acceptance and from the time of each kind of forward pass."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, pairwise
from statistics import median
from typing import NamedTuple

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig, SamplingConfig
from ...config.packing import Quantization
from ...data.examples import Example
from ...decoding import DecodeStats, Decoding, decode
from ...model.backend import Submodel
from ...model.drafting import beyond_exit
from ...model.exit_blocks import features_of
from ..outputs import Output, Outputs, require_outputs
from .runner import Progress, measure_prompt

_ROUNDS = 4  # rounds, and as many plain steps, timed per visit to a setting
_VISITS = 3  # visits to each setting, so that a slow moment of the machine does not hit one setting alone


@dataclass(frozen=True)
class PassTimes:
    """Seconds on this machine.

    draft: one draft token (layers 0..E-1 and the head). verify: the verification of a round, with the first layers of its last
    draft, or of all tokens after low-bit drafts. other: the rest of a round. plain: an autoregressive step, timed next to it.
    """

    draft: float
    verify: float
    other: float
    plain: float

    @property
    def rest(self) -> float:
        """Of a round: all but its drafts."""
        return self.verify + self.other


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
                model.propagate(block.enter(hidden, before), block.layer, block.layer + 1, positions[:, :first], cache)
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


def pass_times(
    loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig, plain: Iterator["_StepTime"]
) -> list[PassTimes]:
    """Times a few rounds of the real decoding loop by a setting, so that no part of a round is left out.

    They are greedy, with whole drafts.

    Each round is paired with one of the `plain` steps (see `plain_steps`). Half of those run before the rounds, half after.
    Empty if the context has no room for a round.
    """
    room, drafts = loaded.backend.max_positions - len(prompt_ids), setting.num_draft_tokens
    length = max(min(room, (_ROUNDS + 1) * (drafts + 1)), 1)
    whole = replace(setting, max_new_tokens=length, stop=(), sampling=SamplingConfig(), draft_confidence=0.0, lookup=0)
    decoding = decode(loaded.backend, prompt_ids, whole)  # without EOS ids, so that it goes on
    steps = list(islice(plain, _ROUNDS // 2))
    rounds = [step for step in islice(_step_times(decoding), _ROUNDS + 2) if step.drafted == drafts]
    steps += islice(plain, _ROUNDS - len(steps))
    return [
        PassTimes(timed.draft / timed.drafted, timed.verify, timed.total - timed.draft - timed.verify, step.total)
        for timed, step in zip(rounds[1:] or rounds, steps, strict=False)
    ]


def plain_steps(loaded: Decoder, prompt_ids: list[int]) -> Iterator["_StepTime"]:
    """Endless autoregressive steps; at the end of the context they start again from the prompt. Empty if it has no room."""
    config = DecodingConfig("autoregressive", max_new_tokens=loaded.backend.max_positions)
    while len(prompt_ids) + 1 < loaded.backend.max_positions:
        yield from islice(_step_times(decode(loaded.backend, prompt_ids, config)), 1, None)


class _StepTime(NamedTuple):
    """The number of drafts of a step, and its seconds for drafting, verifying and in total."""

    drafted: int
    draft: float
    verify: float
    total: float


def _step_times(decoding: Decoding) -> Iterator[_StepTime]:
    before, started = DecodeStats(), time.perf_counter()
    for _ in decoding:
        total, now = time.perf_counter() - started, decoding.stats
        draft, verify = now.draft_seconds - before.draft_seconds, now.verify_seconds - before.verify_seconds
        yield _StepTime(now.drafted - before.drafted, draft, verify, total)
        before, started = now, time.perf_counter()


def medians(times: Sequence[PassTimes]) -> PassTimes:
    """Medians, because a few disturbed passes must not change the predicted ratio."""
    return PassTimes(
        median(passes.draft for passes in times),
        median(passes.verify for passes in times),
        median(passes.other for passes in times),
        median(passes.plain for passes in times),
    )


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
    """Decodes every prompt once, autoregressively, and times a few rounds of each self-speculative setting. Yields progress.

    Settings that draft with the same layers stand together. Raises LayerSkipError when no prompt could be answered.
    """
    total = len(examples) + _VISITS * len(settings)
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
    context = _typical_context(answered)
    times: dict[DecodingConfig, list[PassTimes]] = {setting: [] for setting in settings}
    done = len(examples)
    for _, alike in groupby([*settings] * _VISITS, key=side_of):
        steps = plain_steps(loaded, context)
        for setting in alike:
            times[setting] += pass_times(loaded, context, setting, steps)
            done += 1
            yield Progress(done, total, "prediction")
    predictions = {
        setting: _prediction(answered, setting, medians(passes), loaded.eos_ids) for setting, passes in times.items() if passes
    }
    tokens = sum(len(answer.output.ids) for answer in answered)
    agreeing = {side: sum(answer.agreeing(side) for answer in answered) for side in sides}
    return Predictions({side: count / tokens for side, count in agreeing.items()}, predictions, context)


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


def _typical_context(answered: Sequence[_Answered]) -> list[int]:
    """The prompt of median length with half its output: the average context length of its steps."""
    by_length = sorted(answered, key=lambda answer: len(answer.prompt_ids) + len(answer.output.ids))
    middle = by_length[len(by_length) // 2]
    return [*middle.prompt_ids, *middle.output.ids[: len(middle.output.ids) // 2]]
