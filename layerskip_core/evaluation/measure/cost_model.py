"""How fast each exit and draft length should be, before it is measured: acceptance, and the time of each kind of pass."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice, pairwise, product
from statistics import median
from typing import NamedTuple

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...data.examples import Example
from ...decoding import DecodeStats, Decoding, decode
from ..outputs import Output, Outputs, require_outputs
from .runner import Progress, measure

_ROUNDS = 4  # and as many plain steps, measured in a turn for the pass times of a setting
_TURNS = 3  # of all settings, so that a moment in which the machine is slow does not fall on one of them alone


@dataclass(frozen=True)
class PassTimes:
    """Seconds on this machine: of one draft token (layers 0..E-1 and the head), of verifying a round (with the first layers of
    its last draft), of the rest of a round, and of an autoregressive step in the same moments."""

    draft: float
    verify: float
    other: float
    plain: float


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

    def seconds(self, times: PassTimes) -> float:
        """Of the steps behind the prefill."""
        return self.drafted * times.draft + self.rounds * (times.verify + times.other) + self.plain_steps * times.plain


@torch.inference_mode()
def agreement(
    loaded: Decoder, prompt_ids: Sequence[int], output_ids: Sequence[int], exit_layers: Sequence[int]
) -> dict[int, list[int]]:
    """By exit: its greedy choice for each output token, given the prompt and the output before it.

    One pass over an output answers for every exit: a greedy draft is compared only behind accepted ones, so what it continues
    is the autoregressive output itself.
    """
    model = (
        getattr(loaded.backend, "draft", None) or loaded.backend
    )  # low-bit or trimmed drafts choose with weights of their own
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
    They are taken to end where the output does.
    """
    place, plain = 1, 0  # the first token is the prefill's
    drafted = accepted = rounds = 0
    while place < len(output):
        count = min(num_draft_tokens, room - place - 1)
        if output[-1] in eos_ids:
            count = min(count, len(output) - place)
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


