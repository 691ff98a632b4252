"""Calibration: a weight by GPTQ and the descent after it; the whole model; the tuning of its scales; `layerskip calibrate`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import fails, run
from conftest import DENSE_MIXERS, run_texts, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file

from layerskip_core import load
from layerskip_core.calibration.model import (
    Aim,
    descended,
    gptq,
    quantize,
    searched,
    tune,
    with_best_levels,
    with_best_scales,
)
from layerskip_core.checkpoint.folder import INT4_FILE
from layerskip_core.checkpoint.info import read_info
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
    expected, actual = logarithms(backend_of(model_type), texts), logarithms(backend, texts)
    return torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="sum").item() / texts.numel()


def with_weights(model_type, weights):
    backend = backend_of(model_type)
    with torch.no_grad():
        for name, weight in weights.items():
            if name != backend.spec.head_name:
                backend.model.get_parameter(name).copy_(weight.weight)
    return backend


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text", *DENSE_MIXERS])
def test_each_step_brings_predictions_nearer_to_the_original(model_type):
    backend = backend_of(model_type)
    names = matrix_names(backend.spec)
    parameters = {name: backend.model.get_parameter(name).detach() for name in names}
    nearest = with_weights(model_type, {name: int4_of(weight) for name, weight in parameters.items()})
    done = []
    weights, original = quantize(backend, TEXTS, done.append)
    assert done == [1, 2, 3, 4, 5, 6, 7] and sorted(weights) == sorted(names)
    calibrated = divergence(with_weights(model_type, weights), model_type, TEXTS)
    assert calibrated == pytest.approx(divergence(backend, model_type, TEXTS))
    steps = []
    tuned = tune(backend, weights, original, TEXTS, 40, 0, lambda step, value: steps.append((step, value)))
    assert [step for step, _ in steps] == list(range(1, 41)) and steps[0][1] == pytest.approx(calibrated, rel=0.01)
    again = with_weights(model_type, tuned)
    assert divergence(again, model_type, TEXTS) < 0.95 * calibrated < 0.8 * divergence(nearest, model_type, TEXTS)
    assert divergence(again, model_type, UNSEEN) < 0.8 * divergence(nearest, model_type, UNSEEN)
    for name in names:
        assert torch.equal(tuned[name].levels, weights[name].levels)
        assert torch.equal(tuned[name].scale.bfloat16().float(), tuned[name].scale)


def test_the_original_states_are_those_of_the_original_model():
    backend = backend_of("llama")
    with torch.no_grad():
        expected = run_texts(backend, backend.embed(TEXTS), 0, 6)
    torch.testing.assert_close(quantize(backend, TEXTS, lambda _: None)[1], expected)


OUTPUTS, INPUTS = 24, 160


def weight():
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))


def inputs(count=600, rank=40):
    """Inputs that depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, rank, generator=generator) @ torch.randn(rank, INPUTS, generator=generator)
    return mixed + 0.3 * torch.randn(count, INPUTS, generator=generator)


def aim(given, original=None):
    return Aim.of(weight(), zip(given.chunk(3), (given if original is None else original).chunk(3), strict=True))


def output_error(made, given, original=None):
    original = given if original is None else original
    return (given @ made.weight.T - original @ weight().T).square().mean().item()


def test_gptq_keeps_outputs_far_better_than_rounding():
    given = inputs()
    assert output_error(gptq(aim(given)), given) < 0.25 * output_error(int4_of(weight()), given)


