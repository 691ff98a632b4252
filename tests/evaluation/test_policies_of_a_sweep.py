"""The policies of a sweep, from known tables."""

from dataclasses import replace

import pytest

from layerskip_core.config.decoding import GenerationSettings
from layerskip_core.config.evaluation import SweepConfig, TaskConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.policies import Measured, Policy
from layerskip_core.evaluation.measure.recommendation import recommend
from layerskip_core.evaluation.metrics import keeps
from layerskip_core.evaluation.results import Difference, ExitResult


def row(strategy, exit_layer=None, drafts=None, quality=0.9, speedup=1.0, metric="exact_match", **changes):
    return ExitResult(
        strategy, exit_layer, drafts, {metric: quality}, None, 0.7, 3.0, 100 * speedup, speedup, 1.0, **changes
    )  # fmt: skip


PLAIN = row("autoregressive")


def policies(*table, metric="exact_match", **config):
    settings = SweepConfig(task=TaskConfig("known"), **config)
    advice = recommend([replace(PLAIN, metrics={metric: PLAIN.metrics["exact_match"]}), *table], 1e-3, 0.0, metric, settings)
    return advice.policies, advice.fast_reason


def measured(value, speedup):
    return Measured("known", "exact_match", value, 0.9, speedup)


def test_exact_is_the_recommendation_and_fast_the_fastest_exit_that_keeps_the_quality():
    found, reason = policies(
        row("early-exit", 2, quality=0.5, speedup=4.0),
        row("early-exit", 4, quality=0.89, speedup=2.4),  # 98.9% of 0.9
        row("early-exit", 6, quality=0.9, speedup=2.2),
        row("self-speculative", 4, 6, speedup=1.8),
        row("lookup", None, 6, speedup=1.6),
    )
    assert found == {
        "exact": Policy("self-speculative", 4, 6, measured=measured(0.9, 1.8)),
        "fast": Policy("early-exit", 4, measured=measured(0.89, 2.4)),
    }
    assert reason == "exit 4: 2.40x the speed of plain decoding, exact_match 0.89 (0.9 at full depth)"


def test_keep_decides_which_exit_is_good_enough():
    exits = (row("early-exit", 2, quality=0.5, speedup=4.0), row("early-exit", 4, quality=0.89, speedup=2.4))
    assert policies(*exits, keep=0.5)[0]["fast"].exit_layer == 2
    found, reason = policies(*exits, keep=0.99)
    assert list(found) == ["exact"]
    assert reason == "none, because no early exit keeps 0.99 of exact_match, 0.9 at full depth; the best, exit 4, has 0.89"


def test_an_early_exit_that_is_no_faster_than_exact_is_not_saved():
    found, reason = policies(row("early-exit", 4, speedup=1.8), row("self-speculative", 4, 6, speedup=1.8))
    assert list(found) == ["exact"]
    assert reason.endswith(
        "(1.80x the speed of plain decoding, exact_match 0.9 (0.9 at full depth)) is not faster than the policy exact (1.80x)"
    )
    found, reason = policies(row("early-exit", 4, speedup=0.9), row("self-speculative", 4, 6, speedup=0.8))
    assert found == {"exact": Policy("autoregressive", measured=measured(0.9, 1.0))}
    assert reason.endswith("is not faster than the policy exact (1.00x)")


def test_a_model_that_never_answers_right_has_no_quality_to_keep():
    wrong = replace(PLAIN, metrics={"exact_match": 0.0})
    advice = recommend([wrong, row("early-exit", 1, quality=0.0, speedup=5.0)], 1e-3, 0.0, "exact_match", SweepConfig())
    assert list(advice.policies) == ["exact"]
    assert advice.fast_reason == "none, because exact_match is 0 at full depth"


