"""What a sweep advises: from known tables and known times on other prompts, and of simulated
sweeps.
"""

from dataclasses import replace
from math import exp
from random import Random

import pytest
import torch
from evaluating import collect

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import SweepConfig, TaskConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.resolution import policy_packing
from layerskip_core.evaluation.intervals import margin
from layerskip_core.evaluation.measure.measuring import Measured
from layerskip_core.evaluation.measure.recommendation import (
    Contest,
    contest,
    finalists,
    margins,
    recommend,
)
from layerskip_core.evaluation.metrics import Scores, frontier
from layerskip_core.evaluation.results import Difference, Failure, Result


@pytest.fixture(autouse=True)
def usual_turns(monkeypatch):
    """Not the few of other tests."""
    monkeypatch.setattr("layerskip_core.evaluation.measure.recommendation._FEWEST_TURNS", 8)


def row(strategy, exit_layer=None, drafts=None, quality=0.9, speedup=1.0, **changes):
    figures = {
        "acceptance_rate": 0.7,
        "tokens_per_second": 100 * speedup,
        "speedup": speedup,
        "identical_outputs": 1.0,
    }
    return Result(strategy, exit_layer, drafts, {"exact_match": quality}, **figures, **changes)


PLAIN = row("autoregressive")


def known_contest(places, speeds, spread=0.01):
    """16 or 64 prompts of 10 tokens; each setting is slower by the spread than its speed on its own
    half, else faster.
    """
    prompts = 16 if len(places) <= 4 else 64
    bits = [
        [1.0 if prompt >> number & 1 else -1.0 for prompt in range(prompts)]
        for number in range(len(places))
    ]
    slower = list(map(torch.tensor, bits))
    seconds = [
        10 / speeds[place] * (1 + spread * signs)
        for place, signs in zip(places, slower, strict=True)
    ]
    return Contest(
        places,
        torch.stack(
            [torch.stack([each, torch.full((prompts,), 10.0)]) for each in seconds]
        ).double(),
    )


def advise(table, speeds=None, spread=0.01, scores=None, **config):
    """`speeds`: on other prompts, if not those of the table. Each row's score is certain, unless
    `scores` are given.
    """
    speeds = speeds or [result.speedup for result in table]
    sure = [scores or Scores((result.metrics["exact_match"],) * 5000) for result in table]
    measured = [Measured(DecodingConfig(), (), scores={"exact_match": each}) for each in sure]
    keep = config.get("keep", SweepConfig.keep)
    places = finalists(table, 1e-3, margins(table, measured, "exact_match", keep))
    found = known_contest(places, speeds, spread) if places else None
    return recommend(
        table, 1e-3, "exact_match", SweepConfig(task=TaskConfig("known"), **config), measured, found
    )


def policies(*table, **config):
    advice = advise((PLAIN, *table), **config)
    return advice.policies, advice.fast_reason


def scores(prompts, wrong=0):
    """Those of an exit that full depth beats on `wrong` prompts; full depth is right on all."""
    return Scores((0.0,) * wrong + (1.0,) * (prompts - wrong))


def kept(prompts, wrong=0, share=0.98):
    return margin(scores(prompts, wrong), scores(prompts), share, "exact_match")


def figures(value, speedup):
    return {
        "task": "known",
        "metric": "exact_match",
        "value": value,
        "full_depth": 0.9,
        "speedup": pytest.approx(speedup),
    }


def test_the_frontier_of_a_known_table():
    table = [
        PLAIN,  # as good as the drafted ones, but slower
        row("early-exit", 3, quality=0.2, speedup=4),  # the fastest
        row("early-exit", 6, quality=0.1, speedup=3),  # beaten by exit 3 in both
        row("early-exit", 12, quality=0.8, speedup=1.9),  # slower and worse than exit 6 with drafts
        row("early-exit", 8, quality=0.8, speedup=2.5),
        row("self-speculative", 6, 4, speedup=2),
        row("self-speculative", 6, 8, speedup=2),  # the same point: neither beats the other
        row("self-speculative", 8, 8, speedup=1.5),
    ]
    assert frontier(table, "exact_match") == [1, 4, 5, 6]
    texts = [
        replace(each, metrics={"perplexity": value})
        for each, value in zip(table, (5.0, 9.0, 7.0), strict=False)
    ]
    # Lower is better
    assert frontier([*texts, replace(PLAIN, metrics={"other": 1.0})], "perplexity") == [0, 1, 2]