def test_with_inputs_that_do_not_depend_on_each_other_it_rounds_to_nearest():
    made = gptq(Aim(weight(), 3 * torch.eye(INPUTS)))
    groups = weight().view(OUTPUTS, -1, 32)
    for number in range(INPUTS // 32):
        scale, low = searched(groups[:, number], torch.ones(32))
        assert torch.equal(made.scale[:, number], scale) and torch.equal(made.low[:, number], low)
        expected = ((groups[:, number] - low[:, None]) / scale[:, None]).round().clamp(0, 15)
        assert torch.equal(made.levels.view(OUTPUTS, -1, 32)[:, number].float(), expected)


def test_the_searched_range_is_better_than_the_whole_one():
    whole, made = int4_of(weight()), gptq(Aim(weight(), torch.eye(INPUTS)))
    assert (made.weight - weight()).square().sum() < 0.95 * (whole.weight - weight()).square().sum()
    assert torch.equal(made.scale.bfloat16().float(), made.scale) and torch.equal(made.low.bfloat16().float(), made.low)


def test_inputs_of_quantised_layers_are_corrected_towards_the_original_outputs():
    original = inputs()
    given = original + 0.2 * original.roll(1, dims=1)
    corrected, plain = (gptq(aim(given, reference)) for reference in (original, given))
    assert output_error(corrected, given, original) < 0.5 * output_error(plain, given, original)


def test_the_correction_does_not_learn_the_noise_of_the_inputs():
    given, unseen = inputs(count=2400)[:240], inputs(count=2400)[-1200:]
    generator = torch.Generator().manual_seed(2)
    original = given + 0.5 * torch.randn(given.shape, generator=generator)
    corrected, plain = gptq(aim(given, original)), gptq(aim(given))
    assert output_error(corrected, given, original) < output_error(plain, given, original)
    assert output_error(corrected, unseen) < 1.8 * output_error(plain, unseen)


def test_inputs_that_are_always_zero_do_no_harm():
    given = inputs()
    given[:, 7] = 0
    made = descended(aim(given))
    assert made.weight.isfinite().all() and output_error(made, given) < 0.25 * output_error(int4_of(weight()), given)


def test_each_part_of_the_descent_lowers_the_error():
    goal = aim(inputs())
    made = gptq(goal)
    scaled = with_best_scales(made, goal)
    moved = with_best_levels(scaled, goal)
    assert goal.error(moved) < goal.error(scaled) < goal.error(made)
    assert torch.equal(scaled.levels, made.levels) and torch.equal(moved.scale, scaled.scale)
    assert goal.error(descended(goal)) < 0.97 * goal.error(moved)
    assert moved.levels.max() == 15 and moved.levels.min() == 0


def test_the_best_scales_are_a_minimum():
    goal = aim(inputs())
    best = with_best_scales(gptq(goal), goal)
    for factor in (0.97, 1.03):
        for changed in (best._replace(scale=best.scale * factor), best._replace(low=best.low * factor)):
            assert goal.error(changed) > goal.error(best)


def test_a_weight_without_an_error_stays_as_it_is():
    exact = int4_of(weight())
    goal = Aim(exact.weight, aim(inputs()).square)
    assert torch.equal(descended(goal).weight, exact.weight)
    constant = torch.full((3, 64), 0.5)  # groups of equal weights
    goal = Aim(constant, torch.eye(64))
    assert torch.equal(descended(goal).weight, constant)


QUICK = ("--samples", "6", "--length", "24", "--steps", "3")


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder):
    return {path.name: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.iterdir()}


def test_int4_weights_are_saved_beside_the_model_and_used(wide):
    before = state(wide)
    rounded = run("generate", "wake me up", "--model", str(wide), "--quantize", "int4", "--stats")
    done = run("calibrate", "--model", str(wide), *QUICK)
    assert done.code == 0 and done.out == "", done.err
    assert "texts 6/6" in done.err and "layers 7/7" in done.err and "tuning 3/3 divergence 0." in done.err
    assert f"saved int4 weights in {wide} after" in done.err
    after = state(wide)
    assert {name for name in after if after[name] != before.get(name)} == {INT4_FILE, "layerskip.json"}
    profile = load(str(wide), draft_weights="int4")._resolved({"strategy": "adaptive"}).profile
    assert 0.2 < profile.acceptance["int4"] < 1 and profile == read_info(wide).profile
    answer = run("generate", "wake me up", "--model", str(wide), "--quantize", "int4", "--stats")
    assert answer.code == 0 and "calibrated int4" in answer.err and "calibrated" not in rounded.err
    drafted = run("generate", "wake me up", "--model", str(wide), "--draft-weights", "int4", "--exit", "6", "--stats")
    assert drafted.code == 0 and "calibrated int4 drafts" in drafted.err
    assert drafted.out == run("generate", "wake me up", "--model", str(wide), "--strategy", "autoregressive").out


