"""DDP by torchrun, two processes on the CPU. One process is what they must equal."""

import sys
from pathlib import Path

import pytest
import torch
from command_line import finish, run, start
from training_runs import loss_rows, repeat_masks, weights

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cli")


@pytest.mark.slow
def test_two_processes_equal_one_with_accumulation_2(base, tmp_path, monkeypatch):
    """The same batches of 2 rows, one of them written by the original, and the loss over the tokens of both.

    p_max 0.9 leaves layers without a row on some steps.
    The mask repeats over the ranks, so here it must repeat over the micro-batches. Tolerance: fp32 sums in another order,
    at a learning rate of 1e-3.
    """
    shared = ("finetune", "--model", base, "--samples", "12", "--steps", "4", "--batch-size", "2", "--max-length", "64",
              "--pmax", "0.9", "--lr", "1e-3", "--gradient-checkpointing", "--device", "cpu", "--dtype", "fp32",
              "--validation", "test", "--validation-samples", "5", "--save-steps", "3", "--threads", "1",
              "--anchor", "0.5", "--replay", "0.5", "--replay-tokens", "8")  # fmt: skip
    both, single = str(tmp_path / "both"), str(tmp_path / "single")
    process = start(*shared, "--output", both, command=TORCHRUN)

    drawn = repeat_masks(monkeypatch)
    threads = torch.get_num_threads()
    try:
        assert run(*shared, "--accumulation", "2", "--output", single).code == 0
    finally:
        torch.set_num_threads(threads)
    assert [] in drawn and [0, 1] in drawn and ([0] in drawn or [1] in drawn)

    result = finish(process)
    assert (result.code, result.out) == (0, ""), result.err
    assert result.err.count("saved ") == 1  # only one process reports
    ours, reference = map(loss_rows, (both, single))
    for step, expected in zip(ours, reference, strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert step["exits"] == pytest.approx(expected["exits"], rel=1e-5)
        assert step["divergence"] == pytest.approx(expected["divergence"], rel=1e-3)
        assert step["validation"] == pytest.approx(expected["validation"], rel=1e-4)
    assert reference[-1]["validation"]
    expected_weights = weights(single)
    for name, weight in weights(both).items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=2e-5)
    checkpoint = Path(both) / "checkpoints" / "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} <= {file.name for file in checkpoint.iterdir()}