def test_the_fastest_faithful_setting_is_recommended_by_its_speed_on_other_prompts():
    slower = row("self-speculative", 6, 4, speedup=1.7)
    best = row("self-speculative", 8, 6, speedup=1.82)
    advice = advise([PLAIN, row("early-exit", 3, speedup=9), slower, best], [1.0, 9.0, 1.5, 1.6])
    assert (advice.exit_layer, advice.num_draft_tokens) == (8, 6) and advice.pays
    assert advice.speedup == pytest.approx(1.6) and 1.58 < advice.lower_end < 1.6
    assert advice.reason == (
        "exit 8 with 6 draft tokens is the fastest of 2 settings: 1.60x the speed of autoregressive decoding on 16 other "
        "prompts (at least 1.59x with 95% confidence), 70% of drafts accepted, 100% of outputs identical"
    )


def test_what_was_only_lucky_in_the_sweep_is_not_recommended():
    lucky = row("self-speculative", 8, 6, speedup=1.3)
    other = row("self-speculative", 6, 4, speedup=1.2)
    advice = advise([PLAIN, lucky, other], [1.0, 1.01, 0.99], 0.1)
    assert (advice.exit_layer, advice.num_draft_tokens, advice.pays) == (None, None, False)
    assert advice.policies["exact"]["strategy"] == "autoregressive" and advice.lower_end < 1
    told = "speculation does not pay on this model and machine: exit 8 with 6 draft tokens, the best setting, reaches 1.01x"
    assert advice.reason.startswith(told)
    assert advise([PLAIN, lucky, other], [1.0, 1.01, 1.2]).exit_layer == 6
    slow = advise([PLAIN, row("self-speculative", 8, 6, speedup=0.97)])  # nothing is timed again
    assert slow.reason.endswith("the best setting, reaches 0.97x") and slow.lower_end is None


SETTINGS = 20
PROMPTS = 12
NAMES = ["autoregressive", *["self-speculative"] * (SETTINGS - 1), "adaptive"]


class Machine:
    """Its speed wanders by 10%, and times have 3% of noise. Prompts suit settings more or less, by
    `spread`.
    """

    def __init__(self, seed, speeds, spread):
        self.draw = Random(seed)
        self.speeds = speeds
        self.spread = spread
        self.prompts = {}
        self.own = {}
        self.now = 0.0
        self.load = 0.0

    def answer(self, prompt, place):
        draw = self.draw
        tokens, base = self.prompts.setdefault(
            prompt, (draw.randint(20, 60), 0.001 * exp(draw.gauss(0, 0.2)))
        )
        own = self.own.setdefault((prompt, place), draw.gauss(0, self.spread) if place else 0.0)
        self.load = 0.98 * self.load + draw.gauss(0, 0.02)
        seconds = tokens * base / self.speeds[place] * exp(self.load - own + draw.gauss(0, 0.03))
        self.now += seconds
        return seconds, tokens


def simulated(seed, speed, spread):
    """(the advice, the place of the setting that has this speed, the best measured speed) of a
    sweep where others gain 0.
    """
    right = 1 + seed % (SETTINGS - 1)
    machine = Machine(
        seed, [speed if place == right else 1.0 for place in range(SETTINGS + 1)], spread
    )
    totals = [0.0] * (SETTINGS + 1)
    for prompt in range(PROMPTS):
        for place in range(SETTINGS + 1):
            totals[place] += machine.answer(prompt, place)[0]
    speeds = [totals[0] / total for total in totals]
    results = [
        Result(name, place, 4, {"known": 1.0}, speedup=speeds[place])
        for place, name in enumerate(NAMES)
    ]
    found = None
    budget = 0.25 * machine.now
    if places := finalists(results, 1e-3):
        run = contest(
            places,
            256,
            lambda *asked: machine.answer(1000 + asked[0], asked[1]),
            budget,
            clock=lambda: machine.now,
        )
        _, found = collect(run)
    measured = [Measured(DecodingConfig(), ())] * len(results)
    return recommend(results, 1e-3, "known", SweepConfig(), measured, found), right, max(speeds)


@pytest.mark.parametrize("spread", [0.05, 0.15])
def test_simulated_sweeps_recommend_what_pays_and_little_else(spread):
    """The fastest of a sweep was 1.05 or faster in a fifth to nine tenths of these 120 sweeps,
    where nothing pays.
    """
    nothing = [simulated(seed, 1.0, spread) for seed in range(120)]
    assert sum(advice.pays for advice, _, _ in nothing) <= 0.05 * len(nothing)
    assert sum(best >= 1.05 for *_, best in nothing) >= 0.15 * len(nothing)
    gaining = [simulated(seed, 1.2, spread) for seed in range(40)]
    assert sum(advice.exit_layer == right for advice, right, _ in gaining) >= 0.85 * len(gaining)


