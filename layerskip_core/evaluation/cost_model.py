"""How fast each exit and draft length should be, before it is measured: acceptance, and the time of each kind of pass."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from statistics import mean

import torch

from ..checkpoint import LoadedModel
from ..config import DecodingConfig
from ..data import Example
from ..decoding import DecodeStats, decode
from .generation import Output, Outputs, Progress, measure, require_outputs

_ROUNDS = 6  # measured in a turn for the pass times of a setting
_TURNS = 2  # of all settings, so that a moment in which the machine is slow does not fall on one of them alone


@dataclass(frozen=True)
class PassTimes:
    """Seconds on this machine: of one draft token (layers 0..E-1 and the head), of verifying a round (with the first layers of
    its last draft), and of the rest of a round."""

    draft: float
    verify: float
    other: float


@dataclass(frozen=True)
class Rounds:
    """What self-speculation makes of outputs that are known: counts over all of them, and the steps that draft nothing."""

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

    def seconds(self, times: PassTimes, plain: float) -> float:
        """Of the steps behind the prefill; `plain` is what an autoregressive step takes."""
        return self.drafted * times.draft + self.rounds * (times.verify + times.other) + self.plain_steps * plain


@torch.inference_mode()
def agreement(
    loaded: LoadedModel, prompt_ids: Sequence[int], output_ids: Sequence[int], exit_layers: Sequence[int]
) -> dict[int, list[int]]:
    """By exit: its greedy choice for each output token, given the prompt and the output before it.

    One pass over an output answers for every exit: a greedy draft is compared only behind accepted ones, so what it continues
    is the autoregressive output itself.
    """
    model = getattr(loaded.depth, "draft", None) or loaded.depth  # low-bit or trimmed drafts choose with weights of their own
    ids = [*prompt_ids, *output_ids]
    tokens = torch.tensor([ids[:-1]], device=model.device)
    positions = torch.arange(len(ids) - 1)[None]
    hidden, cache, found = model.embed(tokens), model.new_cache(1, len(ids)), {}
    for start, stop in pairwise([0, *sorted(set(exit_layers))]):
        hidden = model.run_layers(hidden, start, stop, positions, cache)
        found[stop] = model.unembed(hidden[:, len(prompt_ids) - 1 :]).argmax(-1)[0].tolist()
    return found


def simulate(
    choices: Sequence[int], output: Sequence[int], num_draft_tokens: int, room: int, eos_ids: frozenset[int]
) -> Rounds:
    """The rounds of greedy self-speculation that produce `output`, of at most `room` tokens; `choices` are `agreement`'s.

    Exact, but for one thing: behind a wrong draft the next ones are unknown, and one that is an EOS would end the round early.
    """
    place, plain = 1, 0  # the first token is the prefill's
    drafted = accepted = rounds = 0
    while place < len(output):
        count = min(num_draft_tokens, room - place - 1)
        if count == 0:
            plain += 1
            place += 1
            continue
        right = 0
        while right < count and place + right < len(output) and choices[place + right] == output[place + right]:
            right += 1
            if output[place + right - 1] in eos_ids:
                count = right
        if right < count and place + right < len(choices) and choices[place + right] in eos_ids:
            count = right + 1
        made = min(right + 1, len(output) - place)
        drafted, accepted, rounds, place = drafted + count, accepted + right, rounds + 1, place + made
    return Rounds(drafted, accepted, rounds, plain)


def pass_times(loaded: LoadedModel, prompt_ids: list[int], exit_layer: int, num_draft_tokens: int) -> list[PassTimes]:
    """Those of a few rounds of the decoding loop itself, whatever they accept, so that nothing a round does is left out.

    Empty where the context has no room for a round.
    """
    room = loaded.depth.max_positions - len(prompt_ids)
    length = min(room, (_ROUNDS + 1) * (num_draft_tokens + 1))
    config = DecodingConfig("self-speculative", exit_layer, num_draft_tokens, max(length, 1))
    decoding = decode(loaded.depth, prompt_ids, config)  # without an EOS, which would end it
    states = [DecodeStats()] + [decoding.stats for _ in zip(range(_ROUNDS + 2), decoding, strict=False)]
    full = [(old, new) for old, new in pairwise(states) if new.drafted - old.drafted == num_draft_tokens]
    return [_times(old, new) for old, new in full[1:] or full]


def _times(before: DecodeStats, after: DecodeStats) -> PassTimes:
    """Of the one round between two states of the counts."""
    draft, verify = after.draft_seconds - before.draft_seconds, after.verify_seconds - before.verify_seconds
    total = after.total_seconds - before.total_seconds
    return PassTimes(draft / (after.drafted - before.drafted), verify, max(0.0, total - draft - verify))


def _mean(times: Sequence[PassTimes]) -> PassTimes:
    """The mean, not the median: what is predicted is a sum of times, slow passes included."""
    return PassTimes(mean(one.draft for one in times), mean(one.verify for one in times), mean(one.other for one in times))


@dataclass(frozen=True)
class Prediction:
    """One exit with one draft length."""

    rounds: Rounds
    times: PassTimes
    tokens_per_second: float


@dataclass(frozen=True)
class Predictions:
    """`agreement`: the share of the autoregressive output's tokens that an exit would have chosen too, by exit."""

    agreement: dict[int, float]
    settings: dict[tuple[int, int], Prediction]
    baseline_tokens_per_second: float  # autoregressive, measured just before the pass times: a speedup is relative to it

    def promising(self, count: int) -> list[tuple[int, int]]:
        """The settings that should be fastest, best first."""
        return sorted(self.settings, key=lambda setting: -self.settings[setting].tokens_per_second)[:count]


