"""layerskip.json: policies written and read back, files of older versions, damaged ones."""

import json
from dataclasses import replace
from math import exp

import pytest

from layerskip_core.checkpoint.info import CheckpointInfo, read_info
from layerskip_core.config.decoding import DraftProfile
from layerskip_core.config.model import PackingConfig
from layerskip_core.errors import CheckpointError

POLICIES = {
    "exact": {
        "strategy": "self-speculative",
        "exit_layer": 6,
        "num_draft_tokens": 4,
        "draft_weights": "int8",
        "lookup": 3,
        "measured": {
            "task": "topv2",
            "metric": "exact_match",
            "value": 0.9,
            "full_depth": 0.9,
            "speedup": 1.8,
        },
    },
    "fast": {"strategy": "early-exit", "exits": [2, 4], "exit_confidence": 0.9},
    "my own": {"strategy": "autoregressive"},
    "trimmed": {
        "strategy": "adaptive",
        "draft_copies": ["int8", "int4"],
        "draft_head": "int4",
        "draft_vocab": 500,
    },
}


def write(folder, content):
    (folder / "layerskip.json").write_text(content, encoding="utf-8")
    return read_info(folder)


def test_policies_are_read_as_they_were_written_if_there_are_any(tmp_path):
    info = CheckpointInfo(
        "{prompt}\n", strategy="autoregressive", details={"rows": 7}, policies=POLICIES
    )
    assert write(tmp_path, info.to_json()) == info
    document = json.loads(info.to_json())
    assert document["recommended"] == {
        "exit_layer": None,
        "num_draft_tokens": None,
        "strategy": "autoregressive",
    }
    assert document["policies"]["fast"] == {
        "strategy": "early-exit",
        "exit_confidence": 0.9,
        "exits": [2, 4],
    }
    info = write(
        tmp_path,
        '{"format": 1, "recommended": {"exit_layer": 3, "num_draft_tokens": 5}, "rows": 7}',
    )
    assert info == CheckpointInfo(exit_layer=3, num_draft_tokens=5, details={"rows": 7})
    assert "policies" not in json.loads(info.to_json())


