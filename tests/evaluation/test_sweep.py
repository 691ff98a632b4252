"""The sweep: Pareto marks and recommendations from known tables, and a run on the tiny model."""

import re
from dataclasses import replace

import pytest
from evaluating import LAYERS, TRAINED, early_exit_share, own_answers, repacked, tiny_loaded

from layerskip_core.config.evaluation import SweepConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.options import counts_text, parse_counts
from layerskip_core.config.resolution import default_exits
from layerskip_core.errors import ConfigError
from layerskip_core.evaluation.measure import Progress
from layerskip_core.evaluation.measure.cost_model import PassTimes
from layerskip_core.evaluation.measure.sweep import sweep
from layerskip_core.evaluation.metrics import metric, reference_losses, scores_by_exit

CONFIDENCE = 0.03  # that the tiny model has in some tokens


@pytest.mark.parametrize(
    ("text", "counts", "written"),
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
    ("layers", "exits"), [(24, (3, 4, 6, 8, 12, 18)), (6, (1, 2, 3, 4)), (2, (1,))]
)
def test_default_exits(layers, exits):
    assert default_exits(layers) == exits


def test_a_sweep_of_the_tiny_model():
    loaded = tiny_loaded()
    task = own_answers()
    *progress, record = sweep(loaded, task, SweepConfig("tiny", exits=(2, 5), specs=(2, 4)))
    # 3 prompts, and all settings timed once
    phases = (("perplexity", 3), ("prediction", 4), ("prompts", 3))
    expected = [
        Progress(done + 1, total, phase, comparing=phase == "prediction")
        for phase, total in phases
        for done in range(total)
    ]
    once_more = progress[len(expected) :]  # as far as a draft was faster than full depth
    assert progress[: len(expected)] == expected and {event.phase for event in once_more} <= {
        "the best once more"
    }
    settings = [
        (result.strategy, result.exit_layer, result.num_draft_tokens) for result in record.results
    ]
    exits = [("early-exit", layer, None) for layer in (2, 5)]
    drafting = [("self-speculative", layer, drafts) for layer in (2, 5) for drafts in (2, 4)]
    lookups = [("lookup", None, drafts) for drafts in (2, 4)]
    assert settings == [
        ("autoregressive", None, None),
        *exits,
        *drafting,
        *lookups,
        ("adaptive", None, None),
    ]
    plain, *early_exits = record.results[:3]
    drafted = record.results[3:7]
    others = record.results[7:]
    shares = [early_exit_share(loaded, task, layer) for layer in (2, 5)]
    assert max(shares) < 1
    assert [result.metrics["exact_match"] for result in record.results[:3]] == [1.0, *shares]
    assert [result.identical_outputs for result in record.results[:3]] == [1.0, *shares]
    assert all(
        (result.metrics["exact_match"], result.identical_outputs) == (1.0, 1.0)
        for result in (*drafted, *others)
    )
    for result in record.results[1:]:
        assert result.speedup == pytest.approx(result.tokens_per_second / plain.tokens_per_second)
    perplexity = scores_by_exit(
        reference_losses(loaded, example, [2, 5, LAYERS]) for example in task.examples
    )
    assert [result.perplexity for result in (plain, *early_exits)] == [
        metric(perplexity[layer]).value for layer in (LAYERS, 2, 5)
    ]
    assert all(result.perplexity is None for result in (*drafted, *others))
    assert all(result.predicted_speedup is None for result in others)
    assert drafted[0].steps_by_drafter["exit 2"] > 0
    assert set(others[0].steps_by_drafter) <= {"lookup", "plain"}
    # A deeper exit of this model agrees with it more often.
    assert drafted[2].acceptance_rate > drafted[0].acceptance_rate
    for result in drafted:
        assert 0 <= result.mean_accepted_tokens <= result.num_draft_tokens
        assert result.predicted_speedup > 0
        assert list(result.pass_times_ms) == ["draft", "verify", "other", "plain"]
    assert early_exits[0].agreement < early_exits[1].agreement < 1
    assert record.config["exits"] == (2, 5)
    advice = record.recommendation
    assert advice.policies["exact"]["measured"]["speedup"] >= 1
    assert (advice.lower_end is not None) == bool(once_more) and advice.pays == (
        (advice.lower_end or 0) > 1
    )
    assert not once_more or re.search(
        r"speed of autoregressive decoding on \d+ prompts \(at least [\d.]+x", advice.reason
    )
    assert advice.fast_reason.startswith(
        "none, because no early exit keeps more than 0.98 of exact_match, 1 at full depth"
    )
    low, high = early_exits[1].changes["exact_match"]
    assert low < shares[1] - 1 < high and plain.changes == drafted[0].changes == {}
    assert re.search(r"(exit \d|lookup) with \d draft tokens|adaptive", advice.reason)