def predict(
    loaded: LoadedModel,
    examples: Sequence[Example],
    exits: Sequence[int],
    specs: Sequence[int],
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
) -> Generator[Progress, None, Predictions]:
    """Decodes every prompt once, autoregressively, and times a few rounds of each setting; yields progress.

    Raises LayerSkipError when no prompt could be answered.
    """
    total = len(examples) + _TURNS * len(exits) * len(specs)
    plain = DecodingConfig("autoregressive", max_new_tokens=max_new_tokens, stop=stop)
    measure(loaded, examples[0].prompt, plain)  # warm-up
    known: list[_Known] = []
    outputs = []
    for number, example in enumerate(examples, start=1):
        output = measure(loaded, example.prompt, plain)
        outputs.append(output)
        if output.error is None:
            prompt_ids = loaded.encode_prompt(example.prompt)
            room = min(max_new_tokens, loaded.depth.max_positions - len(prompt_ids))
            known.append(_Known(prompt_ids, output, room, agreement(loaded, prompt_ids, output.ids, exits)))
        yield Progress(number, total, "prediction")
    baseline = require_outputs(Outputs(tuple(outputs)))
    typical = _typical_context(known)
    times: dict[tuple[int, int], list[PassTimes]] = {setting: [] for setting in product(exits, specs)}
    for number, setting in enumerate([*times] * _TURNS, start=1):
        times[setting] += pass_times(loaded, typical, *setting)
        yield Progress(len(examples) + number, total, "prediction")
    found = {
        setting: _prediction(known, *setting, _mean(mine), baseline, loaded.eos_ids) for setting, mine in times.items() if mine
    }
    tokens = sum(len(one.output.ids) for one in known)
    agreeing = {exit_layer: sum(map(sum, (one.agreeing(exit_layer) for one in known))) for exit_layer in exits}
    shares = {exit_layer: count / tokens for exit_layer, count in agreeing.items()}
    return Predictions(shares, found, 1 / baseline.seconds_per_token)


@dataclass(frozen=True)
class _Known:
    """A prompt with its autoregressive output, and what each exit would have chosen instead."""

    prompt_ids: list[int]
    output: Output
    room: int
    choices: dict[int, list[int]]

    def agreeing(self, exit_layer: int) -> list[bool]:
        return [mine == token for mine, token in zip(self.choices[exit_layer], self.output.ids, strict=True)]


def _prediction(
    known: Sequence[_Known], exit_layer: int, drafts: int, times: PassTimes, baseline: Outputs, eos_ids: frozenset[int]
) -> Prediction:
    """Speed = tokens / (drafts * t_draft(E) + rounds * t_verify(E, d)), with the prefill and the plain steps that there are."""
    rounds = [simulate(one.choices[exit_layer], one.output.ids, drafts, one.room, eos_ids) for one in known]
    whole = sum(rounds, Rounds())
    prefill = sum(one.output.steps[0].seconds for one in known)
    plain = baseline.decode_seconds_per_token if whole.plain_steps else 0.0
    seconds = prefill + whole.seconds(times, plain)
    return Prediction(whole, times, sum(len(one.output.ids) for one in known) / seconds)


def _typical_context(known: Sequence[_Known]) -> list[int]:
    """Of the prompt of median length: itself and half its output, as long as the context is on the average over its steps."""
    one = sorted(known, key=lambda one: len(one.prompt_ids) + len(one.output.ids))[len(known) // 2]
    return [*one.prompt_ids, *one.output.ids[: len(one.output.ids) // 2]]
