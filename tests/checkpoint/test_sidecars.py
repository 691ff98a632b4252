"""int4.safetensors and exit_blocks.safetensors beside a model: used, extended, replaced with it,
and refused elsewhere.
"""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import logits_of, older, run_texts
from evaluating import collect
from exit_block_models import add_blocks, add_int4
from safetensors.torch import load, load_file, save_file

from layerskip_core.checkpoint.convert import import_checkpoint
from layerskip_core.checkpoint.folder import EXIT_BLOCKS_FILE, INT4_FILE
from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.checkpoint.save import refuse_overwrite, save_sidecar, write_info
from layerskip_core.checkpoint.shipped import read_stored_drafters
from layerskip_core.checkpoint.sidecars import (
    content_of,
    exit_blocks_content,
    fingerprint,
    int4_content,
)
from layerskip_core.config.decoding import DecodingConfig, DraftProfile
from layerskip_core.config.evaluation import BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.data import load_examples
from layerskip_core.decoding import decode
from layerskip_core.errors import CheckpointError
from layerskip_core.evaluation.inspection import inspect
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.measure.prediction import agreement
from layerskip_core.evaluation.measure.sweep import sweep
from layerskip_core.evaluation.metrics import reference_losses
from layerskip_core.evaluation.results import RunRecord
from layerskip_core.evaluation.tasks.task import load_task
from layerskip_core.model.exit_blocks import NO_STORED_DRAFTERS, ExitBlock
from layerskip_core.model.native.compiled import kernels
from layerskip_core.training.exit_blocks import FrozenExits

INT4 = PackingConfig("int4")


def quantized_logits(folder, packing=INT4, dtype="fp32"):
    model = for_decoding(str(folder), "cpu", dtype, packing).backend
    return logits_of(model, torch.tensor([[5, 9, 33]])), model.implementation


@pytest.mark.parametrize("prepare", [lambda folder: None, older])
def test_the_stored_weights_are_used_in_every_precision(wide, prepare):
    prepare(wide)
    before = {dtype: quantized_logits(wide, dtype=dtype)[0] for dtype in ("fp32", "bf16")}
    add_int4(wide)
    same, implementation = quantized_logits(wide)
    assert torch.equal(same, before["fp32"]) and "calibrated int4" in implementation
    add_int4(wide, lambda weight: 0.9 * weight)
    for dtype in ("fp32", "bf16"):
        other, implementation = quantized_logits(wide, dtype=dtype)
        assert not torch.equal(other, before[dtype]) and "calibrated int4" in implementation
    for packing in (PackingConfig(), PackingConfig("int8")):
        assert "calibrated" not in quantized_logits(wide, packing)[1]
    assert quantized_logits(wide, PackingConfig(draft_weights=("int4",)))[1].endswith(
        ", calibrated int4 drafts"
    )


def test_layerskip_json_lists_the_file_so_that_the_next_model_replaces_it(wide, tmp_path):
    files = read_info(wide).files
    plain = shutil.copytree(wide, tmp_path / "plain")
    add_int4(wide)
    assert set(read_info(wide).files) == {*files, INT4_FILE}
    add_int4(wide)
    refuse_overwrite(str(wide), overwrite=True)
    import_checkpoint(str(plain), str(wide), "fp32")
    assert not (wide / INT4_FILE).exists() and set(read_info(wide).files) == set(files)
    assert "calibrated" not in quantized_logits(wide)[1]


@pytest.mark.skipif(kernels() is None, reason="copies are of our kernels")
@pytest.mark.parametrize(
    "agreement, measured, copy",
    [
        (None, None, "int8"),
        ("0.95", None, "int4"),
        ("0.8", None, "int8"),
        # Milliseconds of a draft, where a pass takes 10
        ("0.95", {"int8": 5.0, "int4": 6.0}, "int8"),
        ("0.8", {"int8": 8.0, "int4": 2.0}, "int4"),
    ],
)
def test_the_copy_that_drafts_is_the_one_with_more_tokens_per_second(
    wide, agreement, measured, copy
):
    if agreement is not None:
        add_int4(wide, agreement=agreement)
    if measured is not None:
        info = read_info(wide)
        write_info(str(wide), replace(info, profile=DraftProfile({}, (10.0, 11.0), measured)))
    decoder = for_decoding(str(wide), "cpu", "bf16", PackingConfig(adaptive=True))
    assert list(decoder.backend.draft_sides) == [None, copy]
    if agreement is not None:
        assert decoder.info.draft_profile(6).acceptance == {"int4": float(agreement)}
        assert "calibrated" not in decoder.backend.implementation or copy == "int4"


