"""Runs that train exit blocks: the model stays byte for byte, a run goes on bit by bit, and wrong
use is one error.
"""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from evaluating import tiny_loaded
from safetensors.torch import load_file
from training_runs import Interrupted, saved_base, stop_at

from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.locate import ModelRef
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.checkpoint.save import write_info
from layerskip_core.checkpoint.settings import settings_file
from layerskip_core.config.decoding import DraftProfile
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.config.training import DrafterConfig
from layerskip_core.data import load_prompts
from layerskip_core.decoding.drafters import DrafterSetup, drafter_for
from layerskip_core.errors import CheckpointError, ConfigError, DataError, TrainingInterrupted
from layerskip_core.export.gguf import write_gguf
from layerskip_core.model.spec import ModelSpec
from layerskip_core.training.drafter_run import DrafterJob
from layerskip_core.training.run import execute, prepare

DATA = {"answers": "data", "answer_tokens": DrafterConfig.answer_tokens}


@pytest.fixture
def frozen(settings):
    usual = {
        "data": DataConfig(limit=40, seed=1),
        "exits": (2,),
        "answer_tokens": 8,
        "lr": None,
        "max_length": 96,
    }
    return lambda **changes: settings(DrafterConfig, **{**usual, **changes})


def hashes(folder):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in Path(folder).iterdir()
        if file.is_file()
    }


def blocks(folder):
    return load_file(Path(folder) / "exit_blocks.safetensors")


def left_by_a_run(folder):
    return [path.suffix for path in Path(folder, "checkpoints").iterdir()]


def train(config):
    reports = []
    stages = []
    result = execute(prepare(config), reports.append, lambda *stage: stages.append(stage))
    return result.info.details["exit_blocks"], reports, stages


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(weight, other[name]) for name, weight in one.items()
    )


def test_a_run_lowers_the_divergence_and_raises_the_agreement(frozen, checkpoint):
    rows = {"validation": "train", "validation_samples": 40}
    trained, reports, stages = train(
        frozen(model=checkpoint, steps=80, lr=0.02, eval_steps=20, **rows)
    )
    assert trained["2"]["divergence"] < reports[0].exit_losses[2] / 2
    assert trained["2"]["agreement"] > next(
        report.agreement[2] for report in reports if report.agreement
    )
    assert stages[-1] == ("answers", 80, 80)


def test_the_copy_has_the_models_files_byte_by_byte(frozen, base):
    before = hashes(base)
    config = frozen()
    trained, _, _ = train(config)
    after = hashes(config.output)
    assert hashes(base) == before
    assert after.keys() == {*before, "exit_blocks.safetensors", "token_order.json"}
    assert {name for name in before if before[name] != after[name]} == {"layerskip.json"}
    info = read_info(config.output)
    assert info.details["exit_blocks"] == trained and set(info.files) == set(after)
    assert info.prompt_template == read_info(base).prompt_template
    assert left_by_a_run(config.output) == [".jsonl"]  # answers


def test_blocks_are_added_to_the_models_own_folder_and_exits_one_by_one(frozen, base, tmp_path):
    model = str(shutil.copytree(base, tmp_path / "model"))
    before = hashes(model)
    train(frozen(model=model, output=model))
    first = blocks(model)
    answers = hashes(Path(model) / "checkpoints")
    with pytest.raises(
        ConfigError, match="already has a block at exit 2; give `overwrite` to replace it"
    ):
        prepare(frozen(model=model, output=model, exits=(2, 3)))

    config = frozen(model=model, output=model, exits=(3,))
    assert len(prepare(config).answers.known) == 48
    train(config)
    second = blocks(model)
    assert hashes(Path(model) / "checkpoints") == answers  # the same answers, not decoded again
    assert {name.split(".")[1] for name in second} == {"2", "3"}
    assert same({name: weight for name, weight in second.items() if name in first}, first)
    assert read_info(model).details["exit_blocks"].keys() == {"2", "3"}
    assert {name for name, digest in hashes(model).items() if before.get(name) != digest} == {
        "exit_blocks.safetensors", "layerskip.json", "token_order.json",
    }  # fmt: skip


def write_tiny_gguf(path, **changes):
    model = tiny_model("qwen2", torch.float32, vocab_size=300, head_dim=16, **changes)
    write_gguf(model, tiny_loaded().tokenizer, ModelSpec.of(model.config), path, "q8_0")


