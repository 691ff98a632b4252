"""A sweep's advice: the recommended setting, and the policies to store.

The fastest of twenty settings on a dozen prompts looks faster than it is. So the best few are timed once more, in turns with
plain and adaptive decoding, on prompts that chose none of them, and the lower end of the interval of their speed decides.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import cast

import torch
from torch import Tensor

from ...config.decoding import DRAFTERS, EXACT, FAST, Policy, policy_text, used_by
from ...config.evaluation import SweepConfig
from ...config.options import hints_of
from ...errors import plural
from ..metrics import Estimate, Margin, margin, speed_ratio
from ..results import Recommendation, Result
from . import Measured, Progress, in_turn

_CLOSE = 1.05  # adaptive drafting is preferred to a fixed setting that is faster by less: it suits other prompts too
_FINALISTS = 2  # fixed settings that are timed once more
_FEWEST_TURNS = 8
_NARROW = 0.02  # share of a speed that its lower end is below it, from which on no more prompts are needed
# The settings that are columns of a sweep.
_COLUMNS = sorted(hints_of(Policy).keys() & {field.name for field in fields(Result)})


@dataclass(frozen=True)
class Contest:
    """Seconds and tokens (settings, 2, prompts) of plain decoding and of the best settings, in turns on the same prompts.

    `places`: of these settings among a sweep's results. `noun`: what a prompt is called.
    """

    places: Sequence[int]
    times: Tensor
    noun: str = "other prompt"

    def speed(self, place: int, other: int = 0) -> Estimate:
        """Of a setting over another one. Over plain decoding (0) the lower ends of all intervals hold at once with 95%."""
        mine, theirs = (self.times[self.places.index(each)][:, None] for each in (place, other))
        return speed_ratio(theirs, mine, 0.95 if other else 1 - 0.1 / (len(self.places) - 1))

    def lower_end(self, place: int) -> float:
        bounds = self.speed(place).bounds
        return 0.0 if bounds is None else bounds.low

    def is_narrow(self) -> bool:
        return all(self.lower_end(place) > (1 - _NARROW) * (self.speed(place).value or 0.0) for place in self.places[1:])

    def told(self, place: int) -> str:
        """`1.82x the speed of autoregressive decoding on 16 other prompts (at least 1.74x with 95% confidence)`."""
        prompts, value = plural(self.times.shape[-1], self.noun), self.speed(place).value or 0.0
        least = f"at least {self.lower_end(place):.2f}x with 95% confidence"
        return f"{value:.2f}x the speed of autoregressive decoding on {prompts} ({least})"


def faithful(results: Sequence[Result], near_tie: float) -> list[int]:
    """The places of measured settings that draft and have the outputs of the first one, up to differences at near-ties."""
    drafting = [place for place, result in enumerate(results) if result.strategy in DRAFTERS and result.metrics]
    return [place for place in drafting if results[place].keeps_outputs(results[0], near_tie)]


def finalists(results: Sequence[Result], near_tie: float) -> list[int]:
    """Full depth, the fastest faithful settings and adaptive drafting. Empty if none of them was faster than full depth."""
    known = sorted(faithful(results, near_tie), key=lambda place: -(results[place].speedup or 0.0))
    faster = [place for place in known if (results[place].speedup or 0.0) > 1]
    fixed = [place for place in faster if results[place].strategy != "adaptive"][:_FINALISTS]
    return [0, *fixed, *(place for place in known if results[place].strategy == "adaptive")] if faster else []


def contest(
    places: Sequence[int],
    prompts: int,
    timed: Callable[[int, int], tuple[float, int]],
    seconds: float,
    noun: str = "other prompt",
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[Progress, None, Contest]:
    """Times settings on one prompt after the other until their intervals are narrow or so many seconds are over.

    Yields progress in percent of the time. If there are too few prompts, they come again.

    Args:
        timed: seconds and tokens of the answer to a prompt, by its number, of the setting at a place.
    """
    times, started = torch.zeros(len(places), 2, prompts, dtype=torch.float64), clock()
    for turn in count():
        for place in in_turn(turn, len(places)):
            times[place, :, turn % prompts] += torch.tensor(timed(turn % prompts, places[place]), dtype=torch.float64)
        found, share = Contest(places, times[..., : turn + 1], noun), (clock() - started) / max(seconds, 1e-9)
        yield Progress(min(100, int(100 * share)), 100, "the best once more")
        if turn + 1 >= _FEWEST_TURNS and (share >= 1 or found.is_narrow()):
            return found
    raise AssertionError


def winner(found: Contest, results: Sequence[Result]) -> tuple[int, int]:
    """The setting to recommend, and the one with the highest lower end.

    They differ where adaptive drafting gains too, and the other is hardly faster, and not certainly.
    """
    first = max(found.places[1:], key=found.lower_end)
    for place in found.places[1:]:
        if results[place].strategy == "adaptive" and found.lower_end(place) > 1:
            lead, ends, _ = found.speed(first, place)
            if lead is None or (lead <= _CLOSE and (ends is None or ends.low <= 1)):
                return place, first
    return first, first


def recommend(
    results: Sequence[Result],
    near_tie: float,
    quality_metric: str,
    config: SweepConfig,
    measured: Sequence[Measured | None],
    found: Contest | None = None,
) -> Recommendation:
    """The setting that drafts and gains certainly, or plain decoding, and the policies.

    Args:
        results: the first is full depth.
        measured: what was measured of each result, None of one that was only predicted.
        found: what `contest` found of the `finalists`, if there are any.
    """
    known, policies = faithful(results, near_tie), [policy_of(result, results[0], quality_metric, config) for result in results]
    best = first = max(known, key=lambda place: results[place].speedup or 0.0, default=0)
    speed, lower_end, told = results[best].speedup, None, f"{results[best].speedup or 0.0:.2f}x"
    alike: list[int] = []
    if found is not None:
        best, first = winner(found, results)
        speed, lower_end, told = found.speed(best).value, found.lower_end(best), found.told(best)
        leads = {place: found.speed(best, place).bounds for place in found.places[1:] if place != best}
        alike = [place for place, ends in leads.items() if ends is not None and ends.low <= 1 <= ends.high]
        policies[best]["measured"]["speedup"] = speed or 0.0
    pays = lower_end is not None and lower_end > 1
    result, name = results[best], policy_text(policies[best])
    if not known:
        verdict = "no setting that drafts kept the autoregressive outputs"
    elif found is None or not pays:
        verdict = f"speculation does not pay on this model and machine: {name}, the best setting, reaches {told}"
    else:
        rank = "the fastest" if best == first else f"close to the fastest ({found.speed(first).value or 0.0:.2f}x)"
        ties = len(result.differences)
        verdict = (
            f"{name} is {rank} of {len(known)} settings: {told}, "
            f"{result.acceptance_rate or 0:.0%} of drafts accepted, {result.identical_outputs or 0:.0%} of outputs identical"
            + (f" ({ties} {'differs at a near-tie' if ties == 1 else 'differ at near-ties'})" if ties else "")
        )
    tried = sum(bool(result.strategy in DRAFTERS and result.metrics) for result in results)
    skipped = sum(1 for result in results if result.predicted_speedup and not result.metrics)
    reason = (
        verdict,
        f"it cannot be told from {', '.join(policy_text(policies[place]) for place in alike)}" if pays and alike else "",
        f"{tried - len(known)} of {tried} settings changed the output and were excluded" if tried > len(known) else "",
        f"not measured because of a lower predicted speed: {skipped}" if skipped else "",
    )
    chosen = best if pays else 0
    full = measured[0].scores.get(quality_metric) if measured[0] else None
    exits = [
        (policy, margin(each.scores[quality_metric], full, config.keep, quality_metric))
        for result, policy, each in zip(results, policies, measured, strict=True)
        if full and each and result.strategy == "early-exit" and quality_metric in each.scores
    ]
    fast, fast_reason = fast_policy(exits, policies[chosen], quality_metric, config.keep)
    return Recommendation(
        results[chosen].exit_layer,
        results[chosen].num_draft_tokens,
        speed if known else None,
        "; ".join(filter(None, reason)),
        fast_reason,
        {EXACT: policies[chosen]} | ({} if fast is None else {FAST: fast}),
        lower_end,
    )


def policy_of(result: Result, plain: Result, quality_metric: str, config: SweepConfig) -> Policy:
    """A measured row as a policy, with how its drafts were stored; `plain` is the row of full depth."""
    settings = {name: getattr(result, name) for name in _COLUMNS}
    for name in ("draft_confidence", "lookup"):
        if result.strategy in used_by(name):
            settings[name] = config.generation.get(name)
    # Exits that are chosen by confidence are tested with the head of drafts too.
    if result.exit_confidence or result.strategy not in ("autoregressive", "lookup", "early-exit"):
        copies = config.packing.draft_weights if result.strategy == "adaptive" else ()
        settings |= {"draft_copies": copies, "draft_vocab": config.packing.draft_vocab}
        settings["draft_head"] = config.packing.draft_head if copies or result.draft_weights else None
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items() if value}
    said["measured"] = {
        "task": str(config.task.task),
        "metric": quality_metric,
        "value": result.metrics.get(quality_metric, 0.0),
        "full_depth": plain.metrics.get(quality_metric, 0.0),
        "speedup": result.speedup or 0.0,
    }
    return cast(Policy, said)


def fast_policy(
    exits: Sequence[tuple[Policy, Margin]], exact: Policy, quality_metric: str, keep: float
) -> tuple[Policy | None, str]:
    """The fastest early exit that certainly keeps this share of full depth's quality, and why; None if there is none.

    `exits`: with the margins by which they keep it. Certainly: by the lower end of the margin's interval. An exit must also be
    faster than `exact`.
    """
    full, to_beat = exact["measured"]["full_depth"], exact["measured"]["speedup"]
    if not full:
        return None, f"none, because {quality_metric} is 0 at full depth"
    if not exits:
        return None, "none, because no early exit was measured"

    def described(policy: Policy) -> str:
        speed, value = policy["measured"]["speedup"], policy["measured"]["value"]
        return f"{speed:.2f}x the speed of plain decoding, {quality_metric} {value:.3g} ({full:.3g} at full depth)"

    exits = sorted(exits, key=lambda exit: -exit[0]["measured"]["speedup"])
    good = [exit for exit in exits if exit[1].needed is not None]
    if not good:
        best, _ = max(exits, key=lambda exit: exit[1].mean)
        missed = f"no early exit keeps more than {keep:.4g} of {quality_metric}, {full:.3g} at full depth"
        return None, f"none, because {missed}; the best, {policy_text(best)}, has {best['measured']['value']:.3g}"
    faster = [exit for exit in good if exit[0]["measured"]["speedup"] > to_beat]
    if not faster:
        best, _ = good[0]
        not_faster = f"is not faster than the policy exact ({to_beat:.2f}x)"
        return None, f"none, because {policy_text(best)} ({described(best)}) {not_faster}"
    for best, found in faster:
        if found.low >= 0:
            return best, f"{policy_text(best)}: {described(best)}"
    best, found = min(faster, key=lambda exit: exit[1].needed or 0)
    return None, (
        f"none, because {plural(found.prompts, 'prompt')} cannot show that an early exit keeps {keep:.4g} of "
        f"{quality_metric}; for {policy_text(best)} ({described(best)}) it would take about {found.needed} (`samples`)"
    )
