"""Two processes on the CPU: DDP by torchrun, and FSDP2 around the training module. One process is what they must equal."""

import sys
from pathlib import Path

import pytest
import torch
from command_line import finish, run, start
from conftest import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_runs import loss_rows, recipe_module, weights

from layerskip_core.config.training import RecipeConfig
from layerskip_core.errors import ConfigError
from layerskip_core.training import module
from layerskip_core.training.dropout import kept_rows
from layerskip_core.training.module import Moment
from layerskip_core.training.prepare import prepare

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

    drawn = []

    def repeated(rate, batch_size, seed, step, micro_batch, layer):
        rows = kept_rows(rate, batch_size, seed, step, 0, layer)
        drawn.append(rows)
        return rows

    monkeypatch.setattr(module, "kept_rows", repeated)
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


def test_sharding_on_the_cpu_is_refused(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"FSDP .* needs GPUs, got `device` cpu, where accelerate would run DDP"):
        prepare(settings())


def gradients(training, rank, ranks):
    """Those of the mean loss over all rows, from the share of one rank."""
    ids = torch.randint(3, 67, (4, 9), generator=torch.Generator().manual_seed(5))
    share = ids[rank * 4 // ranks : (rank + 1) * 4 // ranks]
    output = training(share, share, Moment(1, 10))
    (output["loss"] / (4 * 8) * ranks).backward()
    return output["loss"].item()


def sharded_process(rank, rendezvous, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model, training = sharded_case()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(training, mesh=mesh)
    loss = gradients(training, rank, 2)
    whole = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    results.put((rank, loss, {name: gradient.numpy() for name, gradient in whole.items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def sharded_case():
    """Dropout that leaves some layer without a row, distillation, recomputed layers, every exit."""
    model = tiny_model()
    recipe = RecipeConfig(p_max=0.9, curriculum="all", distill=0.5)
    return model, recipe_module(model, recipe, seed=4, recompute=True).train()


@pytest.mark.slow
def test_fully_shard_around_the_training_module(tmp_path):
    """Each rank has two rows and the same mask. One process: the same two batches in sequence."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "rendezvous"), results)
    processes = [context.Process(target=sharded_process, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    by_rank = {rank: (loss, grads) for rank, loss, grads in (results.get(timeout=100) for _ in processes)}
    for process in processes:
        process.join()
        assert process.exitcode == 0

    kept = [kept_rows(rate, 2, 4, 1, 0, layer) for layer, rate in enumerate(sharded_case()[1]._rates(Moment(1, 10)))]
    assert [] in kept and [0, 1] in kept
    model, training = sharded_case()
    losses = [gradients(training, rank, 2) for rank in (0, 1)]
    assert [by_rank[rank][0] for rank in (0, 1)] == pytest.approx(losses, rel=1e-6)
    for name, parameter in model.named_parameters():
        for rank in (0, 1):
            torch.testing.assert_close(torch.from_numpy(by_rank[rank][1][name]), parameter.grad / 2, rtol=1e-5, atol=1e-8)