def test_adaptive_drafting_is_preferred_to_a_fixed_setting_that_is_hardly_faster():
    adaptive = row("adaptive", speedup=1.8)
    fixed = row("self-speculative", 8, 6, speedup=1.88)

    def chosen(fixed_speed, spread, adaptive_speed=1.8):
        return advise([PLAIN, fixed, adaptive], [1.0, fixed_speed, adaptive_speed], spread)

    close = chosen(1.88, 0.1)
    assert (close.exit_layer, close.policies["exact"]["strategy"]) == (None, "adaptive")
    assert close.reason.startswith(
        "adaptive is close to the fastest (1.88x) of 2 settings: 1.80x the speed"
    )
    assert chosen(1.88, 0.01).exit_layer == 8  # by 4%, but certainly
    assert chosen(1.95, 0.1).exit_layer == 8
    assert chosen(1.7, 0.01).reason.startswith("adaptive is the fastest of 2 settings")
    # Adaptive drafting itself must gain
    assert chosen(1.3, 0.1, adaptive_speed=1.02).exit_layer == 8


def test_settings_that_change_the_output_are_excluded_unless_at_near_ties():
    wrong = row("self-speculative", 6, 4, speedup=3, differences=(Difference(0, 3, 0.5),))
    failed = row("self-speculative", 6, 6, speedup=3, failures=(Failure(0, "out of memory"),))
    tied = replace(
        row("self-speculative", 8, 6, speedup=1.82),
        identical_outputs=0.9,
        differences=(Difference(1, 3, 1e-4),),
    )
    advice = advise([PLAIN, wrong, failed, tied])
    assert (advice.exit_layer, advice.num_draft_tokens) == (8, 6)
    assert advice.reason.endswith(
        "90% of outputs identical (1 differs at a near-tie); 2 of 3 settings changed the output and were excluded"
    )
    nothing = advise([PLAIN, wrong])
    assert (nothing.exit_layer, nothing.num_draft_tokens, nothing.speedup) == (None, None, None)
    assert nothing.reason.startswith("no setting that drafts kept the autoregressive outputs")


def test_exact_is_the_recommendation_and_fast_the_fastest_exit_that_keeps_the_quality():
    found, reason = policies(
        row("early-exit", 2, quality=0.5, speedup=4.0),
        row("early-exit", 4, quality=0.89, speedup=2.4),  # 98.9% of 0.9
        row("early-exit", 6, quality=0.9, speedup=2.2),
        row("self-speculative", 4, 6, speedup=1.8),
        row("lookup", None, 6, speedup=1.6),
    )
    assert found == {
        "exact": {
            "strategy": "self-speculative",
            "exit_layer": 4,
            "num_draft_tokens": 6,
            "measured": figures(0.9, 1.8),
        },
        "fast": {"strategy": "early-exit", "exit_layer": 4, "measured": figures(0.89, 2.4)},
    }
    timed = "timed on 64 other prompts"
    assert (
        reason
        == f"exit 4: 2.40x the speed of plain decoding, exact_match 0.89 (0.9 at full depth), {timed}"
    )


def test_an_exit_that_was_only_lucky_in_the_sweep_is_not_the_policy_fast():
    """On other prompts exit 4 is slower than the drafts, exit 6 certainly faster; a third is not
    timed again.
    """
    exits = [
        row("early-exit", 4, speedup=2.4),
        row("early-exit", 6, speedup=2.3),
        row("early-exit", 8, speedup=2.2),
    ]
    table = [PLAIN, *exits, row("self-speculative", 4, 6, speedup=1.8)]
    advice = advise(table, [1.0, 1.7, 2.0, 9.0, 1.8])
    assert advice.policies["fast"] == {
        "strategy": "early-exit",
        "exit_layer": 6,
        "measured": figures(0.9, 2.0),
    }
    unsure = advise(table, [1.0, 1.7, 1.82, 9.0, 1.8], spread=0.1)
    assert list(unsure.policies) == ["exact"]
    assert unsure.fast_reason.startswith("none, because exit 6 (1.82x the speed of plain decoding")
    assert unsure.fast_reason.endswith("is not certainly faster than the policy exact (1.80x)")
    alone = advise([PLAIN, exits[0]], [1.0, 1.7])  # no setting that drafts was timed
    assert (alone.policies["fast"]["exit_layer"], alone.policies["exact"]["strategy"]) == (
        4,
        "autoregressive",
    )