def test_low_bit_copies_draft_with_all_layers():
    """Of a model without trained exits only the copies' full depth is swept; exits are if they are
    given.
    """
    packing = PackingConfig(draft_weights=("int8", "int4"))
    untrained = repacked(packing)
    config = SweepConfig("tiny", specs=(3,), packing=packing)
    *_, record = sweep(untrained, own_answers(), config)
    drafted = [result for result in record.results if result.strategy == "self-speculative"]
    assert [(result.draft_weights, result.exit_layer) for result in drafted] == [
        ("int8", LAYERS),
        ("int4", LAYERS),
    ]
    assert not any(result.strategy == "early-exit" for result in record.results)
    assert all(
        result.identical_outputs == 1.0 and result.predicted_speedup > 0 for result in drafted
    )
    assert 0.5 < drafted[1].agreement < drafted[0].agreement
    assert drafted[0].steps_by_drafter["int8"] > 0
    *_, record = sweep(untrained, own_answers(1), replace(config, exits=(2, LAYERS)))
    drafted = [
        (result.draft_weights, result.exit_layer)
        for result in record.results
        if result.strategy == "self-speculative"
    ]
    assert drafted == [(None, 2), ("int8", 2), ("int8", LAYERS), ("int4", 2), ("int4", LAYERS)]
    (alone,) = [result.exit_layer for result in record.results if result.strategy == "early-exit"]
    assert alone == 2


def test_the_default_grid_has_the_copy_of_adaptive_drafting_and_longer_drafts_where_they_gain(
    monkeypatch,
):
    """A draft costs a tenth of a plain step by all layers of the copy, as much as one by the
    model's own exits.
    """
    from layerskip_core.evaluation.measure import cost_model

    def known_times(loaded, part, setting, plain):
        return PassTimes(
            draft=0.1 if setting.draft_weights else 1.0, verify=1.0, other=0.0, plain=1.0
        )

    monkeypatch.setattr(cost_model, "pass_times", known_times)
    # As adaptive drafting asks for
    trained = repacked(PackingConfig(draft_weights=("int8",)), info=TRAINED)
    generation = {"max_new_tokens": 48}
    *_, record = sweep(
        trained, own_answers(1), SweepConfig("tiny", exit_confidences=(), generation=generation)
    )
    lengths: dict[tuple[str | None, int], list[int]] = {}
    for result in record.results:
        if result.strategy == "self-speculative":
            lengths.setdefault((result.draft_weights, result.exit_layer), []).append(
                result.num_draft_tokens
            )
    assert list(lengths) == [(None, 2), (None, 4), ("int8", 2), ("int8", 4), ("int8", LAYERS)]
    assert lengths["int8", LAYERS][-1] > 12 and lengths[None, 2] == [2]
    best = max(
        (result for result in record.results), key=lambda result: result.predicted_speedup or 0.0
    )
    assert (best.draft_weights, best.exit_layer) == (
        "int8",
        LAYERS,
    ) and best.identical_outputs == 1.0
    assert record.config["packing"]["draft_weights"] == () and "int8" in record.profile.acceptance
    *_, record = sweep(
        trained, own_answers(1), SweepConfig("tiny", exits=(2,), specs=(2, 3), exit_confidences=())
    )
    drafted = [result for result in record.results if result.strategy == "self-speculative"]
    assert [(result.draft_weights, result.num_draft_tokens) for result in drafted] == [
        (None, 2),
        (None, 3),
    ]


def test_exits_by_confidence_are_swept_where_exits_were_trained():
    trained = replace(tiny_loaded(), info=TRAINED)
    settings = SweepConfig("tiny", exits=(2,), specs=(2,))

    def by_confidence(loaded, task, **changes):
        *_, record = sweep(loaded, task, replace(settings, **changes))
        return [result for result in record.results if result.exit_confidence is not None]

    some, never = by_confidence(trained, own_answers(), exit_confidences=(CONFIDENCE, 1.0))
    assert (some.strategy, some.exit_layer, some.exits, never.exit_confidence) == (
        "early-exit",
        None,
        (2, 4),
        1.0,
    )
    assert 2 < some.mean_layers < never.mean_layers == LAYERS
    assert some.identical_outputs < never.identical_outputs == never.metrics["exact_match"] == 1.0
    assert (some.perplexity, some.agreement, some.predicted_speedup) == (None, None, None)
    assert [result.exit_confidence for result in by_confidence(trained, own_answers(1))] == [
        0.8,
        0.9,
        0.95,
    ]
    (untrained,) = by_confidence(tiny_loaded(), own_answers(1), exit_confidences=(0.5,))
    assert untrained.exits == (2,)  # none was trained: the sweep's


def test_the_confidence_of_a_sweep_is_one_of_several():
    with pytest.raises(ConfigError, match="`exit_confidence` must be left out of a sweep"):
        SweepConfig(generation={"exit_confidence": 0.5})
