"""What a sweep advises, from known tables: Pareto marks, the recommendation and the policies."""

from dataclasses import replace

import pytest
import torch
from evaluating import outputs_of

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import SweepConfig, TaskConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.resolution import policy_packing
from layerskip_core.evaluation.measure import Measured
from layerskip_core.evaluation.measure.figures import baseline_drift, mark_pareto, prediction_error, recommend
from layerskip_core.evaluation.metrics import Scores, margin
from layerskip_core.evaluation.results import Difference, Failure, Result


def row(strategy, exit_layer=None, drafts=None, quality=0.9, speedup=1.0, **changes):
    figures = {"acceptance_rate": 0.7, "tokens_per_second": 100 * speedup, "speedup": speedup, "identical_outputs": 1.0}
    return Result(strategy, exit_layer, drafts, {"exact_match": quality}, **figures, **changes)


PLAIN = row("autoregressive")


def advise(table, drift=0.0, measured=(), **config):
    return recommend(table, 1e-3, drift, "exact_match", SweepConfig(task=TaskConfig("known"), **config), measured)


def timed(result, seconds=(10.0,) * 4, scores=None):
    """A row on prompts that take these seconds for 10 tokens. By default it was scored so often that its mean is certain."""
    scores = scores or Scores((result.metrics["exact_match"],) * 5000)
    return Measured(DecodingConfig(), (), [outputs_of(*([(10, each)] for each in seconds))], scores={"exact_match": scores})


def policies(*table, **config):
    advice = advise((PLAIN, *table), measured=[timed(result) for result in (PLAIN, *table)], **config)
    return advice.policies, advice.fast_reason


def scores(prompts, wrong=0):
    """Those of an exit that full depth beats on `wrong` prompts; full depth is right on all."""
    return Scores((0.0,) * wrong + (1.0,) * (prompts - wrong))


def kept(prompts, wrong=0, share=0.98):
    return margin(scores(prompts, wrong), scores(prompts), share, "exact_match")


def figures(value, speedup):
    return {"task": "known", "metric": "exact_match", "value": value, "full_depth": 0.9, "speedup": speedup}


def test_pareto_marks_of_a_known_table():
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
    marks = [result.pareto for result in mark_pareto(table, "exact_match")]
    assert marks == [False, True, False, False, True, True, True, False]


def test_the_fastest_faithful_setting_is_recommended():
    slower, best = row("self-speculative", 6, 4, speedup=1.7), row("self-speculative", 8, 6, speedup=1.82)
    table = [PLAIN, row("early-exit", 3, speedup=9), slower, best]
    advice = advise(table, drift=0.02)
    assert (advice.exit_layer, advice.num_draft_tokens, advice.speedup, advice.baseline_drift) == (8, 6, 1.82, 0.02)
    assert advice.reason == (
        "exit 8 with 6 draft tokens is the fastest of 2 settings: 1.82x the speed of autoregressive decoding "
        "(182 vs. 100 tokens/s), 70% of drafts accepted, 100% of outputs identical"
    )


def test_adaptive_drafting_is_preferred_to_a_fixed_setting_that_is_hardly_faster():
    adaptive, fixed = row("adaptive", speedup=1.8), row("self-speculative", 8, 6, speedup=1.88)
    advice = advise([PLAIN, fixed, adaptive])
    assert (advice.exit_layer, advice.speedup, advice.policies["exact"]["strategy"]) == (None, 1.8, "adaptive")
    assert advice.reason.startswith("adaptive is close to the fastest (1.88x) of 2 settings: 1.80x the speed")
    assert advise([PLAIN, replace(fixed, speedup=1.9), adaptive]).exit_layer == 8
    assert advise([PLAIN, replace(fixed, speedup=1.7), adaptive]).reason.startswith("adaptive is the fastest of 2 settings")


def test_adaptive_drafting_gives_way_to_a_fixed_setting_that_is_certainly_faster():
    """By 4%, on every prompt in one case, and on half of the prompts in the other."""
    fixed, adaptive = row("self-speculative", 8, 6, speedup=1.88), row("adaptive", speedup=1.8)

    def chosen(seconds):
        rows = [timed(*pair) for pair in ((PLAIN,), (fixed, (1.0, 1.1, 0.9, 1.0)), (adaptive, seconds))]
        return advise([PLAIN, fixed, adaptive], measured=rows).policies["exact"]["strategy"]

    assert chosen((1.04, 1.15, 0.94, 1.05)) == "self-speculative"
    assert chosen((1.3, 0.9, 1.1, 0.86)) == "adaptive"