def test_where_lower_is_better_the_metric_may_grow_by_the_share():
    exits = [
        row("early-exit", layer, quality=ppl, speedup=8 - layer, metric="perplexity") for layer, ppl in ((2, 0.93), (4, 0.91))
    ]
    found, _ = policies(*exits, metric="perplexity")  # 0.9 / 0.98 = 0.918
    assert found["fast"].exit_layer == 4
    by_confidence = row("early-exit", None, quality=0.9, speedup=9.0, metric="perplexity")
    assert policies(by_confidence, metric="perplexity") == (
        {"exact": found["exact"]},
        "none, because no early exit was measured",
    )
    reason = policies(*exits, metric="perplexity", keep=1.0)[1]
    assert reason == "none, because no early exit keeps 1 of perplexity, 0.9 at full depth; the best, exit 4, has 0.91"


@pytest.mark.parametrize(
    ("value", "full", "name", "kept"),
    [
        (0.98, 1.0, "rouge2", True), (0.979, 1.0, "rouge2", False), (1.2, 1.0, "rouge2", True),
        (10.2, 10.0, "perplexity", True), (10.21, 10.0, "perplexity", False), (9.0, 10.0, "perplexity", True),
    ],
)  # fmt: skip
def test_keeping_a_share(value, full, name, kept):
    assert keeps(value, full, 0.98, name) == kept


def test_the_settings_that_a_sweep_was_measured_with_belong_to_the_policy():
    generation = GenerationSettings(9, draft_confidence=0.4, lookup=3)
    found, _ = policies(row("self-speculative", 4, 6, speedup=1.8), row("early-exit", 2, speedup=2), generation=generation)
    assert (found["exact"].draft_confidence, found["exact"].lookup) == (0.4, 3)
    assert (found["fast"].draft_confidence, found["fast"].lookup) == (0.0, 0)


def test_an_exit_by_confidence_can_be_fast():
    found, reason = policies(
        row("early-exit", 4, speedup=1.5), row("early-exit", speedup=1.9, exit_confidence=0.9, exits=(2, 4))
    )
    assert found["fast"] == Policy("early-exit", exit_confidence=0.9, exits=(2, 4), measured=measured(0.9, 1.9))
    assert reason.startswith("exits by confidence 0.9: 1.90x the speed of plain decoding")


def test_exact_is_adaptive_unless_that_was_slower_than_plain_decoding():
    fixed = row("self-speculative", 4, 6, speedup=1.04)
    assert policies(fixed, row("adaptive", speedup=1.0))[0] == {"exact": Policy("adaptive", measured=measured(0.9, 1.0))}
    assert policies(fixed, row("adaptive", speedup=0.999))[0]["exact"].strategy == "autoregressive"
    assert (
        policies(fixed, row("adaptive", quality=0.8, speedup=1.0, differences=(Difference(0, 3, 0.5),)))[0]["exact"].strategy
        == "autoregressive"
    )
    assert policies(replace(fixed, speedup=1.06), row("adaptive", speedup=1.0))[0]["exact"].strategy == "self-speculative"


def test_how_drafts_were_stored_belongs_to_the_policy():
    table = (
        row("self-speculative", 8, 3, speedup=1.6, draft_weights="int8"),
        row("early-exit", speedup=1.9, exit_confidence=0.9, exits=(2, 4)),
    )
    packing = PackingConfig(draft_weights=("int8", "int4"), draft_head="int4", draft_vocab=500)
    found, _ = policies(*table, packing=packing)
    assert found["exact"].packing == replace(packing, draft_weights=("int8",))
    assert found["fast"].packing == PackingConfig(draft_vocab=500)
    assert policies(row("adaptive", speedup=1.6), packing=packing)[0]["exact"].packing == packing
    assert policies(row("lookup", None, 6, speedup=1.6), packing=packing)[0]["exact"].packing == PackingConfig()
    fixed, _ = policies(row("self-speculative", 4, 6, speedup=1.6), row("early-exit", 2, speedup=1.7), packing=packing)
    assert fixed["exact"].packing == PackingConfig(draft_vocab=500) and fixed["fast"].packing == PackingConfig()


def test_low_bit_drafts_can_be_exact():
    found, _ = policies(
        row("self-speculative", 6, 4, speedup=1.5), row("self-speculative", 8, 3, speedup=1.6, draft_weights="int8")
    )
    assert found["exact"] == Policy("self-speculative", 8, 3, "int8", measured=measured(0.9, 1.6))