def test_many_exits_need_more_prompts_to_show_that_one_keeps_the_quality():
    """One of ten equal exits passes by chance more often than one alone (Bonferroni)."""

    def saved(exits, prompts):
        table = [replace(PLAIN, metrics={"exact_match": 1.0})]
        table += [
            row("early-exit", layer, quality=1.0, speedup=2.4) for layer in range(1, exits + 1)
        ]
        return "fast" in advise(table, scores=scores(prompts)).policies

    assert [saved(1, 160), saved(10, 160), saved(10, 240)] == [True, False, True]


def test_keep_decides_which_exit_is_good_enough():
    worse = row("early-exit", 2, quality=0.5, speedup=4.0)
    exits = (worse, row("early-exit", 4, quality=0.89, speedup=2.4))
    assert policies(*exits, keep=0.5)[0]["fast"]["exit_layer"] == 2
    found, reason = policies(*exits, keep=0.99)
    assert list(found) == ["exact"]
    assert reason.startswith("none, because no early exit keeps more than 0.99 of exact_match")


def test_an_early_exit_that_is_no_faster_than_exact_is_not_saved():
    found, reason = policies(
        row("early-exit", 4, speedup=1.8), row("self-speculative", 4, 6, speedup=1.8)
    )
    assert list(found) == ["exact"]
    assert reason.endswith("is not faster than the policy exact (1.80x)")
    found, reason = policies(
        row("early-exit", 4, speedup=0.9), row("self-speculative", 4, 6, speedup=0.8)
    )
    assert found == {"exact": {"strategy": "autoregressive", "measured": figures(0.9, 1.0)}}
    assert reason.endswith("is not faster than the policy exact (1.00x)")


def test_a_dozen_equal_prompts_do_not_show_that_an_exit_keeps_the_quality():
    """Of an exit that is ten points worse, 12 prompts are all right in more than a quarter of the
    cases (0.9**12 = 0.28).
    """
    table = [
        replace(PLAIN, metrics={"exact_match": 1.0}),
        row("early-exit", 4, quality=1.0, speedup=2.4),
    ]

    for prompts, saved in ((12, False), (100, False), (200, True)):
        assert ("fast" in advise(table, scores=scores(prompts)).policies) == saved
    few = advise(table, scores=scores(12)).fast_reason
    assert few.startswith(
        "none, because 12 prompts cannot show that an early exit keeps 0.98 of exact_match; for exit 4 ("
    )
    assert few.endswith("it would take about 138 (`samples`)")


def test_the_settings_of_a_sweep_and_how_drafts_were_stored_belong_to_the_policy():
    table = (
        row("self-speculative", 8, 3, speedup=1.6, draft_weights="int8"),
        row("early-exit", speedup=1.9, exit_confidence=0.9, exits=(2, 4)),
    )
    packing = PackingConfig(draft_weights=("int8", "int4"), draft_head="int4", draft_vocab=500)
    found, _ = policies(*table, packing=packing)
    assert (found["exact"]["exit_layer"], found["exact"]["draft_weights"]) == (8, "int8")
    assert policy_packing(found["exact"]) == replace(packing, draft_weights=("int8",))
    assert (found["fast"]["exit_confidence"], found["fast"]["exits"]) == (0.9, [2, 4])
    assert policy_packing(found["fast"]) == PackingConfig(draft_vocab=500)
    assert (
        policy_packing(policies(row("adaptive", speedup=1.6), packing=packing)[0]["exact"])
        == packing
    )
    assert (
        policy_packing(policies(row("lookup", None, 6, speedup=1.6), packing=packing)[0]["exact"])
        == PackingConfig()
    )
    fixed, _ = policies(
        row("self-speculative", 4, 6, speedup=1.6),
        row("early-exit", 2, speedup=1.7),
        packing=packing,
    )
    assert (
        policy_packing(fixed["exact"]) == PackingConfig(draft_vocab=500)
        and policy_packing(fixed["fast"]) == PackingConfig()
    )
    generation = {"max_new_tokens": 9, "lookup": 3}
    found, _ = policies(
        row("self-speculative", 4, 6, speedup=1.8),
        row("early-exit", 2, speedup=2),
        generation=generation,
    )
    assert found["exact"]["lookup"] == 3
    assert "lookup" not in found["fast"]
