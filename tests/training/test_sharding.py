"""FSDP2 through `finetune`, end to end: two processes on the CPU with gloo, and one process, which
they must equal.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    Interrupted,
    in_processes,
    loss_rows,
    run_quietly,
    same_weights,
    saved_base,
    settings_on,
    stop_at,
    weights,
)

from layerskip_core.checkpoint.info import read_info
from layerskip_core.config.model import DataConfig
from layerskip_core.config.training import RecipeSettings
from layerskip_core.errors import ConfigError
from layerskip_core.training import data as running_data
from layerskip_core.training import trainer
from layerskip_core.training.run import execute, own_device, prepare

WHOLE = {
    "batch_size": 2,
    "recipe": RecipeSettings(
        "finetune", p_max=0.9, e_scale=1.0, curriculum="rotational", rotation=2, distill=0.5
    ),
    "gradient_checkpointing": True,
    "validation": "test",
    "validation_samples": 3,  # rows for one process, none for the other in the second batch
    "max_length": 64,
    "seed": 3,
}
ADAPTERS = WHOLE | {"lora_rank": 2, "validation": None, "validation_samples": None,
                    "recipe": replace(WHOLE["recipe"], exits=(2,), rotation=None), "lr": 1e-2}  # fmt: skip


BLOCKS = {
    "recipe": RecipeSettings(p_max=0.0, exits=(2,)),
    "batch_size": 2,
    "steps": 2,
    "max_length": 64,
    "seed": 3,
}


def sharded_runs(rank, base, folder):
    settings = settings_on(base, Path(folder))
    run_quietly(settings(**WHOLE, fsdp=True, output=f"{folder}/whole"))
    resumed = {**WHOLE, "fsdp": True, "output": f"{folder}/resumed", "save_steps": 2}
    try:
        execute(prepare(settings(**resumed)), stop_at(3))
    except Interrupted:
        torch.distributed.barrier()
    run_quietly(settings(**resumed, resume=True))
    run_quietly(settings(**ADAPTERS, fsdp=True, output=f"{folder}/adapters"))
    run_quietly(settings(**BLOCKS, fsdp=True, output=f"{folder}/blocks"))
    running_data._COUNTED = 8  # rows of a stream, for the order of the tokens
    seen = []
    trainer.collate = lambda rows: (
        seen.extend(row["input_ids"].tolist() for row in rows) or running_data.collate(rows)
    )
    streamed = {
        "data": DataConfig(name=f"{folder}/rows.jsonl"),
        "streaming": True,
        "steps": 2,
        "batch_size": 2,
    }
    run_quietly(settings(**streamed, fsdp=True, output=f"{folder}/streamed"))
    Path(f"{folder}/seen-{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("base"), tie_word_embeddings=True)


@pytest.fixture
def settings(base, tmp_path):
    return settings_on(base, tmp_path)


@pytest.mark.slow
def test_two_processes_with_shards_equal_one(base, settings, tmp_path):
    """Tied embeddings, recomputed layers, layers without a row, exits that are off, adapters, a
    resumption, a stream.

    One process takes the batches of both in turn. Tolerance: fp32 sums in another order.
    """
    rows = [f'{{"prompt": "row {row}", "completion": "{row} is the row"}}\n' for row in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    for name, asked in (("one", WHOLE), ("one-adapted", ADAPTERS), ("one-read", BLOCKS)):
        run_quietly(settings(**asked, accumulation=2, output=str(tmp_path / name)))
    in_processes(sharded_runs, 2, tmp_path, base, str(tmp_path))

    for sharded, one in (("whole", "one"), ("adapters", "one-adapted")):
        for step, expected in zip(
            loss_rows(tmp_path / sharded), loss_rows(tmp_path / one), strict=True
        ):
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert step["exits"] == pytest.approx(expected["exits"], rel=1e-5)
            assert step.get("validation", {}) == pytest.approx(
                expected.get("validation", {}), rel=1e-4
            )
        reference = weights(tmp_path / one)
        assert weights(tmp_path / sharded).keys() == reference.keys()
        for name, weight in weights(tmp_path / sharded).items():
            torch.testing.assert_close(weight, reference[name], rtol=1e-4, atol=2e-5)
        assert (tmp_path / sharded / "config.json").read_bytes() == (
            tmp_path / one / "config.json"
        ).read_bytes()
        # In fp32, of the whole model
        cost, expected = (read_info(tmp_path / name).cost for name in (sharded, one))
        for name in ("tokens", "agreement", "before", "after"):
            assert getattr(cost, name) == pytest.approx(getattr(expected, name), rel=1e-4)
        assert cost.before != pytest.approx(cost.after, rel=1e-3) and cost.task is None
    assert loss_rows(tmp_path / "whole")[-1]["validation"]
    read, expected = (
        load_file(tmp_path / name / "exit_blocks.safetensors") for name in ("blocks", "one-read")
    )
    # Muon, in bf16, makes directions of hardly any gradient as long as the others
    for name, weight in read.items():
        moved = (
            expected[name]
            - weights(base)[
                name.replace("exits.2.layer.", "model.layers.3.").replace("exits.2", "model")
            ]
        )
        assert (weight - expected[name]).norm() <= 0.5 * moved.norm()
    for step, one in zip(
        loss_rows(tmp_path / "blocks"), loss_rows(tmp_path / "one-read"), strict=True
    ):
        assert step["exits"] == pytest.approx(one["exits"], rel=1e-2)
    assert (tmp_path / "resumed" / "losses.jsonl").read_bytes() == (
        tmp_path / "whole" / "losses.jsonl"
    ).read_bytes()
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")
    seen = [
        {tuple(ids) for ids in json.loads((tmp_path / f"seen-{rank}.json").read_text())[:4]}
        for rank in (0, 1)
    ]
    # Of eight rows: each is read once
    assert [len(ids) for ids in seen] == [4, 4] and not seen[0] & seen[1]


def test_sharding_needs_processes_and_no_config_of_accelerate(settings, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"`fsdp` must be used under torchrun with at least 2 processes .*, got 1"
    ):
        prepare(settings(fsdp=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    with pytest.raises(
        ConfigError, match="accelerate's use_fsdp must be false; give `fsdp` instead, got true"
    ):
        prepare(settings())


def test_sharded_and_whole_checkpoints_are_not_mixed(settings, monkeypatch):
    with pytest.raises(Interrupted):
        execute(prepare(settings(save_steps=1)), stop_at(2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match="`resume`: fsdp was False in the run to go on with, and is True now"
    ):
        prepare(settings(save_steps=1, fsdp=True, resume=True))


def test_each_process_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device(torch.device("cuda:0")) == torch.device("cuda")
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ConfigError,
        match=r"`device` must be cuda with at least 3 GPUs here, one per process .*, got 2",
    ):
        own_device(torch.device("cuda"))
