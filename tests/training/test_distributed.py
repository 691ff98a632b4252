"""Layer dropout and the loss belong to the optimizer step: however its rows are divided, they train
the same.

Batches of one process by accumulation, one batch of all rows, and processes of torch.distributed on
the CPU (gloo).
"""

from pathlib import Path

import pytest
import torch
from command_line import run
from training_runs import in_processes, loss_rows, run_quietly, same_weights, settings_on, weights

from layerskip_core.config.model import DataConfig
from layerskip_core.config.training import RecipeSettings

DROPPING = RecipeSettings("finetune", p_max=0.9, e_scale=1.0, curriculum="rotational", rotation=2)


def rows_of_one_length(folder):
    """16 rows for two steps of 8: no batch needs padding, and none is sorted apart."""
    file = Path(folder) / "rows.jsonl"
    file.write_text(
        "".join(
            f'{{"prompt": "row {row}", "completion": "is {row}"}}\n' for row in "abcdefghijklmnop"
        )
    )
    return DataConfig(name=str(file))


def train_divided(rank, base, folder, data, batch_size, accumulation):
    divided = {"batch_size": batch_size, "accumulation": accumulation, "save_steps": 2}
    run_quietly(settings_on(base, Path(folder))(data=data, recipe=DROPPING, steps=2, **divided))


def test_accumulation_one_batch_and_four_processes_train_the_same(base, tmp_path):
    """1 row x 8, 8 rows x 1, 2 x 4, and 4 processes with 2 rows each. Tolerance: fp32 sums in
    another order.
    """
    divisions = {
        "accumulated": (1, 1, 8),
        "whole": (1, 8, 1),
        "mixed": (1, 2, 4),
        "processes": (4, 2, 1),
    }
    data = rows_of_one_length(tmp_path)
    for name, (processes, *sizes) in divisions.items():
        in_processes(
            train_divided, processes, tmp_path / name, base, str(tmp_path / name), data, *sizes
        )
    expected = loss_rows(tmp_path / "whole" / "out")
    reference = weights(tmp_path / "whole" / "out")
    for name in divisions:
        for step, other in zip(loss_rows(tmp_path / name / "out"), expected, strict=True):
            assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert step["exits"] == pytest.approx(other["exits"], rel=1e-5)
        for key, weight in weights(tmp_path / name / "out").items():
            torch.testing.assert_close(weight, reference[key], rtol=1e-4, atol=2e-5)


def train_by_command(rank, folder, *arguments):
    """Notes the exit status and what the process says."""
    result = run(*arguments)
    Path(folder, f"said-{rank}").write_text(
        f"{result.code} {result.out}{result.err.count('saved ')}"
    )


@pytest.mark.slow
def test_two_processes_equal_one_with_accumulation_2_bit_for_bit(base, tmp_path):
    """The same batches of 2 rows, one of them written by the original, and sums of two numbers,
    which have no order.
    """
    shared = (
        f"finetune --model {base} --samples 12 --steps 4 --batch-size 2 --max-length 64 --pmax 0.9",
        "--lr 1e-3 --gradient-checkpointing --device cpu --dtype fp32 --validation test",
        "--validation-samples 5 --save-steps 3 --threads 1 --replay 0.5",
    )
    both = str(tmp_path / "both")
    single = str(tmp_path / "single")
    in_processes(train_by_command, 2, tmp_path, str(tmp_path), *shared, "--output", both)
    # Only one process reports
    assert [Path(tmp_path, f"said-{rank}").read_text() for rank in (0, 1)] == ["0 1", "0 0"]
    threads = torch.get_num_threads()
    try:
        assert run(*shared, f"--accumulation 2 --output {single}").code == 0
    finally:
        torch.set_num_threads(threads)
    for step, expected in zip(loss_rows(both), loss_rows(single), strict=True):
        assert step.pop("validation", {}) == pytest.approx(expected.pop("validation", {}), rel=1e-5)
        assert step == expected
    assert loss_rows(both)[-1]["validation"]
    assert same_weights(both, single)
    assert not list(Path(both, "checkpoints").glob("checkpoint-*"))
