"""What a sweep saves for a GGUF file, and for models in folders that cannot be written."""

import os
from dataclasses import replace

import pytest
from command_line import fails, run
from test_gguf import written

from layerskip_core.checkpoint import sidecars
from layerskip_core.checkpoint.convert import import_checkpoint
from layerskip_core.checkpoint.info import CheckpointInfo, read_info
from layerskip_core.checkpoint.locate import ModelRef
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.settings import info_of, settings_file, write_settings
from layerskip_core.config.decoding import DraftProfile

SWEEP = "--samples 1 --exits 2 --specs 3 --max-new-tokens 4 --save"


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv(sidecars.CACHE, str(tmp_path / "cache"))
    path = tmp_path / "models" / "tiny.Q8_0.gguf"
    path.parent.mkdir()
    written(path, "llama", "q8_0", hidden_size=64, head_dim=16, intermediate_size=96)
    return path


@pytest.fixture
def read_only(monkeypatch):
    """Lets no folder of models be written, also for root."""
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "models" not in str(path) and access(path, mode)
    )


def policy_of(model):
    stats = run("generate", "wake me up", "--model", str(model), "--max-new-tokens 4 --stats")
    assert stats.code == 0
    return "policy: exact" in stats.err


def test_settings_are_saved_beside_a_gguf_file_and_used(model):
    assert not policy_of(model)
    done = run("sweep-exits --model", str(model), SWEEP)
    beside = model.with_name("tiny.Q8_0.layerskip.json")
    assert done.code == 0 and f"as the default of {model}, in {beside}" in done.err
    assert {path.name for path in model.parent.iterdir()} == {model.name, beside.name}
    assert policy_of(model)
    assert (
        for_decoding(str(model), "cpu").info.policies.keys()
        == info_of(ModelRef.of(str(model))).policies.keys()
        >= {"exact"}
    )
    other = model.with_name("other.gguf")
    os.link(model, other)
    assert not policy_of(other)  # another file of the folder


def test_settings_of_what_cannot_be_written_are_in_the_cache(model, wide, tmp_path, read_only):
    folder = wide.rename(model.parent / "wide")
    for name in (model, folder):
        done = run("sweep-exits --model", str(name), SWEEP)
        assert done.code == 0 and f", in {tmp_path / 'cache'}" in done.err, done.err
        assert policy_of(name)
    assert model.parent.joinpath("tiny.Q8_0.layerskip.json").exists() is False
    assert not read_info(folder).policies
    written(model, "llama", "q8_0", hidden_size=64, head_dim=16, intermediate_size=128)
    assert not policy_of(model)  # another model under its name
    assert policy_of(folder)


def test_other_kinds_of_models_are_told_what_to_do():
    fails(
        "--save needs a --model that is a folder or a .gguf file, to save settings with it; got embedded: "
        "`layerskip import embedded` writes a folder",
        "sweep-exits --save",
    )  # fmt: skip


def test_import_keeps_acceptance_but_no_times_of_the_low_bit_weights(model, tmp_path):
    profile = DraftProfile({"exit 2": 0.5}, (0.01, 0.02), {"exit 2": 0.003})
    policies = {"exact": {"strategy": "self-speculative", "exit_layer": 2, "num_draft_tokens": 3}}
    saved = CheckpointInfo(
        exit_layer=2,
        num_draft_tokens=3,
        policies=policies,
        profile=profile,
        details={"note": "kept"},
    )
    write_settings(settings_file(ModelRef.of(str(model))), saved)
    import_checkpoint(str(model), str(tmp_path / "plain"), "fp32")
    found = read_info(tmp_path / "plain")
    assert (found.exit_layer, found.num_draft_tokens, found.policies) == (None, None, {})
    assert found.profile == DraftProfile({"exit 2": 0.5}) and found.details["note"] == "kept"
    assert info_of(ModelRef.of(str(model))) == replace(saved, files=())


def test_a_cache_that_cannot_be_written_either_is_one_error(model, tmp_path, read_only):
    (tmp_path / "cache").write_text("")
    done = run("sweep-exits --model", str(model), SWEEP)  # told before the measurement
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1) and done.err.startswith(
        "error: cannot write"
    )
