"""Policies: what they hold, what they mean for a request, and what cannot be asked together with them."""

from dataclasses import asdict, fields

import pytest

from layerskip_core.config.decoding import DecodingConfig, DecodingSettings, ExitChoice, GenerationSettings, SamplingConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.policies import Measured, Policy, policy_named
from layerskip_core.errors import ConfigError

MEASURED = Measured("topv2", "exact_match", 0.9, 0.91, 1.8)
LOW = Policy("self-speculative", 8, 3, "int8", draft_confidence=0.5, lookup=4)


def test_the_fields_are_those_of_a_decoding_and_of_how_drafts_are_stored():
    known = {field.name for config in (DecodingConfig, PackingConfig) for field in fields(config)}
    assert {field.name for field in fields(Policy)} - {"measured", "draft_copies"} <= known


def test_how_its_drafts_are_stored():
    assert LOW.packing == PackingConfig(draft_weights=("int8",))
    several = Policy("adaptive", draft_copies=("int8", "int4"), draft_head="int4", draft_vocab=500)
    assert several.packing == PackingConfig(draft_weights=("int8", "int4"), draft_head="int4", draft_vocab=500)
    assert Policy("self-speculative", 8, 3, draft_vocab=500).packing == PackingConfig(draft_vocab=500)
    assert several.document() == {
        "strategy": "adaptive", "draft_copies": ("int8", "int4"), "draft_head": "int4", "draft_vocab": 500,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_copies": ("int8",)}, "`draft_copies` must be given for `strategy` adaptive, got `strategy` lookup"),
        ({"draft_head": "int8"}, "`draft_head` must be used with `draft_weights`, got int8"),
        ({"draft_weights": "int3"}, "`draft_weights` must be one of int8, int4, got int3"),
        ({"draft_vocab": -1}, "`draft_vocab` must be at least 0, got -1"),
    ],
)
def test_drafts_that_cannot_be_stored_so(changes, message):
    with pytest.raises(ConfigError) as error:
        Policy("lookup", **changes)
    assert str(error.value) == message


def test_a_document_holds_what_is_set():
    assert Policy("autoregressive").document() == {"strategy": "autoregressive"}
    assert Policy("early-exit", exits=(2, 4), exit_confidence=0.9, measured=MEASURED).document() == {
        "strategy": "early-exit", "exits": (2, 4), "exit_confidence": 0.9, "measured": asdict(MEASURED),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (Policy("autoregressive"), "plain decoding"),
        (Policy("self-speculative", 8, 6), "exit 8 with 6 draft tokens"),
        (Policy("self-speculative", 30, 6, "int8"), "exit 30 of the int8 copies with 6 draft tokens"),
        (Policy("lookup", num_draft_tokens=6), "lookup with 6 draft tokens"),
        (Policy("early-exit", 4), "exit 4"),
        (Policy("early-exit", exit_confidence=0.9), "exits by confidence 0.9"),
    ],
)
def test_names(policy, name):
    assert str(policy) == name


def test_a_policy_keeps_limit_stop_and_sampling_of_the_request():
    sampling = SamplingConfig(0.5, 3, 0.75, 7)
    settings = LOW.settings(GenerationSettings(9, 0.25, ("x",), sampling, lookup=2))
    assert settings == DecodingSettings("self-speculative", 8, 3, GenerationSettings(9, 0.5, ("x",), sampling, lookup=4))
    assert settings.resolve(ExitChoice(2, 6), 8, LOW.packing) == DecodingConfig(
        "self-speculative", 8, 3, 9, 0.5, ("x",), sampling, "int8", 4
    )
    assert Policy("early-exit", 4).packing == PackingConfig()
    confident = Policy("early-exit", exit_confidence=0.9, exits=(2, 4)).settings(GenerationSettings(9))
    expected = DecodingConfig("early-exit", None, 6, 9, exits=(2, 4), exit_confidence=0.9)
    assert confident.resolve(ExitChoice(2, 6, exits=(3,)), 8) == expected


def test_settings_are_open_where_nothing_is_said():
    sampling = GenerationSettings(9, stop=("x",), sampling=SamplingConfig(0.5))
    assert DecodingSettings().is_open and DecodingSettings(generation=sampling).is_open
    for said in (
        {"policy": "fast"}, {"strategy": "autoregressive"}, {"exit_layer": 2}, {"num_draft_tokens": 2},
        {"generation": GenerationSettings(draft_confidence=0.5)}, {"generation": GenerationSettings(lookup=2)},
    ):  # fmt: skip
        assert not DecodingSettings(**said).is_open, said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "lookup"}, "`policy` must be given without `strategy`, got `strategy` lookup"),
        ({"exit_layer": 4}, "`policy` must be given without `exit_layer`, got `exit_layer` 4"),
        ({"num_draft_tokens": 4}, "`policy` must be given without `num_draft_tokens`, got `num_draft_tokens` 4"),
        (
            {"generation": GenerationSettings(exit_confidence=0.5)},
            "`policy` must be given without `exit_confidence`, got `exit_confidence` 0.5",
        ),
    ],
)
def test_what_a_policy_sets_cannot_be_given_too(settings, message):
    with pytest.raises(ConfigError) as error:
        DecodingSettings(policy="fast", **settings)
    assert (str(error.value), error.value.field) == (message, "policy")


def test_a_policy_that_is_not_saved_names_those_that_are():
    policies = {"exact": Policy("autoregressive"), "mine": LOW}
    assert policy_named(policies, "mine") is LOW
    with pytest.raises(ConfigError) as error:
        policy_named(policies, "fast")
    assert str(error.value) == (
        "`policy` must be one that is saved with the model (exact, mine; `layerskip sweep-exits --save` saves exact, and fast "
        "where an early exit keeps the quality), got fast"
    )
    with pytest.raises(ConfigError, match=r"\(there are none; .*got exact"):
        policy_named({}, "exact")