def test_a_file_of_another_model_is_refused(wide, tmp_path):
    add_int4(wide)
    other = shutil.copytree(wide, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"int4.safetensors cannot be used: it was made from other weights"
    ):
        quantized_logits(other)
    quantized_logits(other, PackingConfig())
    quantized_logits(wide)


@pytest.mark.parametrize(
    "damage, found",
    [
        (lambda rows: rows.pop("lm_head.weight"), "lm_head.weight must be U8"),
        (
            lambda rows: rows.update({"lm_head.weight": rows["lm_head.weight"][:9].clone()}),
            "lm_head.weight must be U8",
        ),
        (
            lambda rows: rows.update({"lm_head.weight": rows["lm_head.weight"].float()}),
            "lm_head.weight must be U8",
        ),
    ],
)
def test_damaged_files_are_refused(wide, damage, found):
    add_int4(wide)
    rows = load_file(wide / INT4_FILE)
    damage(rows)
    loaded = for_training(str(wide), "cpu")
    model_fingerprint = loaded.fingerprint()
    (wide / INT4_FILE).write_bytes(int4_content(rows, model_fingerprint, {}))
    with pytest.raises(CheckpointError, match=rf"int4\.safetensors.* {found}"):
        quantized_logits(wide)


@pytest.fixture
def loaded(checkpoint, tmp_path):
    return for_training(shutil.copytree(checkpoint, tmp_path / "model"), "cpu")


def content(loaded, *blocks, present=NO_STORED_DRAFTERS, factor=1.0):
    spec = loaded.backend.spec
    weight_of = loaded.model.get_parameter
    weights = {
        name: factor * weight
        for name, weight in FrozenExits(loaded.backend, blocks).weights().items()
    }
    return exit_blocks_content(spec, weights, fingerprint(spec, weight_of), present)


def read(loaded, folder=None):
    return read_stored_drafters(folder or loaded.name, loaded.backend.spec, loaded.fingerprint)


def test_exits_follow_from_the_names_whatever_the_precision(loaded):
    assert read(loaded) is NO_STORED_DRAFTERS
    save_sidecar(loaded.name, EXIT_BLOCKS_FILE, content(loaded, ExitBlock(4), ExitBlock(2)))
    found = read(loaded)
    assert found.blocks == (ExitBlock(2), ExitBlock(4))
    assert EXIT_BLOCKS_FILE in read_info(loaded.name).files
    refuse_overwrite(loaded.name, overwrite=True)
    spec = loaded.backend.spec
    lower = for_training(loaded.name, "cpu", "bf16").model
    assert fingerprint(spec, lower.get_parameter) == fingerprint(spec, loaded.model.get_parameter)


def test_another_exit_is_added_and_the_same_one_replaced(loaded):
    save_sidecar(loaded.name, EXIT_BLOCKS_FILE, content(loaded, ExitBlock(2), ExitBlock(3)))
    save_sidecar(
        loaded.name,
        EXIT_BLOCKS_FILE,
        content(loaded, ExitBlock(3), ExitBlock(4), present=read(loaded), factor=2.0),
    )
    found = read(loaded)
    assert found.blocks == (ExitBlock(2), ExitBlock(3), ExitBlock(4))
    norm = loaded.model.model.norm.weight
    kept = [
        torch.equal(found.take(f"exits.{exit_layer}.norm.weight"), norm) for exit_layer in (2, 3, 4)
    ]
    assert kept == [True, False, False]


