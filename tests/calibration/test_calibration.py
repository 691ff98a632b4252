"""Calibration: a weight by GPTQ; the whole model; `layerskip calibrate`."""

import os

import pytest
import torch
from command_line import fails, run
from conftest import run_texts, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file

from layerskip_core import load
from layerskip_core.calibration import damped, fitted, gptq, nearest, quantize
from layerskip_core.checkpoint import sidecars
from layerskip_core.checkpoint.folder import INT4_FILE
from layerskip_core.checkpoint.sidecars import matrix_names
from layerskip_core.model import TransformersBackend
from layerskip_core.model.weights import int4_of

TEXTS = torch.randint(3, 67, (48, 32), generator=torch.Generator().manual_seed(0))
UNSEEN = torch.randint(3, 67, (8, 32), generator=torch.Generator().manual_seed(1))
WIDE = {"intermediate_size": 96, "hidden_size": 64}


def backend_of(model_type):
    return TransformersBackend(tiny_model(model_type, torch.float32, **WIDE))


def logarithms(backend, texts):
    with torch.no_grad():
        hidden = run_texts(backend, backend.embed(texts), 0, backend.num_layers)
        return backend.unembed(hidden).log_softmax(-1)


def divergence(backend, model_type, texts):
    expected = logarithms(backend_of(model_type), texts)
    actual = logarithms(backend, texts)
    return (
        torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="sum").item()
        / texts.numel()
    )


def with_weights(model_type, weights):
    backend = backend_of(model_type)
    with torch.no_grad():
        for name, weight in weights.items():
            if name != backend.spec.head_name:
                backend.model.get_parameter(name).copy_(weight.weight)
    return backend


@pytest.mark.parametrize("model_type", ["phi3", "gemma3_text", "qwen3_5_text", "nemotron_h"])
def test_predictions_are_nearer_to_the_original_than_those_of_rounded_weights(model_type):
    backend = backend_of(model_type)
    names = matrix_names(backend.spec)
    parameters = {name: backend.model.get_parameter(name).detach() for name in names}
    nearest = with_weights(
        model_type, {name: int4_of(weight) for name, weight in parameters.items()}
    )
    done = []
    weights = quantize(backend, TEXTS, done.append)
    assert done == [1, 2, 3, 4, 5, 6, 7] and sorted(weights) == sorted(names)
    again = with_weights(model_type, weights)
    assert divergence(again, model_type, TEXTS) == pytest.approx(
        divergence(backend, model_type, TEXTS)
    )
    for texts in (TEXTS, UNSEEN):
        assert divergence(again, model_type, texts) < divergence(nearest, model_type, texts)
    for name in names:
        assert torch.equal(weights[name].scale.bfloat16().float(), weights[name].scale)


OUTPUTS = 24
INPUTS = 160


def weight():
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))


