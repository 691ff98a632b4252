"""The recommendation of a sweep, and its policies.

Against the winner's curse a sweep times the best few settings once more, in turns with plain and
adaptive decoding, on other prompts, and decides by the lower end of the speedup's interval. So it
does with the fastest early exits that keep the quality.

A `place` is the index of a setting's Result in the sweep's results; place 0 is plain decoding.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from ...config.decoding import STRATEGIES, used_by
from ...config.evaluation import SweepConfig
from ...config.options import hints_of
from ...config.resolution import EXACT, FAST, Policy, policy_text
from ...errors import plural
from ..intervals import Estimate, Margin, margin, speed_ratio
from ..results import Recommendation, Result
from .measuring import Measured, Progress, in_turn

# Adaptive drafting is preferred to a fixed setting less than 5% faster: it adapts to other prompts
_CLOSE = 1.05
_FINALISTS = 2  # fixed settings, and early exits, that are timed once more
_FEWEST_TURNS = 8
_MOST_TURNS = 256
_NARROW = 0.02  # timing ends when lower ends of speedups are less than 2% below them
# The options of a policy that a Result holds.
_COLUMNS = sorted(hints_of(Policy).keys() & {field.name for field in fields(Result)})


@dataclass(frozen=True)
class Contest:
    """Seconds and tokens (settings, 2, prompts) of plain decoding and of the best settings;
    `places`: their result indices.
    """

    places: Sequence[int]
    times: Tensor
    noun: str = "other prompt"

    @property
    def prompts(self) -> str:
        """`16 other prompts`."""
        return plural(self.times.shape[-1], self.noun)

    def speed(self, place: int, other: int = 0) -> Estimate:
        """Speedup over another setting. Over plain decoding (0) all lower ends hold jointly at 95%
        (Bonferroni).
        """
        rivals = len(self.places) - 1
        return self._ratio(place, other, 0.95 if other else 1 - 0.1 / rivals)

    def lower_end(self, place: int) -> float:
        """Of the speedup over plain decoding; 0 without an interval."""
        bounds = self.speed(place).bounds
        return 0.0 if bounds is None else bounds.low

    def surely_faster(self, places: Sequence[int], other: int) -> list[int]:
        """Those of the places that are faster than `other`, the fastest first. Lower ends hold
        jointly at 95% (Bonferroni).
        """
        speeds = {}
        for place in places:
            speed = self._ratio(place, other, 1 - 0.1 / len(places))
            if speed.bounds is not None and speed.bounds.low > 1:
                speeds[place] = speed.value or 0.0
        return sorted(speeds, key=lambda place: -speeds[place])

    def text(self, place: int) -> str:
        """`1.82x the speed of autoregressive decoding on 16 other prompts (at least 1.74x with 95%
        confidence)`.
        """
        value = self.speed(place).value or 0.0
        low = self.lower_end(place)
        least = f"at least {low:.2f}x with 95% confidence" if low else "too few for an interval"
        return f"{value:.2f}x the speed of autoregressive decoding on {self.prompts} ({least})"

    def _ratio(self, place: int, other: int, level: float) -> Estimate:
        own = self.times[self.places.index(place)][:, None]
        others = self.times[self.places.index(other)][:, None]
        return speed_ratio(others, own, level)


def keeping_outputs(results: Sequence[Result], near_tie: float) -> list[int]:
    """Indices of drafting settings whose outputs equal plain decoding's, except at near-ties."""
    places = []
    for place, result in enumerate(results):
        if STRATEGIES[result.strategy].drafts and result.keeps_outputs(results[0], near_tie):
            places.append(place)
    return places


def finalists(
    results: Sequence[Result], near_tie: float, exit_margins: Mapping[int, Margin] | None = None
) -> list[int]:
    """What is timed once more, full depth first; empty if nothing was faster than full depth.

    The fastest settings that keep the outputs and adaptive drafting, if any was faster; and the
    fastest early exits that certainly keep the quality, by their margins.
    """

    def speed(place: int) -> float:
        return results[place].speedup or 0.0

    drafting = sorted(keeping_outputs(results, near_tie), key=speed, reverse=True)
    chosen: list[int] = []
    if drafting and speed(drafting[0]) > 1:
        fixed = [place for place in drafting if results[place].strategy != "adaptive"]
        chosen += [place for place in fixed if speed(place) > 1][:_FINALISTS]
        chosen += [place for place in drafting if results[place].strategy == "adaptive"]
    exits = []
    for place, own in (exit_margins or {}).items():
        if own.low >= 0 and speed(place) > 1:
            exits.append(place)
    chosen += sorted(exits, key=speed, reverse=True)[:_FINALISTS]
    return [0, *chosen] if chosen else []


