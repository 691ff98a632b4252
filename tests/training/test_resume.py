"""Runs that end early (by a signal, kill -9, a full disk), and how later runs resume them."""

import os
import pickle
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file
from training_runs import (
    RECIPE,
    Interrupted,
    require_exact_resumption,
    same_weights,
    saved_base,
    stop_at,
    train,
    weights,
)

from layerskip_core import files
from layerskip_core.config.model import DataConfig
from layerskip_core.config.training import DrafterConfig, RecipeSettings
from layerskip_core.errors import CheckpointError, ConfigError, TrainingInterrupted
from layerskip_core.training import module
from layerskip_core.training.run import execute, prepare


def checkpoint(folder, step):
    return Path(folder) / "checkpoints" / f"checkpoint-{step}"


def steps_saved(folder):
    return sorted(
        int(path.name.split("-")[1]) for path in Path(folder, "checkpoints").glob("checkpoint-*")
    )


RESUMED = {
    "tied weights, named exits": ({"recipe": replace(RECIPE, exits=(1, 3))}, True),
    "accumulation": ({"accumulation": 2, "batch_size": 2}, False),
    "LoRA": ({"lora_rank": 2}, True),
}


@pytest.mark.parametrize("changes, tied", RESUMED.values(), ids=RESUMED)
def test_resuming_gives_the_same_weights_bit_by_bit(settings, tmp_path, changes, tied):
    base = saved_base(tmp_path / "base", tie_word_embeddings=tied)
    require_exact_resumption(settings, tmp_path, **changes, model=base)


def signal_in_step(monkeypatch, at, number):
    """Sends this process a signal in the middle of the forward pass of a step, counted from 1."""
    drawn = module.kept_rows

    def interrupting(rate, batch_size, seed, step, first_row, layer):
        if (step + 1, layer) == (at, 1):
            os.kill(os.getpid(), number)
        return drawn(rate, batch_size, seed, step, first_row, layer)

    monkeypatch.setattr(module, "kept_rows", interrupting)