@pytest.mark.parametrize(
    "document",
    [
        {"policies": []},
        {"policies": {"fast": {}}},
        {"policies": {"fast": {"strategy": "magic"}}},
        {"policies": {"fast": {"strategy": "early-exit", "exit_layer": 2.5}}},
        {"profile": {"acceptance": {"exit 4": 1.5}}},
        {"profile": {"draft_head": "int3"}},
        {"recommended": {"exit_layer": 0}},
        {"recommended": {"strategy": "magic"}},
        {"files": ["a", 3]},
        {"prompt_template": "none"},
        {"final_losses": {"4": "low"}},
        {"profile": {"passes": [1e-300, 1e8]}},  # their differences divided by zero
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, document):
    with pytest.raises(CheckpointError) as error:
        write(tmp_path, json.dumps(document))
    assert str(error.value).startswith(
        f"{tmp_path / 'layerskip.json'} is not valid: "
    ) and "\n" not in str(error.value)


PROFILE = DraftProfile({"exit 4": 0.9, "int8": 1.0}, (2.0, 2.5), {"exit 4": 0.25})


def test_what_a_sweep_measured_is_kept_and_holds_for_its_head_and_vocabulary(tmp_path):
    details = {"trained_exits": [4], "final_losses": {"4": 0.5, "12": 0.5}}
    measured = replace(PROFILE, draft_head="int4", draft_vocab=500)
    info = write(tmp_path, CheckpointInfo(details=details, profile=measured).to_json())
    assert (
        info.draft_profile(
            12, PackingConfig(draft_weights=("int8",), draft_head="int4", draft_vocab=500)
        )
        == measured
    )
    for packing in (
        PackingConfig(),
        PackingConfig(draft_vocab=500),
        PackingConfig(draft_vocab=400),
    ):
        assert info.draft_profile(12, packing) == DraftProfile({"exit 4": 1.0}, PROFILE.passes)
    info = CheckpointInfo(profile=PROFILE)
    read = write(tmp_path, info.to_json())
    assert read == info and read.draft_profile(24) == PROFILE


def test_new_exit_blocks_leave_what_was_measured_without_them_only(tmp_path):
    acceptance = {"exit 2": 0.1, "int8 exit 2": 0.1, "exit 12": 0.9, "int8": 1.0}
    profile = DraftProfile(acceptance, (2.0, 2.5), {"exit 2": 0.5, "exit 12": 0.75})
    before = CheckpointInfo(
        exit_layer=6, num_draft_tokens=4, policies=POLICIES, strategy="self-speculative", profile=profile,
        details={"rows": 7, "exit_blocks": {"4": {"agreement": 0.5}}},
    )  # fmt: skip
    assert before.advice == ("policy exact", "policy fast", "policy my own", "policy trimmed")
    after = write(tmp_path, before.with_exit_blocks({"2": {"agreement": 0.75}}).to_json())
    assert after.advice == () and after.details["rows"] == 7
    assert after.details["exit_blocks"] == {"4": {"agreement": 0.5}, "2": {"agreement": 0.75}}
    assert after.profile == DraftProfile(
        {"exit 12": 0.9, "int8": 1.0}, (2.0, 2.5), {"exit 12": 0.75}
    )
    known = after.draft_profile(24)
    assert known.acceptance == {"exit 2": 0.75, "exit 4": 0.5, "exit 12": 0.9, "int8": 1.0}
    assert (known.passes, known.drafts) == ((2.0, 2.5), {"exit 12": 0.75})
    measured = replace(after, profile=replace(profile, acceptance={"exit 2": 0.9}))
    # A sweep of the blocks knows better
    assert measured.draft_profile(24).acceptance == {"exit 2": 0.9, "exit 4": 0.5}


@pytest.mark.parametrize(
    "info, advice",
    [
        (CheckpointInfo(), ()),
        (CheckpointInfo(exit_layer=3, num_draft_tokens=5), ("exit 3",)),
        (CheckpointInfo(strategy="autoregressive"), ("autoregressive",)),
    ],
)
def test_advice_of_older_versions_has_no_policies(info, advice):
    assert info.advice == advice and info.with_exit_blocks({}).advice == ()


def test_the_agreement_stored_with_int4_weights_is_a_prior_where_no_sweep_measured_them():
    info = CheckpointInfo(
        profile=replace(PROFILE, acceptance={"exit 4": 0.9, "int4": 0.5, "int4 exit 4": 0.25})
    )
    assert info.with_int4(0.75) == info and info.without_int4().profile == replace(
        PROFILE, acceptance={"exit 4": 0.9}
    )
    assert info.without_int4().with_int4(0.75).profile.acceptance == {"exit 4": 0.9, "int4": 0.75}
    assert CheckpointInfo().without_int4().with_int4(0.75).draft_profile(12) == DraftProfile(
        {"int4": 0.75}
    )
    # Of other drafts than those that were measured
    other = replace(info, profile=replace(PROFILE, draft_head="int4"))
    assert other.with_int4(0.75) == other
    guessed = {"trained_exits": [4, 8], "final_losses": {"4": 0.5, "8": 0.5, "12": 0.5}}
    known = replace(info.without_int4().with_int4(0.75), details=guessed).draft_profile(12)
    assert known.acceptance == {"exit 4": 0.9, "exit 8": 1.0, "int4": 0.75}


def test_without_a_sweep_the_losses_say_how_often_drafts_are_accepted():
    details = {"trained_exits": [4, 8], "final_losses": {"4": 0.75, "8": 0.5, "12": 0.25}}
    profile = CheckpointInfo(details=details).draft_profile(12)
    assert profile.acceptance == {
        "exit 4": pytest.approx(exp(-0.25)),
        "exit 8": pytest.approx(exp(-0.125)),
    }
    assert (
        CheckpointInfo(details=details).draft_profile(24)
        == CheckpointInfo().draft_profile(12)
        == DraftProfile()
    )
