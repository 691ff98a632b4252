"""`layerskip calibrate` on a tiny model."""

import json
import shutil
from pathlib import Path

from command_line import fails, run
from safetensors import safe_open
from safetensors.torch import load_file

from layerskip_core import load
from layerskip_core.checkpoint.folder import INT4_FILE
from layerskip_core.checkpoint.info import read_info

QUICK = ("--samples", "6", "--length", "24", "--steps", "3")


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    before = state(wide)
    fails(
        f"--model {wide}: in the way is {INT4_FILE}, which layerskip did not write; move it away, or give another folder",
        "calibrate", "--model", str(wide), *QUICK,
    )  # fmt: skip
    assert state(wide) == before


def test_an_interrupted_calibration_leaves_nothing(wide, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = state(wide)
    monkeypatch.setattr("layerskip_core.calibration.tune", interrupt)
    assert run("calibrate", "--model", str(wide), *QUICK).code == 130
    assert state(wide) == before