def test_ctrl_c_saves_and_ends_with_130(base, tmp_path, monkeypatch):
    """The signal arrives in the third step, whose end it waits for."""
    signal_in_step(monkeypatch, 3, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    output = str(tmp_path / "out")
    result = run(
        f"finetune --model {base} --samples 16 --steps 6 --batch-size 4",
        f"--max-length 64 --output {output}",
    )
    assert (result.code, result.out) == (130, "")
    assert "interrupted after step 3 of 6" in result.err and result.err.endswith(
        f"--output {output} --resume\n"
    )
    assert steps_saved(output) == [3] and sorted(os.listdir(f"{output}/checkpoints")) == [
        "checkpoint-3"
    ]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_replaces_a_model_is_resumed_by_the_command_it_prints(
    base, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text('{"model_type": "llama"}')
    with monkeypatch.context() as context:
        signal_in_step(context, 2, signal.SIGTERM)
        cut = run(f"finetune --model {base} --samples 8 --steps 3 --batch-size 4 --output {output}", "--overwrite")  # fmt: skip
    assert cut.code == 143 and steps_saved(output) == [2]
    ended = run(*re.search("continue with: layerskip (.*)\n", cut.err)[1].split())
    assert ended.code == 0 and f"going on from {checkpoint(output, 2)}" in ended.err
    assert len((output / "losses.jsonl").read_text().splitlines()) == 3


def test_a_run_whose_model_could_not_be_written_ends_from_its_last_checkpoint(settings, tmp_path):
    whole = str(tmp_path / "whole")
    train(settings(save_steps=2, output=whole))
    job = prepare(settings(save_steps=2))
    with pytest.raises(
        CheckpointError, match=r"cannot write the model to .*: in the way is losses.jsonl"
    ):
        execute(job, lambda report: (tmp_path / "out" / "losses.jsonl").mkdir(exist_ok=True))
    (tmp_path / "out" / "losses.jsonl").rmdir()
    assert (
        steps_saved(tmp_path / "out") == [2, 4] and not (tmp_path / "out" / "config.json").exists()
    )
    assert train(settings(save_steps=2, resume=True)) == []
    assert same_weights(tmp_path / "out", whole)


def test_a_signal_in_the_last_step_changes_nothing_and_a_second_ctrl_c_stops_at_once(
    settings, tmp_path, interruptible
):
    def terminate(report):
        if report.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    execute(prepare(settings()), terminate)
    assert (tmp_path / "out" / "config.json").exists()

    def impatient(report):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        execute(prepare(settings(output=str(tmp_path / "other"))), impatient)
    assert steps_saved(tmp_path / "other") == []


@pytest.fixture
def interruptible():
    """Python's own answer to Ctrl-C: a shell that starts tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_full_disk_leaves_the_older_checkpoint(settings):
    """No file may grow beyond 0.1 MB, as by a quota, from the end of step 2 on; the optimizer's has
    0.3 MB.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(report):
        if report.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    try:
        with pytest.raises(
            CheckpointError,
            match=r"cannot write the checkpoint of step 2 .*; those before it are whole",
        ):
            execute(prepare(settings(save_steps=1)), fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert prepare(settings(save_steps=1, resume=True)).plan.checkpoint.name == "checkpoint-1"


@pytest.fixture
def two_checkpoints(settings, tmp_path):
    with pytest.raises(Interrupted):
        execute(prepare(settings(save_steps=1)), stop_at(3))
    assert steps_saved(tmp_path / "out") == [1, 2]
    return tmp_path / "out"


def test_a_run_is_resumed_with_the_same_settings_or_not_at_all(settings, two_checkpoints):
    for changes, message in (
        ({"batch_size": 2}, "batch_size was 4 in the run to go on with, and is 2 now"),
        ({"lr": 1e-4}, "lr was 0.001 in"),
        ({"recipe": replace(RECIPE, rotation=None)}, "rotation was 2 in"),
        ({"steps": 5}, "steps was 4 in"),
        ({"data": DataConfig(limit=31, seed=1)}, "rows was 32 in"),
        ({"data": DataConfig(limit=32, seed=2)}, "(tokens|data_digest) was"),
    ):
        with pytest.raises(ConfigError, match=f"`resume`: {message}"):
            prepare(settings(**changes, resume=True))
    prepare(settings(save_steps=3, resume=True))


def test_another_model_of_the_same_shape_is_not_resumed_with(
    settings, two_checkpoints, base, tmp_path
):
    other = shutil.copytree(base, tmp_path / "other")
    scaled = {name: 1.5 * weight for name, weight in weights(base).items()}
    save_file(scaled, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"`resume`: model_digest was [0-9a-f]{64} in the run"):
        prepare(settings(model=str(other), resume=True))
    moved = shutil.copytree(base, tmp_path / "moved")
    prepare(settings(model=str(moved), resume=True))


def without_a_shard(folder):
    """As transformers writes large models, without the second of two files."""
    held = weights(folder)
    names = sorted(held)
    first = {name: held[name] for name in names[:9]}
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    return f"{len(names) - 9} weights missing in it, {names[9]} the first"


def with_a_further_weight(folder):
    save_file(
        weights(folder) | {"more": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"}
    )
    return "1 weight in it unknown to this run, more the first"


def without_a_weight_of_an_exit_block(folder):
    path = folder / "exit_blocks.safetensors"
    held = load_file(path)
    del held["exits.2.norm.weight"]
    save_file(held, path)
    return "1 weight missing in it, exits.2.norm.weight the first"


def without_a_weight(folder):
    held = weights(folder)
    del held["model.norm.weight"]
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return "1 weight missing in it, model.norm.weight the first"


def with_another_shape(folder):
    save_file(
        weights(folder) | {"model.norm.weight": torch.ones(1)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return r"model.norm.weight must have the shape \[32\], found \[1\]"


DAMAGED = (
    without_a_shard,
    without_a_weight,
    with_a_further_weight,
    with_another_shape,
    without_a_weight_of_an_exit_block,
)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_checkpoint_has_the_weights_of_the_run_and_no_others(settings, tmp_path, damage):
    read = settings(save_steps=1, recipe=RecipeSettings(p_max=0.0, exits=(2,)))
    with pytest.raises(Interrupted):
        execute(prepare(read), stop_at(2))
    folder = checkpoint(tmp_path / "out", 1)
    reason = damage(folder)
    with pytest.raises(CheckpointError, match=f"^cannot resume from {folder}: {reason}$"):
        execute(prepare(replace(read, resume=True)))


class Payload:
    """A pickle that creates a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_run(settings, two_checkpoints, tmp_path):
    """Nothing in a checkpoint may run code here. training_args.bin is not even read."""
    folder = checkpoint(two_checkpoints, 2)
    assert not (folder / "training_args.bin").exists()
    for name in ("training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / f"ran {name}"), protocol=2))
    with pytest.raises(
        CheckpointError, match=r"cannot resume from .*checkpoint-2: Weights only load failed"
    ):
        execute(prepare(settings(save_steps=1, resume=True)))
    assert not list(tmp_path.glob("ran *"))


@pytest.mark.parametrize("left", ["an empty state", "an empty folder"])
def test_a_half_written_checkpoint_is_ignored(settings, two_checkpoints, monkeypatch, left):
    """kill -9 leaves it without Trainer's state, which is written last; a resumed run removes
    it.
    """
    half = checkpoint(two_checkpoints, 7)
    if left == "an empty folder":
        half.mkdir()
    else:
        shutil.copytree(checkpoint(two_checkpoints, 2), half)
        (half / "trainer_state.json").write_bytes(b"")
    job = prepare(settings(save_steps=1, resume=True))
    assert job.plan.checkpoint.name == "checkpoint-2"
    signal_in_step(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(TrainingInterrupted):
        execute(job)
    assert steps_saved(two_checkpoints) == [2, 3]


def test_what_a_folder_holds_decides_what_the_same_command_says(settings, tmp_path):
    """A model; a model and a run that would replace it; each with what leads on."""
    config = settings(save_steps=1)
    folder = tmp_path / "out" / "checkpoints"
    train(config)
    assert not folder.exists()
    with pytest.raises(
        ConfigError, match=r"`output` .*out already holds a model; give `overwrite` to replace it"
    ):
        prepare(config)
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint in .*; a run with `save_steps` N has them until it ends",
    ):
        prepare(replace(config, resume=True))
    with pytest.raises(Interrupted):
        execute(prepare(replace(config, overwrite=True, seed=1)), stop_at(2))
    with pytest.raises(
        ConfigError,
        match=r"holds an unfinished run; give `resume` to go on \(and `overwrite` if it replaces",
    ):
        prepare(replace(config, seed=1))
    with pytest.raises(Interrupted):
        # Removes the older run's checkpoint
        execute(prepare(replace(config, overwrite=True, save_steps=2)), stop_at(1))
    with pytest.raises(CheckpointError, match=r"`resume`: there is no .*`save_steps` N"):
        prepare(replace(config, overwrite=True, resume=True, save_steps=2))
    with pytest.raises(Interrupted):
        execute(prepare(replace(config, overwrite=True, seed=1)), stop_at(2))
    assert train(replace(config, overwrite=True, resume=True, seed=1))[0].step == 2
    assert not folder.exists()


def test_a_checkpoint_that_was_removed_in_part_blocks_nothing(
    settings, two_checkpoints, monkeypatch
):
    """By a run at its third checkpoint, which keeps two, in the middle of the removal; the next run
    removes the rest.

    A folder of the user's beside the checkpoints stays, whatever its name.
    """
    folder = two_checkpoints / "checkpoints"
    own = folder / "discarded" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")

    def killed(path, ignore_errors=False):
        (Path(path) / "trainer_state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(prepare(settings(save_steps=1, resume=True)))
    assert steps_saved(two_checkpoints) == [2, 3] and len(list(folder.iterdir())) == 4
    execute(prepare(settings(save_steps=1, resume=True)))
    assert list(folder.iterdir()) == [own.parent] and own.read_text() == "mine"


def test_a_drafter_is_resumed_whole(settings, tmp_path):
    blocks = settings(
        DrafterConfig, save_steps=1, exits=(1, 2), answers="data", output=str(tmp_path / "out")
    )
    with pytest.raises(Interrupted):
        execute(prepare(blocks), stop_at(2))
    path = checkpoint(tmp_path / "out", 1) / "drafter.safetensors"
    held = load_file(path)
    del held["exits.2.norm.weight"]
    save_file(held, path)
    with pytest.raises(
        CheckpointError, match=r"1 weight missing in it, exits\.2\.norm\.weight the first"
    ):
        execute(prepare(replace(blocks, resume=True)))


def test_an_adapter_is_resumed_whole(settings, tmp_path):
    lora = settings(save_steps=1, lora_rank=2)
    with pytest.raises(Interrupted):
        execute(prepare(lora), stop_at(2))
    path = checkpoint(tmp_path / "out", 1) / "adapter_model.safetensors"
    held = load_file(path)
    lost = min(held)
    del held[lost]
    save_file(held, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 weight missing in it, {lost} the first"):
        execute(prepare(replace(lora, resume=True)))
