"""int4.safetensors and exit_blocks.safetensors beside a model: used, extended, replaced with it, and refused elsewhere."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import logits_of, older
from exit_block_models import add_int4
from safetensors.torch import load_file, save_file

from layerskip_core.checkpoint.beside import exit_blocks_content, fingerprint, int4_content, read_exit_blocks
from layerskip_core.checkpoint.folder import EXIT_BLOCKS_FILE, INT4_FILE
from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.open import for_decoding, for_training, import_checkpoint
from layerskip_core.checkpoint.save import refuse_overwrite, save_beside
from layerskip_core.config.model import PackingConfig
from layerskip_core.errors import CheckpointError
from layerskip_core.model.exit_blocks import NO_BLOCKS, ExitBlock, blocks_named
from layerskip_core.training.exit_blocks import FrozenExits

INT4 = PackingConfig("int4")


def logits(folder, packing=INT4, dtype="fp32"):
    model = for_decoding(str(folder), "cpu", dtype, packing).backend
    return logits_of(model, torch.tensor([[5, 9, 33]])), model.implementation


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


@pytest.fixture
def loaded(checkpoint, tmp_path):
    """A copy of the tiny model, as transformers reads it."""
    return for_training(shutil.copytree(checkpoint, tmp_path / "model"), "cpu")


def content(loaded, *blocks, kept=NO_BLOCKS, factor=1.0):
    spec, weight_of = loaded.backend.spec, loaded.model.get_parameter
    weights = {name: factor * weight for name, weight in FrozenExits(loaded.backend, blocks).weights().items()}
    return exit_blocks_content(spec, weights, fingerprint(spec, weight_of), kept)


def read(loaded, folder=None):
    return read_exit_blocks(folder or loaded.name, loaded.backend.spec, loaded.model.get_parameter)


def test_exits_and_features_follow_from_the_names(loaded):
    assert read(loaded) is NO_BLOCKS
    save_beside(loaded.name, EXIT_BLOCKS_FILE, content(loaded, ExitBlock(4, "final"), ExitBlock(2)))
    found = read(loaded)
    assert found.blocks == (ExitBlock(2), ExitBlock(4, "final"))
    assert found.take("exits.4.input.weight").shape == (32, 64)
    assert found.take("exits.2.input.weight") is None
    assert EXIT_BLOCKS_FILE in read_info(loaded.name).files
    refuse_overwrite(loaded.name, overwrite=True)


def test_another_exit_is_added_and_the_same_one_replaced(loaded):
    save_beside(loaded.name, EXIT_BLOCKS_FILE, content(loaded, ExitBlock(2), ExitBlock(3, "final")))
    save_beside(loaded.name, EXIT_BLOCKS_FILE, content(loaded, ExitBlock(3), ExitBlock(4), kept=read(loaded), factor=2.0))
    found = read(loaded)
    assert found.blocks == (ExitBlock(2), ExitBlock(3), ExitBlock(4))
    norm = loaded.model.model.norm.weight
    kept = [torch.equal(found.take(f"exits.{exit_layer}.norm.weight"), norm) for exit_layer in (2, 3, 4)]
    assert kept == [True, False, False]


def test_the_same_blocks_give_the_same_bytes(loaded):
    written = {content(loaded, ExitBlock(2), ExitBlock(3, "final")) for _ in range(12)}
    assert len(written) == 1
    save_beside(loaded.name, EXIT_BLOCKS_FILE, written.pop())
    assert read(loaded).blocks == (ExitBlock(2), ExitBlock(3, "final"))


def test_the_precision_of_the_model_does_not_matter(loaded):
    spec = loaded.backend.spec
    lower = for_training(loaded.name, "cpu", "bf16").model
    assert fingerprint(spec, lower.get_parameter) == fingerprint(spec, loaded.model.get_parameter)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda weights: weights.pop("exits.2.norm.weight"), "exits.2.norm.weight must be .* found nothing"),
        (lambda weights: weights.update({"exits.2.layer.x.weight": torch.zeros(1)}), "exits.2.layer.x.weight must be left out"),
        (lambda weights: weights.update({"exits.2.norm.weight": torch.zeros(5)}), "exits.2.norm.weight must be"),
        (lambda weights: weights.update({"exits.2.norm.weight": torch.zeros(32, dtype=torch.int8)}), "found I8"),
        (lambda weights: weights.update({"exits.6.norm.weight": torch.zeros(32)}), "no weight of a block at an exit in 1..5"),
    ],
)
def test_damaged_blocks_are_refused(loaded, change, found):
    spec, weight_of = loaded.backend.spec, loaded.model.get_parameter
    weights = FrozenExits(loaded.backend, [ExitBlock(2)]).weights()
    change(weights)
    metadata = {"format": "1", "fingerprint": fingerprint(spec, weight_of)}
    save_file(weights, f"{loaded.name}/{EXIT_BLOCKS_FILE}", metadata)
    with pytest.raises(CheckpointError, match=rf"exit_blocks\.safetensors cannot be used: .*({found})"):
        read(loaded)


def test_weights_that_are_not_finite_and_foreign_files_are_refused(loaded):
    path = f"{loaded.name}/{EXIT_BLOCKS_FILE}"
    whole = content(loaded, ExitBlock(2), factor=float("nan"))
    save_beside(loaded.name, EXIT_BLOCKS_FILE, whole)
    with pytest.raises(CheckpointError, match=r"exits\.2\..* holds NaN"):
        for_decoding(loaded.name, "cpu")
    for cut in (b"", whole[:-9]):
        Path(path).write_bytes(cut)
        with pytest.raises(CheckpointError, match="cannot be used"):
            read(loaded)
    save_file({"exits.2.norm.weight": torch.zeros(32)}, path)
    with pytest.raises(CheckpointError, match="its format must be 1, found None"):
        read(loaded)


def test_a_name_needs_an_exit_and_a_part():
    assert blocks_named(["exits.3.layer.mlp.down_proj.weight", "exits.1.input.weight"], 4) == (
        ExitBlock(1, "final"),
        ExitBlock(3),
    )
    for name in ("exits.3.head.weight", "exits.4.norm.weight", "exits.0.norm.weight", "exits.-1.norm.weight", "3.norm.bias"):
        with pytest.raises(CheckpointError, match="no weight of a block"):
            blocks_named([name], 4)