def test_settings_that_may_be_as_fast_are_named():
    """One is slower on every prompt, another is as often faster as slower, and a third was not timed."""
    best, slow, close, untimed = (row("self-speculative", 8, drafts, speedup=1 + drafts / 100) for drafts in (80, 20, 79, 78))
    seconds = ((9.0,) * 4, (2.0, 2.1, 1.9, 2.0), (4.0,) * 4, (2.2, 1.9, 2.0, 2.1))
    rows = [timed(*pair) for pair in zip((PLAIN, best, slow, close), seconds, strict=True)]
    reason = advise([PLAIN, best, slow, close, untimed], measured=[*rows, None]).reason
    assert reason.endswith("; on these prompts it cannot be told from exit 8 with 79 draft tokens")
    assert "cannot be told" not in advise([PLAIN, best, slow], measured=rows[:3]).reason


def test_settings_that_change_the_output_are_excluded_unless_at_near_ties():
    wrong = row("self-speculative", 6, 4, speedup=3, differences=(Difference(0, 3, 0.5),))
    failed = row("self-speculative", 6, 6, speedup=3, failures=(Failure(0, "out of memory"),))
    tied = replace(row("self-speculative", 8, 6, speedup=1.82), identical_outputs=0.9, differences=(Difference(1, 3, 1e-4),))
    advice = advise([PLAIN, wrong, failed, tied])
    assert (advice.exit_layer, advice.num_draft_tokens) == (8, 6)
    assert advice.reason.endswith(
        "90% of outputs identical (1 differs at a near-tie); 2 of 3 settings changed the output and were excluded"
    )
    nothing = advise([PLAIN, wrong])
    assert (nothing.exit_layer, nothing.num_draft_tokens, nothing.speedup) == (None, None, None)
    assert nothing.reason.startswith("no setting that drafts kept the autoregressive outputs")


def test_speculation_that_does_not_pay_is_not_recommended_and_a_noisy_machine_is_reported():
    advice = advise([PLAIN, row("self-speculative", 8, 6, speedup=1.04)], drift=0.25)
    assert (advice.exit_layer, advice.num_draft_tokens, advice.speedup) == (None, None, 1.04)
    assert advice.reason.startswith("speculation does not pay on this model and machine: exit 8 with 6 draft tokens")
    assert "the autoregressive baseline itself varied by 25%" in advice.reason


def test_drift_is_the_median_change_of_the_baseline():
    first, second = (torch.tensor([seconds, [1.0, 2.0, 1.0]]) for seconds in ([1.0, 1.0, 1.0], [1.1, 0.8, 3.0]))
    assert baseline_drift(first, second) == pytest.approx(0.2)


def test_prediction_error_of_known_figures():
    table = [replace(row("self-speculative", 2, 2, speedup=1), predicted_speedup=x) for x in (0.9, 1.04, 1.01)]
    error = prediction_error([PLAIN, *table])
    assert (error.settings, error.median, error.largest, error.mean) == pytest.approx((3, 0.04, 0.1, -0.05 / 3))
    assert prediction_error([PLAIN]) is None


def test_exact_is_the_recommendation_and_fast_the_fastest_exit_that_keeps_the_quality():
    found, reason = policies(
        row("early-exit", 2, quality=0.5, speedup=4.0),
        row("early-exit", 4, quality=0.89, speedup=2.4),  # 98.9% of 0.9
        row("early-exit", 6, quality=0.9, speedup=2.2),
        row("self-speculative", 4, 6, speedup=1.8),
        row("lookup", None, 6, speedup=1.6),
    )
    assert found == {
        "exact": {"strategy": "self-speculative", "exit_layer": 4, "num_draft_tokens": 6, "measured": figures(0.9, 1.8)},
        "fast": {"strategy": "early-exit", "exit_layer": 4, "measured": figures(0.89, 2.4)},
    }
    assert reason == "exit 4: 2.40x the speed of plain decoding, exact_match 0.89 (0.9 at full depth)"


def test_keep_decides_which_exit_is_good_enough():
    exits = (row("early-exit", 2, quality=0.5, speedup=4.0), row("early-exit", 4, quality=0.89, speedup=2.4))
    assert policies(*exits, keep=0.5)[0]["fast"]["exit_layer"] == 2
    found, reason = policies(*exits, keep=0.99)
    assert list(found) == ["exact"]
    assert reason.startswith("none, because no early exit keeps more than 0.99 of exact_match")
    never_right = advise([replace(PLAIN, metrics={"exact_match": 0.0}), row("early-exit", 1, quality=0.0, speedup=5.0)])
    assert (list(never_right.policies), never_right.fast_reason) == (["exact"], "none, because exact_match is 0 at full depth")