@pytest.mark.parametrize(
    "change, found",
    [
        (
            lambda weights: weights.pop("exits.2.norm.weight"),
            "exits.2.norm.weight must be .* found nothing",
        ),
        (
            lambda weights: weights.update({"exits.2.layer.x.weight": torch.zeros(1)}),
            "exits.2.layer.x.weight must be left out",
        ),
        (
            lambda weights: weights.update({"exits.2.norm.weight": torch.zeros(5)}),
            "exits.2.norm.weight must be",
        ),
        (
            lambda weights: weights.update(
                {"exits.2.norm.weight": torch.zeros(32, dtype=torch.int8)}
            ),
            "found I8",
        ),
        (
            lambda weights: weights.update({"exits.6.norm.weight": torch.zeros(32)}),
            "no weight of a block at an exit in 1..5",
        ),
    ],
)
def test_damaged_blocks_are_refused(loaded, change, found):
    spec = loaded.backend.spec
    weight_of = loaded.model.get_parameter
    weights = FrozenExits(loaded.backend, [ExitBlock(2)]).weights()
    change(weights)
    metadata = {"format": "1", "fingerprint": fingerprint(spec, weight_of)}
    save_file(weights, f"{loaded.name}/{EXIT_BLOCKS_FILE}", metadata)
    with pytest.raises(
        CheckpointError, match=rf"exit_blocks\.safetensors cannot be used: .*({found})"
    ):
        read(loaded)


def test_weights_that_are_not_finite_and_foreign_files_are_refused(loaded):
    path = f"{loaded.name}/{EXIT_BLOCKS_FILE}"
    whole = content(loaded, ExitBlock(2), factor=float("nan"))
    save_sidecar(loaded.name, EXIT_BLOCKS_FILE, whole)
    with pytest.raises(CheckpointError, match=r"exits\.2\..* holds NaN"):
        for_decoding(loaded.name, "cpu")
    for cut in (b"", whole[:-9]):
        Path(path).write_bytes(cut)
        with pytest.raises(CheckpointError, match="cannot be used"):
            read(loaded)
    save_file({"exits.2.norm.weight": torch.zeros(32)}, path)
    with pytest.raises(CheckpointError, match="its format must be 1, found None"):
        read(loaded)


BLOCKS = (ExitBlock(2), ExitBlock(4))


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    copy = str(shutil.copytree(checkpoint, tmp_path_factory.mktemp("blocks") / "model"))
    add_blocks(copy, *BLOCKS)
    return copy


def logits(decoder):
    return logits_of(decoder.backend, torch.tensor([[5, 9, 33]]))


@pytest.mark.parametrize("prepare", [lambda folder: None, older])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_full_depth_stays_as_it_is(checkpoint, tmp_path, prepare, dtype):
    copy = str(shutil.copytree(checkpoint, tmp_path / "model"))
    prepare(copy)
    before = logits(for_decoding(copy, "cpu", dtype))
    weights = Path(copy) / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).digest()
    add_blocks(copy, *BLOCKS)
    decoder = for_decoding(copy, "cpu", dtype)
    assert [placed.block for placed in decoder.backend.exit_blocks.values()] == list(BLOCKS)
    assert (
        torch.equal(logits(decoder), before)
        and hashlib.sha256(weights.read_bytes()).digest() == digest
    )


def test_exits_with_blocks_are_the_trained_ones(folder, checkpoint):
    adaptive = PackingConfig(adaptive=True)
    with_drafter_layers, without = (
        for_decoding(name, "cpu", "fp32", adaptive) for name in (folder, checkpoint)
    )
    assert with_drafter_layers.recommended().exits == (2, 4) and without.recommended().exits == ()
    # No copy of all layers is made to draft with
    assert list(with_drafter_layers.backend.draft_sides) == [None]
    nothing_saved = replace(
        with_drafter_layers, info=replace(with_drafter_layers.info, exit_layer=None)
    )
    assert nothing_saved.recommended().exit_layer == 2
    told = replace(
        with_drafter_layers.info,
        details={"exit_blocks": {"2": {"agreement": 0.75}, "4": {"agreement": None}}},
    )
    assert told.draft_profile(6).acceptance == {"exit 2": 0.75}
    copies = for_decoding(
        folder, "cpu", "fp32", PackingConfig(draft_weights=("int8",), draft_layers=3)
    )
    assert list(copies.backend.draft_sides["int8"].exit_blocks) == [2]