def pass_times(
    loaded: Decoder, prompt_ids: list[int], exit_layer: int, num_draft_tokens: int, plain: Iterator["_Step"]
) -> list[PassTimes]:
    """Those of a few rounds of the decoding loop itself, whatever they accept, so that nothing a round does is left out, each
    with a step of `plain` (see `plain_steps`), half of which run before the rounds and half behind them.

    Empty where the context has no room for a round.
    """
    room = loaded.backend.max_positions - len(prompt_ids)
    length = min(room, (_ROUNDS + 1) * (num_draft_tokens + 1))
    config = DecodingConfig("self-speculative", exit_layer, num_draft_tokens, max(length, 1))
    decoding = decode(loaded.backend, prompt_ids, config)  # without an EOS, which would end it
    steps = list(islice(plain, _ROUNDS // 2))
    rounds = [one for one in islice(_steps(decoding), _ROUNDS + 2) if one.drafted == num_draft_tokens]
    steps += islice(plain, _ROUNDS - len(steps))
    pairs = zip(rounds[1:] or rounds, steps, strict=False)
    return [
        PassTimes(one.draft / one.drafted, one.verify, one.total - one.draft - one.verify, step.total) for one, step in pairs
    ]


def plain_steps(loaded: Decoder, prompt_ids: list[int]) -> Iterator["_Step"]:
    """One autoregressive step after the other, from the prompt anew where the context ends; none where it has no room."""
    config = DecodingConfig("autoregressive", max_new_tokens=loaded.backend.max_positions)
    while len(prompt_ids) + 1 < loaded.backend.max_positions:
        yield from islice(_steps(decode(loaded.backend, prompt_ids, config)), 1, None)


class _Step(NamedTuple):
    """What a step drafted, and the seconds that went to drafting, verifying and all of it."""

    drafted: int
    draft: float
    verify: float
    total: float


def _steps(decoding: Decoding) -> Iterator[_Step]:
    before, started = DecodeStats(), time.perf_counter()
    for _ in decoding:
        total, now = time.perf_counter() - started, decoding.stats
        draft, verify = now.draft_seconds - before.draft_seconds, now.verify_seconds - before.verify_seconds
        yield _Step(now.drafted - before.drafted, draft, verify, total)
        before, started = now, time.perf_counter()


def _typical(times: Sequence[PassTimes]) -> PassTimes:
    """The medians: what is predicted is a ratio of times, in which a disturbance of a few passes has no place."""
    return PassTimes(*(median(getattr(one, field.name) for one in times) for field in fields(PassTimes)))


@dataclass(frozen=True)
class Prediction:
    """One exit with one draft length."""

    rounds: Rounds
    times: PassTimes
    tokens_per_second: float
    speedup: float  # over autoregressive decoding by the plain steps, so that a machine which changes its speed is no matter


@dataclass(frozen=True)
class Predictions:
    """`agreement`: the share of the autoregressive output's tokens that an exit would have chosen too, by exit."""

    agreement: dict[int, float]
    settings: dict[tuple[int, int], Prediction]

    def promising(self, count: int) -> list[tuple[int, int]]:
        """The settings that should be fastest, best first."""
        return sorted(self.settings, key=lambda setting: -self.settings[setting].speedup)[:count]


def predict(
    loaded: Decoder,
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
            room = min(max_new_tokens, loaded.backend.max_positions - len(prompt_ids))
            known.append(_Known(prompt_ids, output, room, agreement(loaded, prompt_ids, output.ids, exits)))
        yield Progress(number, total, "prediction")
    require_outputs(Outputs(tuple(outputs)))
    typical = _typical_context(known)
    times: dict[tuple[int, int], list[PassTimes]] = {setting: [] for setting in product(exits, specs)}
    done = len(examples)
    for exit_layer in [*exits] * _TURNS:
        steps = plain_steps(loaded, typical)
        for drafts in specs:
            times[exit_layer, drafts] += pass_times(loaded, typical, exit_layer, drafts, steps)
            done += 1
            yield Progress(done, total, "prediction")
    found = {setting: _prediction(known, *setting, _typical(mine), loaded.eos_ids) for setting, mine in times.items() if mine}
    tokens = sum(len(one.output.ids) for one in known)
    agreeing = {exit_layer: sum(map(sum, (one.agreeing(exit_layer) for one in known))) for exit_layer in exits}
    shares = {exit_layer: count / tokens for exit_layer, count in agreeing.items()}
    return Predictions(shares, found)


@dataclass(frozen=True)
class _Known:
    """A prompt with its autoregressive output, and what each exit would have chosen instead."""

    prompt_ids: list[int]
    output: Output
    room: int
    choices: dict[int, list[int]]

    def agreeing(self, exit_layer: int) -> list[bool]:
        return [mine == token for mine, token in zip(self.choices[exit_layer], self.output.ids, strict=True)]


def _prediction(known: Sequence[_Known], exit_layer: int, drafts: int, times: PassTimes, eos_ids: frozenset[int]) -> Prediction:
    """Time = drafts * t_draft(E) + rounds * t_verify(E, d), with the prefill and the plain steps that there are."""
    rounds = [simulate(one.choices[exit_layer], one.output.ids, drafts, one.room, eos_ids) for one in known]
    whole, tokens = sum(rounds, Rounds()), sum(len(one.output.ids) for one in known)
    prefill = sum(one.output.steps[0].seconds for one in known)
    seconds = prefill + whole.seconds(times)
    return Prediction(whole, times, tokens / seconds, (prefill + (tokens - len(known)) * times.plain) / seconds)


def _typical_context(known: Sequence[_Known]) -> list[int]:
    """Of the prompt of median length: itself and half its output, as long as the context is on the average over its steps."""
    one = sorted(known, key=lambda one: len(one.prompt_ids) + len(one.output.ids))[len(known) // 2]
    return [*one.prompt_ids, *one.output.ids[: len(one.output.ids) // 2]]