def inputs(count=600, rank=40):
    """Inputs that depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, rank, generator=generator) @ torch.randn(
        rank, INPUTS, generator=generator
    )
    return mixed + 0.3 * torch.randn(count, INPUTS, generator=generator)


def square(given):
    return damped(given.T @ given, len(given))


def output_error(made, given):
    return (given @ (made.weight - weight()).T).square().mean().item()


def test_gptq_keeps_outputs_far_better_than_rounding():
    given = inputs()
    assert output_error(gptq(weight(), square(given)), given) < 0.25 * output_error(
        int4_of(weight()), given
    )


def test_with_inputs_that_do_not_depend_on_each_other_each_group_is_fitted():
    made = gptq(weight(), 3 * torch.eye(INPUTS))
    for number, group in enumerate(weight().T.split(32)):
        scale, low = fitted(group, torch.ones(32))
        assert torch.equal(made.scale[:, number], scale) and torch.equal(made.low[:, number], low)
        assert torch.equal(
            made.levels[:, 32 * number : 32 * (number + 1)].T.float(), nearest(group, scale, low)
        )


def test_a_weight_without_an_error_stays_as_it_is():
    exact = int4_of(weight())
    assert torch.equal(gptq(exact.weight, square(inputs())).weight, exact.weight)
    constant = torch.full((3, 64), 0.5)  # groups of equal weights
    assert torch.equal(gptq(constant, torch.eye(64)).weight, constant)


QUICK = "--samples 6"


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def acceptance(model):
    return (
        load(str(model), draft_weights="int4")
        ._resolved({"strategy": "adaptive"})
        .profile.acceptance
    )


def test_int4_weights_are_saved_beside_the_model_and_used(wide):
    before = state(wide)
    rounded = run("generate", "wake me up", f"--model {wide} --quantize int4 --stats")
    done = run(f"calibrate --model {wide}", QUICK)
    assert done.code == 0 and done.out == "", done.err
    assert "texts 14/14" in done.err and "layers 7/7" in done.err
    assert f"saved int4 weights in {wide / INT4_FILE} after" in done.err
    after = state(wide)
    assert {name for name in after if after[name] != before.get(name)} == {
        INT4_FILE,
        "layerskip.json",
    }
    assert 0.2 < acceptance(wide)["int4"] < 1
    answer = run("generate", "wake me up", f"--model {wide} --quantize int4 --stats")
    assert answer.code == 0 and "calibrated int4" in answer.err and "calibrated" not in rounded.err
    drafted = run("generate", "wake me up", f"--model {wide} --draft-weights int4 --exit 6 --stats")
    assert drafted.code == 0 and "calibrated int4 drafts" in drafted.err
    assert (
        drafted.out
        == run("generate", "wake me up", f"--model {wide} --strategy autoregressive").out
    )


def test_the_same_settings_give_the_same_weights_and_another_seed_others(wide):
    contents = []
    for seed in ("1", "1", "2"):
        assert run(f"calibrate --model {wide} --seed {seed}", QUICK).code == 0
        contents.append({name: rows.tolist() for name, rows in load_file(wide / INT4_FILE).items()})
    assert contents[0] == contents[1] != contents[2]
    with safe_open(wide / INT4_FILE, "pt") as file:
        header = file.metadata()
    assert (header["texts"], header["seed"]) == ("6", "2") and 0 < float(header["agreement"]) < 1


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(sidecars.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_weights_of_a_model_that_cannot_be_written_are_cached_for_every_copy_of_it(
    wide, tmp_path, cache, monkeypatch
):
    """As those of an embedded model."""
    before = state(wide)
    writable = os.access
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK and writable(path, mode))
    done = run(f"calibrate --model {wide}", QUICK)
    assert done.code == 0 and "saved int4 weights in" in done.err and state(wide) == before, (
        done.err
    )
    [file] = cache.glob("*.safetensors")
    imported = run(f"import {wide} --output {tmp_path}/imported")
    assert imported.code == 0, imported.err
    for model in (wide, tmp_path / "imported"):
        assert 0.2 < acceptance(model)["int4"] < 1
        answer = run("generate", "wake me up", f"--model {model} --quantize int4 --stats")
        assert answer.code == 0 and "calibrated int4" in answer.err
    assert "removed 1 files" in run("calibrate --clear").err and not file.exists()
    assert (
        "calibrated"
        not in run("generate", "wake me up", f"--model {wide} --quantize int4 --stats").err
    )


def test_a_model_without_int4_kernels_is_refused(checkpoint):
    fails(
        "--model must be one whose layer widths 32 divides, got 48 in model.layers.0.mlp.down_proj.weight",
        f"calibrate --model {checkpoint}",
    )  # fmt: skip


def test_an_interrupted_calibration_leaves_nothing(wide, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = state(wide)
    monkeypatch.setattr("layerskip_core.calibration.quantize", interrupt)
    assert run(f"calibrate --model {wide}", QUICK).code == 130
    assert state(wide) == before


def identities(folder):
    return {path.name: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.iterdir()}


def test_another_file_of_that_name_is_not_replaced(wide):
    (wide / INT4_FILE).write_bytes(b"mine")
    before = identities(wide)
    fails(
        f"--model {wide}: in the way is {INT4_FILE}, which layerskip did not write; move it away, or give another folder",
        f"calibrate --model {wide}", QUICK,
    )  # fmt: skip
    assert identities(wide) == before


def test_inputs_that_are_always_zero_do_no_harm():
    given = inputs()
    given[:, 7] = 0
    made = gptq(weight(), square(given))
    assert made.weight.isfinite().all() and output_error(made, given) < 0.25 * output_error(
        int4_of(weight()), given
    )


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_the_size_of_the_inputs_does_not_matter(size):
    made = gptq(weight(), square(inputs()))
    same = gptq(weight(), square(size * inputs()))
    assert (made.levels == same.levels).float().mean() > 0.99
