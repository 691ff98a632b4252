"""int4.safetensors beside a model: used, replaced with the model, and refused where it does not belong to it."""

import shutil

import pytest
import torch
from conftest import older, run_texts
from int4_models import add_int4
from safetensors.torch import load_file, save_file

from layerskip_core.checkpoint.beside import fingerprint, int4_content
from layerskip_core.checkpoint.folder import INT4_FILE
from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.open import for_decoding, for_training, import_checkpoint
from layerskip_core.checkpoint.save import refuse_overwrite
from layerskip_core.config.model import PackingConfig
from layerskip_core.errors import CheckpointError

INT4 = PackingConfig("int4")


def logits(folder, packing=INT4, dtype="fp32"):
    model = for_decoding(str(folder), "cpu", dtype, packing).backend
    with torch.inference_mode():
        hidden = run_texts(model, model.embed(torch.tensor([[5, 9, 33]])), 0, 6)
        return model.unembed(hidden), model.implementation


@pytest.mark.parametrize("prepare", [lambda folder: None, older])
def test_the_stored_weights_are_used_in_every_precision(wide, prepare):
    prepare(wide)
    before = {dtype: logits(wide, dtype=dtype)[0] for dtype in ("fp32", "bf16")}
    add_int4(wide)
    same, implementation = logits(wide)
    assert torch.equal(same, before["fp32"]) and "calibrated int4" in implementation
    add_int4(wide, lambda weight: 0.9 * weight)
    for dtype in ("fp32", "bf16"):
        other, implementation = logits(wide, dtype=dtype)
        assert not torch.equal(other, before[dtype]) and "calibrated int4" in implementation
    for packing in (PackingConfig(), PackingConfig("int8")):
        assert "calibrated" not in logits(wide, packing)[1]
    assert logits(wide, PackingConfig(draft_weights=("int4",)))[1].endswith(", calibrated int4 drafts")


def test_layerskip_json_lists_the_file_so_that_the_next_model_replaces_it(wide, tmp_path):
    files, plain = read_info(wide).files, shutil.copytree(wide, tmp_path / "plain")
    add_int4(wide)
    assert set(read_info(wide).files) == {*files, INT4_FILE}
    add_int4(wide)
    refuse_overwrite(str(wide), overwrite=True)
    import_checkpoint(str(plain), str(wide), "fp32")
    assert not (wide / INT4_FILE).exists() and set(read_info(wide).files) == set(files)
    assert "calibrated" not in logits(wide)[1]


def test_a_file_of_another_model_is_refused(wide, tmp_path):
    add_int4(wide)
    other = shutil.copytree(wide, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"int4.safetensors cannot be used: it was made from other weights"):
        logits(other)
    logits(other, PackingConfig())
    logits(wide)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda rows: rows.pop("lm_head.weight"), "lm_head.weight must be U8"),
        (lambda rows: rows.update({"lm_head.weight": rows["lm_head.weight"][:9].clone()}), "lm_head.weight must be U8"),
        (lambda rows: rows.update({"lm_head.weight": rows["lm_head.weight"].float()}), "lm_head.weight must be U8"),
        (lambda rows: rows["lm_head.weight"].fill_(255), "lm_head.weight is not finite"),
    ],
)
def test_damaged_files_are_refused(wide, damage, found):
    add_int4(wide)
    rows = load_file(wide / INT4_FILE)
    damage(rows)
    loaded = for_training(str(wide), "cpu")
    made_for = fingerprint(loaded.backend.spec, loaded.model.get_parameter)
    (wide / INT4_FILE).write_bytes(int4_content(rows, made_for, {}))
    with pytest.raises(CheckpointError, match=rf"int4\.safetensors.* {found}"):
        logits(wide)
