"""The sweep: a run on the tiny model, its default grids, and layers that are skipped."""

import re
from dataclasses import replace

import pytest
from evaluating import (
    LAYERS,
    TRAINED,
    collect,
    early_exit_share,
    own_answers,
    repacked,
    tiny_loaded,
)

from layerskip_core.config.evaluation import BenchConfig, SweepConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.options import counts_text, parse_counts
from layerskip_core.config.resolution import default_exits
from layerskip_core.errors import ConfigError
from layerskip_core.evaluation.intervals import metric
from layerskip_core.evaluation.measure import passes
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.measure.measuring import Progress
from layerskip_core.evaluation.measure.passes import PassTimes
from layerskip_core.evaluation.measure.sweep import sweep
from layerskip_core.evaluation.metrics import reference_losses, scores_by_exit
from layerskip_core.evaluation.report.tables import results_table

CONFIDENCE = 0.03  # that the tiny model has in some tokens


@pytest.mark.parametrize(
    "text, counts, written",
    [
        ("8, 3,3", (3, 8), "3,8"),
        ("2:8:3, 1, 5:6", (1, 2, 5, 6, 8), "1,2,5,6,8"),
        ("8,9,14:18", (8, 9, 14, 15, 16, 17, 18), "8,9,14:18"),
    ],
)
def test_counts_and_their_text(text, counts, written):
    assert parse_counts(text, "exits") == parse_counts(written, "exits") == counts
    assert counts_text(counts) == written


@pytest.mark.parametrize(
    "layers, exits", [(24, (3, 4, 6, 8, 12, 18)), (6, (1, 2, 3, 4)), (2, (1,))]
)
def test_default_exits(layers, exits):
    assert default_exits(layers) == exits


def swept(loaded, task, **config):
    _, record = collect(sweep(loaded, task, SweepConfig("tiny", **config)))
    return record


def drafters(record):
    """Weights, exit and drafts of each row that drafted by itself."""
    return [
        (result.draft_weights, result.exit_layer, result.num_draft_tokens)
        for result in record.results
        if result.strategy == "self-speculative"
    ]


def test_a_sweep_of_the_tiny_model():
    loaded = tiny_loaded()
    task = own_answers()
    progress, record = collect(sweep(loaded, task, SweepConfig("tiny", exits=(2, 5), specs=(2, 4))))
    # 3 prompts, and all settings timed once
    expected = [Progress(done, 3, "perplexity") for done in (1, 2, 3)]
    expected += [Progress(done, 4, "prediction", comparing=True) for done in (1, 2, 3, 4)]
    expected += [Progress(done, 3, "prompts") for done in (1, 2, 3)]
    assert progress[: len(expected)] == expected
    # As far as a draft was faster than full depth
    once_more = progress[len(expected) :]
    assert {event.phase for event in once_more} <= {"the best once more"}
    assert [result.strategy for result in record.results] == [
        "autoregressive",
        *["early-exit"] * 2,
        *["self-speculative"] * 4,
        *["lookup"] * 2,
        "adaptive",
    ]
    assert drafters(record) == [(None, layer, drafts) for layer in (2, 5) for drafts in (2, 4)]
    plain, *early_exits = record.results[:3]
    drafted = record.results[3:7]
    others = record.results[7:]
    shares = [early_exit_share(loaded, task, layer) for layer in (2, 5)]
    assert max(shares) < 1
    for result, share in zip(record.results, [1.0, *shares, *[1.0] * 7], strict=True):
        assert result.metrics["exact_match"] == result.identical_outputs == share
        expected_speedup = result.tokens_per_second / plain.tokens_per_second
        assert result.speedup == pytest.approx(expected_speedup)
    losses = [reference_losses(loaded, example, [2, 5, LAYERS]) for example in task.examples]
    perplexity = scores_by_exit(losses)
    for result, layer in zip((plain, *early_exits), (LAYERS, 2, 5), strict=True):
        assert result.perplexity == metric(perplexity[layer]).value
    for result in (*drafted, *others):
        assert result.perplexity is None
        assert (result.predicted_speedup is None) == (result in others)
    assert drafted[0].steps_by_drafter["exit 2"] > 0
    # A deeper exit of this model agrees with it more often.
    assert drafted[2].acceptance_rate > drafted[0].acceptance_rate
    assert early_exits[0].agreement < early_exits[1].agreement < 1
    for result in drafted:
        assert 0 <= result.mean_accepted_tokens <= result.num_draft_tokens
        assert list(result.pass_times_ms) == ["draft", "verify", "other", "plain"]
    assert record.config["exits"] == (2, 5)
    advice = record.recommendation
    assert advice.policies["exact"]["measured"]["speedup"] >= 1
    assert (advice.lower_end is not None) == bool(once_more)
    assert advice.pays == ((advice.lower_end or 0) > 1)
    kept = "none, because no early exit keeps more than 0.98 of exact_match, 1 at full depth"
    assert advice.fast_reason.startswith(kept)
    low, high = early_exits[1].changes["exact_match"]
    assert low < shares[1] - 1 < high and plain.changes == drafted[0].changes == {}
    assert re.search(r"(exit \d|lookup) with \d draft tokens|adaptive", advice.reason)