def test_adaptive_drafting_may_choose_the_blocks_of_a_copy(folder):
    asked = PackingConfig(draft_weights=("int8",), adaptive=True)
    loaded = for_decoding(folder, "cpu", "fp32", asked)
    cheap = DraftProfile({"int8 exit 4": 1.0}, (10.0, 10.1), {"int8 exit 4": 0.01})
    decoder = replace(loaded, info=replace(loaded.info, exit_layer=None, profile=cheap))
    config = decoder.resolve({"max_new_tokens": 12}, asked)
    assert (config.strategy, config.exits) == ("adaptive", (2, 4))
    prompt = decoder.encode_prompt("wake me up")
    decoding = decode(decoder.backend, prompt, config)
    ids = [token for [step] in decoding for token in step.ids]
    plain = decode(decoder.backend, prompt, DecodingConfig("autoregressive", max_new_tokens=12))
    assert ids == [token for [step] in plain for token in step.ids]
    assert decoding.stats.steps_by_drafter["int8 exit 4"] > 0


def test_agreement_and_perplexity_are_those_of_the_blocks(folder, checkpoint):
    decoder = for_decoding(folder, "cpu", "fp32")
    model = decoder.backend
    prompt = [5, 9, 33, 12]
    output = [7, 8, 60, 23, 40]
    tokens = torch.tensor([prompt + output])
    with torch.inference_mode():
        chosen = {}
        scores = {}
        for exit_layer, block in model.exit_blocks.items():
            states = run_texts(model, model.embed(tokens), 0, exit_layer)
            hidden = run_texts(model, states, block.layer, block.layer + 1)
            scores[exit_layer] = block.head(hidden)[0]
            chosen[exit_layer] = scores[exit_layer].argmax(-1)[3:-1].tolist()
    assert agreement(decoder, prompt, output, (2, 4)) == chosen
    row = load_examples(DataConfig("commands", "test", limit=1))[0]
    _, losses = reference_losses(decoder, row, (2, 4, 6))
    _, plain = reference_losses(for_decoding(checkpoint, "cpu", "fp32"), row, (6,))
    assert losses.keys() == {2, 4, 6} and losses[6] == plain[6]


def test_bench_and_sweep_measure_blocks(folder):
    decoder = for_decoding(folder, "cpu", "fp32")
    task = load_task(TaskConfig("commands", samples=2, max_new_tokens=8))
    _, record = collect(
        bench(
            decoder,
            task,
            BenchConfig(generation={"exit_layer": 4, "num_draft_tokens": 3}, repeats=1),
        )
    )
    assert isinstance(record, RunRecord)
    strategies = [result.strategy for result in record.results]
    assert {"self-speculative", "early-exit"} <= set(strategies)
    assert all(
        result.identical_outputs == 1
        for result in record.results
        if result.strategy != "early-exit"
    )
    _, record = collect(sweep(decoder, task, SweepConfig(specs=(3,), exit_confidences=())))
    assert isinstance(record, RunRecord)
    by_confidence = BenchConfig(
        generation={"exit_confidence": 0.5}, strategies=("autoregressive", "early-exit"), repeats=1
    )
    _, benched = collect(
        bench(replace(decoder, info=replace(decoder.info, exit_layer=4)), task, by_confidence)
    )
    assert isinstance(benched, RunRecord)
    assert [(result.exits, result.failures) for result in benched.results] == [
        ((), ()),
        ((2, 4), ()),
    ]
    rows = {(result.strategy, result.exit_layer) for result in record.results}
    assert {
        (strategy, exit_layer)
        for strategy in ("early-exit", "self-speculative")
        for exit_layer in (2, 4)
    } <= rows


def test_inspect_shows_what_blocks_predict(folder):
    decoder = for_decoding(folder, "cpu", "fp32")
    found = inspect(decoder, "wake me up", 5)
    prompt = decoder.encode_prompt("wake me up")
    plain = DecodingConfig("autoregressive", max_new_tokens=5)
    answer = [token for [step] in decode(decoder.backend, prompt, plain) for token in step.ids]
    choices = agreement(decoder, prompt, answer, (2, 4))
    for place, trace in enumerate(found.tokens):
        for exit_layer in (2, 4):
            assert trace.blocks[exit_layer].token == (
                decoder.detokenize([choices[exit_layer][place]])
                or decoder.tokenizer.convert_ids_to_tokens(choices[exit_layer][place])
            )


def test_weights_that_are_views_are_written():
    """As the experts of gpt-oss are, read from GGUF."""
    turned = torch.arange(6.0).view(2, 3).T
    assert torch.equal(load(content_of({"a": turned}, "of a model", {}))["a"], turned)