def test_an_early_exit_that_is_no_faster_than_exact_is_not_saved():
    found, reason = policies(row("early-exit", 4, speedup=1.8), row("self-speculative", 4, 6, speedup=1.8))
    assert list(found) == ["exact"]
    assert reason.endswith("is not faster than the policy exact (1.80x)")
    found, reason = policies(row("early-exit", 4, speedup=0.9), row("self-speculative", 4, 6, speedup=0.8))
    assert found == {"exact": {"strategy": "autoregressive", "measured": figures(0.9, 1.0)}}
    assert reason.endswith("is not faster than the policy exact (1.00x)")


def test_a_dozen_equal_prompts_do_not_show_that_an_exit_keeps_the_quality():
    """Of an exit that is ten points worse, 12 prompts are all right in more than a quarter of the cases (0.9**12 = 0.28)."""
    table = [replace(PLAIN, metrics={"exact_match": 1.0}), row("early-exit", 4, quality=1.0, speedup=2.4)]

    def advice(prompts):
        return advise(table, measured=[timed(result, scores=scores(prompts)) for result in table])

    for prompts, saved in ((12, False), (100, False), (200, True)):
        assert ("fast" in advice(prompts).policies) == saved
    few = advice(12).fast_reason
    assert few.startswith("none, because 12 prompts cannot show that an early exit keeps 0.98 of exact_match; for exit 4 (")
    assert few.endswith("it would take about 138 (`samples`)")


def test_the_margin_over_a_share():
    # d = 1 - 0.98 = 0.02 on each prompt, 1 and -0.98 added: n * 0.02 = 1.96 sqrt(1 + 0.98**2) gives n = 137.2 of equal prompts.
    assert kept(12).mean == pytest.approx(0.02) and kept(12).low < -0.1
    assert kept(138).low == pytest.approx(0, abs=0.02)
    assert kept(1000, wrong=1).low > 0 > kept(1000, wrong=15).low and kept(1000, wrong=15).needed > 1000
    assert kept(1000, wrong=21).needed is None  # 0.979 is below the share


def test_a_perplexity_may_grow_by_the_share():
    """Texts of 100 tokens and ln 9 = 2.197 nats each: the perplexity may be 9 / 0.9 = 10, ln 10 = 2.303 nats."""
    tokens, full = (100,) * 50, [219.7 + (place % 5) for place in range(50)]

    def grown(nats):
        values = tuple(value + nats + place % 3 for place, value in enumerate(full))
        return margin(Scores(values, tokens), Scores(tuple(full), tokens), 0.9, "perplexity")

    assert grown(5.0).low > 0 > grown(9.5).low and grown(9.5).needed > 50 and grown(10.0).needed is None
    one = margin(Scores((225.0,), (100,)), Scores((219.7,), (100,)), 0.9, "perplexity")
    assert one.low < 0 < one.mean and one.needed == 2


def test_the_settings_that_a_sweep_was_measured_with_belong_to_the_policy():
    generation = {"max_new_tokens": 9, "draft_confidence": 0.4, "lookup": 3}
    found, _ = policies(row("self-speculative", 4, 6, speedup=1.8), row("early-exit", 2, speedup=2), generation=generation)
    assert (found["exact"]["draft_confidence"], found["exact"]["lookup"]) == (0.4, 3)
    assert not found["fast"].keys() & {"draft_confidence", "lookup"}


def test_exact_is_adaptive_unless_that_was_slower_than_plain_decoding():
    fixed = row("self-speculative", 4, 6, speedup=1.04)
    adaptive = row("adaptive", speedup=1.0)
    assert policies(fixed, adaptive)[0] == {"exact": {"strategy": "adaptive", "measured": figures(0.9, 1.0)}}
    for table, strategy in (
        ((fixed, replace(adaptive, speedup=0.999)), "autoregressive"),
        ((fixed, replace(adaptive, differences=(Difference(0, 3, 0.5),))), "autoregressive"),
        ((replace(fixed, speedup=1.06), adaptive), "self-speculative"),
    ):
        assert policies(*table)[0]["exact"]["strategy"] == strategy


def test_how_drafts_were_stored_belongs_to_the_policy():
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
    assert policy_packing(policies(row("adaptive", speedup=1.6), packing=packing)[0]["exact"]) == packing
    assert policy_packing(policies(row("lookup", None, 6, speedup=1.6), packing=packing)[0]["exact"]) == PackingConfig()
    fixed, _ = policies(row("self-speculative", 4, 6, speedup=1.6), row("early-exit", 2, speedup=1.7), packing=packing)
    assert policy_packing(fixed["exact"]) == PackingConfig(draft_vocab=500) and policy_packing(fixed["fast"]) == PackingConfig()