def test_low_bit_copies_draft_with_all_layers():
    """Of a model without trained exits only the copies' full depth is swept; exits are if they are
    given.
    """
    packing = PackingConfig(draft_weights=("int8", "int4"))
    untrained = repacked(packing)
    record = swept(untrained, own_answers(), specs=(3,), packing=packing)
    assert drafters(record) == [("int8", LAYERS, 3), ("int4", LAYERS, 3)]
    assert not any(result.strategy == "early-exit" for result in record.results)
    int8, int4 = record.results[1:3]
    assert int8.identical_outputs == int4.identical_outputs == 1.0
    assert 0.5 < int4.agreement < int8.agreement and int8.predicted_speedup > 0
    assert int8.steps_by_drafter["int8"] > 0
    record = swept(untrained, own_answers(1), specs=(3,), packing=packing, exits=(2, LAYERS))
    of_copies = [("int8", 2, 3), ("int8", LAYERS, 3), ("int4", 2, 3), ("int4", LAYERS, 3)]
    assert drafters(record) == [(None, 2, 3), *of_copies]
    (alone,) = [result.exit_layer for result in record.results if result.strategy == "early-exit"]
    assert alone == 2


def test_the_default_grid_has_the_copy_of_adaptive_drafting_and_longer_drafts_where_they_gain(
    monkeypatch,
):
    """A draft costs a tenth of a plain step by all layers of the copy, as much as one by the
    model's own exits.
    """

    def known_times(loaded, part, setting, plain):
        draft = 0.1 if setting.draft_weights else 1.0
        return PassTimes(draft, verify=1.0, other=0.0, plain=1.0)

    monkeypatch.setattr(passes, "pass_times", known_times)
    # As adaptive drafting asks for
    trained = repacked(PackingConfig(draft_weights=("int8",)), info=TRAINED)
    task = own_answers(1)
    record = swept(trained, task, exit_confidences=(), generation={"max_new_tokens": 48})
    lengths = {}
    for weights, exit_layer, drafts in drafters(record):
        lengths.setdefault((weights, exit_layer), []).append(drafts)
    assert list(lengths) == [(None, 2), (None, 4), ("int8", 2), ("int8", 4), ("int8", LAYERS)]
    assert lengths["int8", LAYERS][-1] > 12 and lengths[None, 2] == [2]
    best = max(record.results, key=lambda result: result.predicted_speedup or 0.0)
    assert (best.draft_weights, best.exit_layer, best.identical_outputs) == ("int8", LAYERS, 1.0)
    assert record.config["packing"]["draft_weights"] == () and "int8" in record.profile.acceptance
    record = swept(trained, task, exits=(2,), specs=(2, 3), exit_confidences=())
    assert drafters(record) == [(None, 2, 2), (None, 2, 3)]


def test_exits_by_confidence_are_swept_where_exits_were_trained():
    trained = replace(tiny_loaded(), info=TRAINED)

    def by_confidence(loaded, task, **changes):
        record = swept(loaded, task, exits=(2,), specs=(2,), **changes)
        return [result for result in record.results if result.exit_confidence is not None]

    some, never = by_confidence(trained, own_answers(), exit_confidences=(CONFIDENCE, 1.0))
    assert (some.strategy, some.exit_layer, some.exits) == ("early-exit", None, (2, 4))
    assert 2 < some.mean_layers < never.mean_layers == LAYERS
    assert some.identical_outputs < never.identical_outputs == never.metrics["exact_match"] == 1.0
    assert some.perplexity is some.agreement is some.predicted_speedup is None
    usual = [result.exit_confidence for result in by_confidence(trained, own_answers(1))]
    assert usual == [0.8, 0.9, 0.95]
    (untrained,) = by_confidence(tiny_loaded(), own_answers(1), exit_confidences=(0.5,))
    assert untrained.exits == (2,)  # none was trained: the sweep's


def test_the_confidence_of_a_sweep_is_one_of_several():
    with pytest.raises(ConfigError, match="`exit_confidence` must be left out of a sweep"):
        SweepConfig(generation={"exit_confidence": 0.5})


def test_given_layers_are_measured_at_every_draft_length():
    loaded = tiny_loaded()
    task = own_answers(1)
    record = swept(loaded, task, exits=(3,), specs=(2, 4), generation={"skip": [2, 5]})
    rows = [row for row in record.results if row.strategy == "draft-and-verify"]
    assert [(row.skip, row.num_draft_tokens) for row in rows] == [((2, 5), 2), ((2, 5), 4)]
    with pytest.raises(ConfigError, match=r"`skip` must be in 1..6, got 9 \(model has 6 layers\)"):
        swept(loaded, task, generation={"skip": [9]})
    asked = {"strategies": ("autoregressive",), "generation": {"skip": [3]}, "repeats": 1}
    _, record = collect(bench(loaded, task, BenchConfig("tiny", **asked)))
    found = [(result.strategy, result.skip) for result in record.results]
    assert found == [("autoregressive", ()), ("draft-and-verify", (3,))]
    assert "Layers that drafts skip: --skip 3." in results_table(record).text