def test_a_gguf_file_is_copied_into_a_folder_with_its_drafters(frozen, tmp_path):
    file = tmp_path / "model.Q8_0.gguf"
    write_tiny_gguf(file, hidden_size=64, intermediate_size=96)
    config = frozen(model=str(file), exits=(1,))
    train(config)
    output = Path(config.output)
    assert hashes(output).keys() == {
        file.name, "exit_blocks.safetensors", "layerskip.json", "token_order.json",
    }  # fmt: skip
    assert (output / file.name).read_bytes() == file.read_bytes()
    trained = blocks(output)
    train(replace(config, model=str(output), layout="eagle3", exits=None))  # in place
    for name in (output, output / file.name):
        backend = for_decoding(str(name), "cpu").backend
        assert backend.exit_blocks.keys() == {1} and "eagle3" in backend.drafters
        assert settings_file(ModelRef.of(str(name))) == output / "layerskip.json"
    assert same(blocks(output), trained)
    assert read_info(output).details["exit_blocks"].keys() == {"1", "eagle3"}
    alone = for_decoding(str(file), "cpu").backend
    assert not alone.exit_blocks and not alone.drafters

    with pytest.raises(ConfigError, match=r"in the way is model\.Q8_0\.gguf, which layerskip did"):
        prepare(replace(config, output=str(tmp_path)))
    copy = replace(config, model=str(output), output=str(tmp_path / "copy"), layout="exit")
    train(replace(copy, exits=(1,)))
    assert hashes(tmp_path / "copy" / "eagle3") == hashes(output / "eagle3")
    write_tiny_gguf(output / file.name, hidden_size=64, intermediate_size=64)
    with pytest.raises(CheckpointError, match="it was made from other weights than this model's"):
        for_decoding(str(output), "cpu")


@pytest.mark.parametrize("in_place", [True, False])
def test_what_a_sweep_saved_before_does_not_hide_new_blocks(frozen, base, tmp_path, in_place):
    """Plain decoding was the best, and exit 2 hardly ever right, before it had a block."""
    model = str(shutil.copytree(base, tmp_path / "model"))
    policies = {
        "exact": {"strategy": "autoregressive"},
        "fast": {"strategy": "early-exit", "exit_layer": 3},
    }
    profile = DraftProfile({"exit 2": 0.01}, (2.0, 2.1), {"exit 2": 9.0})
    saved = replace(
        read_info(model),
        exit_layer=3,
        strategy="autoregressive",
        policies=policies,
        profile=profile,
    )
    write_info(model, saved)
    asked = PackingConfig(adaptive=True)
    before = for_decoding(model, "cpu", packing=asked, policies=None)
    assert before.resolve({}, asked).strategy == "autoregressive"

    config = frozen(model=model, **({"output": model} if in_place else {}))
    job = prepare(config)
    assert len(job.plan.notes) == 1
    assert job.plan.notes[0].startswith(
        "saved settings that will be left out: policy exact, policy fast; they were chosen"
    )
    trained = execute(job).info.details["exit_blocks"]
    decoder = for_decoding(config.output, "cpu", packing=asked, policies=None)
    decoding = decoder.resolve({}, asked)
    assert (decoding.strategy, decoding.exits) == ("adaptive", (2,))
    assert decoding.profile == DraftProfile({"exit 2": trained["2"]["agreement"]}, (2.0, 2.1))
    drafter = drafter_for(DrafterSetup(decoder.backend, decoding))
    assert "exit 2" in drafter.bandit.arms
    assert in_place or read_info(model) == saved
    assert prepare(replace(config, overwrite=True)).plan.notes == (
        () if in_place else job.plan.notes
    )


def test_resuming_gives_the_same_blocks_bit_by_bit(frozen, tmp_path):
    changes = {"exits": (1, 3), "save_steps": 2}
    whole = str(tmp_path / "whole")
    cut = str(tmp_path / "cut")
    _, expected, _ = train(frozen(**changes, output=whole))
    assert [set(report.exit_losses) for report in expected] == [{1, 3}] * 4

    with pytest.raises(Interrupted):
        execute(prepare(frozen(**changes, output=cut)), stop_at(3))
    assert not (Path(cut) / "config.json").exists()
    with pytest.raises(ConfigError, match="holds an unfinished run; give `resume` to go on"):
        prepare(frozen(**changes, output=cut))
    with pytest.raises(
        ConfigError, match=r"`resume`: lr was 0\.02 in the run to go on with, and is 0\.1 now"
    ):
        prepare(frozen(**changes, output=cut, resume=True, lr=0.1))
    _, reports, stages = train(frozen(**changes, output=cut, resume=True))
    assert [report.step for report in reports] == [3, 4]
    assert [report.loss for report in reports] == [report.loss for report in expected[2:]]
    assert stages == [("answers", 48, 48)]  # not again
    assert same(blocks(cut), blocks(whole))