def test_the_same_settings_give_the_same_weights_and_another_seed_others(wide):
    contents = []
    for seed in ("1", "1", "2"):
        assert run("calibrate", "--model", str(wide), "--seed", seed, *QUICK).code == 0
        contents.append({name: rows.tolist() for name, rows in load_file(wide / INT4_FILE).items()})
    assert contents[0] == contents[1] != contents[2]
    with safe_open(wide / INT4_FILE, "pt") as file:
        header = file.metadata()
    assert (header["texts"], header["length"], header["tuning_steps"], header["seed"]) == ("6", "24", "3", "2")


def test_an_embedded_model_is_copied(checkpoint):
    """Also to a folder of its name, which gets the whole model."""
    Path("embedded").mkdir()
    done = run("calibrate", "--output", "embedded", "--samples", "2", "--length", "8", "--steps", "0")
    assert done.code == 0 and "saved int4 weights in embedded" in done.err, done.err
    assert {"model.safetensors", INT4_FILE} <= {file.name for file in Path("embedded").iterdir()}
    answer = run("generate", "wake me up at 5", "--model", "./embedded", "--quantize", "int4", "--stats")
    assert answer.code == 0 and "calibrated int4" in answer.err
    shutil.copytree(checkpoint, "calibrated-model")
    fails("--output calibrated-model already holds a model; give --overwrite to replace it, or another folder", "calibrate")


def test_a_copy_elsewhere_leaves_the_model_as_it_is(wide, tmp_path):
    before = state(wide)
    assert run("calibrate", "--model", str(wide), "--output", str(tmp_path / "copy"), *QUICK).code == 0
    assert state(wide) == before and INT4_FILE in json.loads((tmp_path / "copy" / "layerskip.json").read_text())["files"]
    assert "int4" in read_info(tmp_path / "copy").profile.acceptance


def test_own_rows_are_calibrated_on(wide, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "wake me up", "completion": "at seven in the morning"}\n' * 8)
    done = run("calibrate", "--model", str(wide), "--data", str(rows), *QUICK)
    assert done.code == 0, done.err
    with safe_open(wide / INT4_FILE, "pt") as file:
        assert file.metadata()["texts"] == QUICK[QUICK.index("--samples") + 1]  # more than the rows hold as texts of their own
    rows.write_text('{"prompt": "", "completion": "a"}\n')
    short = run("calibrate", "--model", str(wide), "--data", str(rows), *QUICK)
    assert short.code == 1 and "--data" in short.err and "must have at least 24 tokens, found" in short.err


def test_wrong_settings_are_one_error(wide):
    fails("--length must be at most 128, the model's context, got 129", "calibrate", "--model", str(wide), "--length", "129")
    assert not (wide / INT4_FILE).exists()


def test_a_model_without_int4_kernels_is_refused(checkpoint):
    fails(
        "--model must be one whose layer widths 32 divides, got 48 in model.layers.0.mlp.down_proj.weight",
        "calibrate", "--model", checkpoint,
    )  # fmt: skip


def test_another_file_of_that_name_is_not_replaced(wide):
    (wide / INT4_FILE).write_bytes(b"mine")
    before = identities(wide)
    fails(
        f"--model {wide}: in the way is {INT4_FILE}, which layerskip did not write; move it away, or give another folder",
        "calibrate", "--model", str(wide), *QUICK,
    )  # fmt: skip
    assert identities(wide) == before


def test_an_interrupted_calibration_leaves_nothing(wide, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = state(wide)
    monkeypatch.setattr("layerskip_core.calibration.tune", interrupt)
    assert run("calibrate", "--model", str(wide), *QUICK).code == 130
    assert state(wide) == before