def margins(
    results: Sequence[Result], measured: Sequence[Measured], quality_metric: str, keep: float
) -> dict[int, Margin]:
    """By how much each early exit, by its index, exceeds the share `keep` of full depth's quality.
    Full depth comes first.
    """
    full = measured[0].scores.get(quality_metric)
    if full is None:
        return {}
    exits = []
    for place, result in enumerate(results):
        if result.strategy == "early-exit" and quality_metric in measured[place].scores:
            exits.append(place)
    found = {}
    for place in exits:
        scores = measured[place].scores[quality_metric]
        found[place] = margin(scores, full, keep, quality_metric, len(exits))
    return found


def contest(
    places: Sequence[int],
    prompts: int,
    timed: Callable[[int, int], tuple[float, int]],
    seconds: float,
    noun: str = "other prompt",
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[Progress, None, Contest]:
    """Times settings prompt by prompt until intervals are narrow or `seconds` are over; yields
    progress in percent.

    `timed`: seconds and tokens of a prompt, by its number, with the setting at a place.
    """
    times = torch.zeros(len(places), 2, prompts, dtype=torch.float64)
    started = clock()
    for turn in range(_MOST_TURNS):
        prompt = turn % prompts  # few prompts come again, and their times add up
        for number in in_turn(turn, len(places)):
            measured = torch.tensor(timed(prompt, places[number]), dtype=torch.float64)
            times[number, :, prompt] += measured
        outcome = Contest(places, times[..., : turn + 1], noun)
        share = (clock() - started) / max(seconds, 1e-9)
        yield Progress(min(100, int(100 * share)), 100, "the best once more")
        if turn + 1 >= _FEWEST_TURNS and (share >= 1 or _is_narrow(outcome)):
            break
    return outcome


def _is_narrow(outcome: Contest) -> bool:
    for place in outcome.places[1:]:
        value = outcome.speed(place).value or 0.0
        if outcome.lower_end(place) <= (1 - _NARROW) * value:
            return False
    return True


def winner(outcome: Contest, results: Sequence[Result], places: Sequence[int]) -> tuple[int, int]:
    """Of these places the one to recommend (adaptive, unless clearly or certainly slower), and the
    one of highest lower end.
    """
    first = max(places, key=outcome.lower_end)
    for place in places:
        if results[place].strategy == "adaptive" and outcome.lower_end(place) > 1:
            lead = outcome.speed(first, place)
            certain = lead.bounds is not None and lead.bounds.low > 1
            if lead.value is None or (lead.value <= _CLOSE and not certain):
                return place, first
    return first, first


def recommend(
    results: Sequence[Result],
    near_tie: float,
    quality_metric: str,
    config: SweepConfig,
    measured: Sequence[Measured],
    outcome: Contest | None = None,
) -> Recommendation:
    """The setting that certainly gains in the contest, else plain decoding; and policies. Full
    depth comes first.
    """
    usable = keeping_outputs(results, near_tie)
    policies = [policy_of(result, results[0], quality_metric, config) for result in results]
    if outcome is not None:
        for place in outcome.places[1:]:
            policies[place]["measured"]["speedup"] = outcome.speed(place).value or 0.0
    advice = _advice(results, usable, policies, outcome)
    reasons = [advice.reason]
    tried = sum(STRATEGIES[result.strategy].drafts for result in results)
    if tried > len(usable):
        excluded = tried - len(usable)
        reasons.append(f"{excluded} of {tried} settings changed the output and were excluded")
    exits = margins(results, measured, quality_metric, config.keep)
    fast = fast_policy(exits, policies, advice.place, quality_metric, config.keep, outcome)
    saved = {EXACT: policies[advice.place]}
    if fast.place is not None:
        saved[FAST] = policies[fast.place]
    chosen = results[advice.place]
    return Recommendation(
        chosen.exit_layer,
        chosen.num_draft_tokens,
        advice.speedup,
        "; ".join(reasons),
        fast.reason,
        saved,
        advice.lower_end,
    )


@dataclass(frozen=True)
class _Advice:
    """The setting at `place`, and why."""

    place: int
    reason: str
    speedup: float | None = None
    lower_end: float | None = None


def _advice(
    results: Sequence[Result],
    usable: Sequence[int],
    policies: Sequence[Policy],
    outcome: Contest | None,
) -> _Advice:
    """Plain decoding, place 0, unless a drafting setting won the contest and certainly gains."""
    if not usable:
        return _Advice(0, "no setting that drafts kept the autoregressive outputs")
    losing = "speculation does not pay on this model and machine: {}, the best setting, reaches {}"
    timed: list[int] = []
    if outcome is not None:
        timed = [place for place in outcome.places[1:] if place in usable]
    if outcome is None or not timed:
        best = max(usable, key=lambda place: results[place].speedup or 0.0)
        speedup = results[best].speedup
        reason = losing.format(policy_text(policies[best]), f"{speedup or 0.0:.2f}x")
        return _Advice(0, reason, speedup)
    best, first = winner(outcome, results, timed)
    name = policy_text(policies[best])
    speedup = outcome.speed(best).value
    lower_end = outcome.lower_end(best)
    if lower_end <= 1:
        return _Advice(0, losing.format(name, outcome.text(best)), speedup, lower_end)
    rank = "the fastest"
    if best != first:
        rank = f"close to the fastest ({outcome.speed(first).value or 0.0:.2f}x)"
    result = results[best]
    reason = (
        f"{name} is {rank} of {len(usable)} settings: {outcome.text(best)}, "
        f"{result.acceptance_rate or 0:.0%} of drafts accepted, "
        f"{result.identical_outputs or 0:.0%} of outputs identical"
    )
    ties = len(result.differences)
    if ties:
        reason += f" ({ties} {'differs at a near-tie' if ties == 1 else 'differ at near-ties'})"
    return _Advice(best, reason, speedup, lower_end)


def policy_of(result: Result, plain: Result, quality_metric: str, config: SweepConfig) -> Policy:
    """A measured row as a policy, with the packing of its drafts. `plain`: the row of full
    depth.
    """
    settings = {name: getattr(result, name) for name in _COLUMNS}
    if result.strategy in used_by("lookup"):
        settings["lookup"] = config.generation.get("lookup")
    # Exits by confidence are tested with the head of drafts too.
    if result.exit_confidence or result.strategy in used_by("draft_vocab"):
        copies = config.packing.draft_weights if result.strategy == "adaptive" else ()
        settings["draft_copies"] = copies
        settings["draft_vocab"] = config.packing.draft_vocab
        if copies or result.draft_weights:
            settings["draft_head"] = config.packing.draft_head
    policy = {}
    for name, value in settings.items():
        if value:  # the others have their defaults
            policy[name] = list(value) if isinstance(value, tuple) else value
    policy["measured"] = {
        "task": str(config.task.task),
        "metric": quality_metric,
        "value": result.metrics.get(quality_metric, 0.0),
        "full_depth": plain.metrics.get(quality_metric, 0.0),
        "speedup": result.speedup or 0.0,
    }
    return cast(Policy, policy)


@dataclass(frozen=True)
class FastPolicy:
    """The early exit that is the policy `fast`, by its index (None: there is none), and why."""

    place: int | None
    reason: str


def fast_policy(
    exits: Mapping[int, Margin],
    policies: Sequence[Policy],
    exact: int,
    quality_metric: str,
    keep: float,
    outcome: Contest | None,
) -> FastPolicy:
    """The fastest early exit that certainly keeps this share of the quality and is faster than
    `exact`.

    `exits`: their margins, by index; `policies` have the speeds of the contest where they were
    timed in it.
    """
    full = policies[exact]["measured"]["full_depth"]
    to_beat = policies[exact]["measured"]["speedup"]

    def none(reason: str) -> FastPolicy:
        return FastPolicy(None, f"none, because {reason}")

    def name(place: int) -> str:
        return policy_text(policies[place])

    def speed(place: int) -> float:
        return policies[place]["measured"]["speedup"]

    def described(place: int) -> str:
        value = policies[place]["measured"]["value"]
        quality = f"{quality_metric} {value:.3g} ({full:.3g} at full depth)"
        return f"{speed(place):.2f}x the speed of plain decoding, {quality}"

    if not full:
        return none(f"{quality_metric} is 0 at full depth")
    if not exits:
        return none("no early exit was measured")
    ranked = sorted(exits, key=speed, reverse=True)
    good = [place for place in ranked if exits[place].needed is not None]
    if not good:
        best = max(ranked, key=lambda place: exits[place].mean)
        value = policies[best]["measured"]["value"]
        return none(
            f"no early exit keeps more than {keep:.4g} of {quality_metric}, "
            f"{full:.3g} at full depth; the best, {name(best)}, has {value:.3g}"
        )
    faster = [place for place in good if speed(place) > to_beat]
    exact_speed = f"faster than the policy exact ({to_beat:.2f}x)"
    if not faster:
        return none(f"{name(good[0])} ({described(good[0])}) is not {exact_speed}")
    timed: list[int] = []
    if outcome is not None:
        timed = [place for place in exits if place in outcome.places]
        certain = outcome.surely_faster(timed, exact)
        if certain:
            best = certain[0]
            return FastPolicy(best, f"{name(best)}: {described(best)}, timed on {outcome.prompts}")
    if timed:
        best = max(timed, key=speed)
        return none(f"{name(best)} ({described(best)}) is not certainly {exact_speed}")
    best = min(faster, key=lambda place: exits[place].needed or 0)
    return none(
        f"{plural(exits[best].prompts, 'prompt')} cannot show that an early exit keeps {keep:.4g} "
        f"of {quality_metric}; for {name(best)} ({described(best)}) it would take about "
        f"{exits[best].needed} (`samples`)"
    )