def test_rows_need_prompts_only(frozen, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(30))
        + '{"prompt": "%s"}\n' % ("x " * 99)
    )
    job = prepare(frozen(data=DataConfig(str(file)), steps=None))
    assert (job.plan.rows, job.plan.held_out, job.plan.left_out) == (
        30,
        0,
        1,
    )  # too few to hold some out
    assert job.plan.steps == 15  # two passes, 4 rows a step
    with pytest.raises(DataError, match="no column 'completion'"):
        prepare(frozen(data=DataConfig(str(file)), **DATA))


def test_models_that_cannot_be_copied_or_drafted_for_and_several_processes_are_refused(
    frozen, base, tmp_path, monkeypatch
):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an adapter; .* `layerskip import`"):
        prepare(frozen(model=str(tmp_path / "adapter")))
    (tmp_path / "older").mkdir()
    shutil.copy(Path(base) / "config.json", tmp_path / "older")
    (tmp_path / "older" / "int4.safetensors").touch()  # is not the model's weights
    with pytest.raises(
        CheckpointError,
        match="has no safetensors, which are copied as they are: `layerskip import`",
    ):
        prepare(frozen(model=str(tmp_path / "older")))
    with pytest.raises(ConfigError, match="`model` must be a model of at least 2 layers, got 1"):
        prepare(frozen(model=saved_base(tmp_path / "shallow", num_hidden_layers=1)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match="a drafter is trained in one process, not in 2 by torchrun"
    ):
        prepare(frozen())


def test_a_run_that_was_killed_after_its_file_was_written_ends_by_resuming(
    frozen, base, tmp_path, monkeypatch
):
    model = str(shutil.copytree(base, tmp_path / "model"))
    config = frozen(model=model, output=model, save_steps=2)

    def killed(job, *arguments, save=DrafterJob.save):
        save(job, *arguments)
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(DrafterJob, "save", killed)
        execute(prepare(config))
    written = hashes(model)
    with pytest.raises(ConfigError, match="holds an unfinished run; give `resume` to go on"):
        prepare(config)
    train(replace(config, resume=True))
    assert hashes(model) == written
    assert left_by_a_run(model) == [".jsonl"]


def test_a_signal_before_the_training_keeps_what_is_done(frozen):
    job = prepare(frozen())

    def interrupt(stage, done, total):
        if done >= 32:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        TrainingInterrupted, match=r"interrupted after 32 of 48 answers, which are kept"
    ):
        execute(job, lambda report: None, interrupt)
    assert len(prepare(frozen(resume=True)).answers.known) == 32


def test_answers_of_the_data_need_no_decoding(frozen, base):
    config = frozen(**DATA, validation="validation", validation_samples=7)
    job = prepare(config)
    tokenizer = for_training(base).tokenizer
    row = job.texts.rows[0]
    answer = [label for label in row["labels"].tolist() if label >= 0]
    assert row["input_ids"][-len(answer) :].tolist() == answer and tokenizer.decode(
        answer
    ).startswith("[IN:")
    assert (job.plan.rows, job.plan.held_out) == (40, 7)
    _, _, stages = train(config)
    assert not stages


def test_rows_with_an_empty_prompt_are_left_out_and_without_prompts_are_their_own_answers(
    frozen, tmp_path
):
    rows = tmp_path / "rows.jsonl"
    prompts = ["a b", "", None, " ", "c d"]
    rows.write_text(
        "".join(json.dumps({"prompt": prompt, "completion": "c"}) + "\n" for prompt in prompts)
    )
    data = DataConfig(name=str(rows))
    assert [row.prompt for row in load_prompts(data)] == ["a b", "c d"]
    assert prepare(frozen(data=data)).plan.rows == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"completion": "wake me up at {row}"}}\n' for row in range(8)))
    assert (
        prepare(frozen(data=DataConfig(str(rows)), **{**DATA, "answers": None})).config.answers
        == "data"
    )
