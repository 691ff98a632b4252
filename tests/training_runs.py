"""Runs of a few steps on a small untrained model, for the tests of training."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import as_on_this_cpu, tiny_model
from forks import hasten, import_once
from safetensors.torch import load_file

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.config.model import DataConfig
from layerskip_core.config.training import FinetuneConfig, RecipeSettings
from layerskip_core.data import load_examples
from layerskip_core.losses import IGNORED
from layerskip_core.model import TransformersBackend
from layerskip_core.model.exit_blocks import ExitBlock
from layerskip_core.training import answers
from layerskip_core.training.encoding import train_tokenizer
from layerskip_core.training.exit_blocks import new_exit_blocks
from layerskip_core.training.module import RecipeModule
from layerskip_core.training.recipe import resolve_recipe
from layerskip_core.training.run import execute, prepare

answers.OWN_TEXTS = answers.OWN_TOKENS = 4  # of text on which the cost of a training is measured
RECIPE = RecipeSettings("finetune", p_max=0.2, e_scale=1.0, curriculum="rotational", rotation=2)


class Interrupted(Exception):
    """What a test stops a run with."""


def stop_at(step):
    """A listener that ends the run with the report of a step, before that step's checkpoint."""

    def listen(report):
        if report.step == step:
            raise Interrupted

    return listen


def in_processes(function, processes, folder, *arguments):
    """Calls function(rank, *arguments) in processes that gloo connects; a single one is this
    process.
    """
    folder.mkdir(exist_ok=True)
    if processes == 1:
        function(0, *arguments)
        return
    import_once()
    torch.multiprocessing.start_processes(
        _connected,
        (processes, str(folder), function, arguments),
        processes,
        start_method="forkserver",
    )


def _connected(rank, processes, folder, function, arguments):
    hasten()
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    function(rank, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_quietly(config):
    execute(prepare(config))


def saved_base(folder, **changes):
    tokenizer = train_tokenizer(load_examples(DataConfig(limit=300)), 300)
    shape = {"vocab_size": 300, "num_hidden_layers": 4, "max_position_embeddings": 256, **changes}
    model = tiny_model(dtype=torch.float32, **shape)
    model.apply(model._init_weights)  # the usual small random weights: these are to be trained
    save_checkpoint(as_on_this_cpu(model), tokenizer, CheckpointInfo(), str(folder), torch.float32)
    return str(folder)


def settings_on(base, tmp_path):
    """Makes FinetuneConfigs of a few steps on the CPU, or other configs: defaults that keywords
    change.
    """

    def make(kind=FinetuneConfig, **changes):
        defaults = {
            "model": base,
            "data": DataConfig(limit=32, seed=1),
            "output": str(tmp_path / "out"),
            "lr": 1e-3,
            "steps": 4,
            "batch_size": 4,
            "max_length": 128,
            "warmup": 0.0,
            "device": "cpu",
            "dtype": "fp32",
        }
        if kind is FinetuneConfig:
            defaults["recipe"] = RECIPE
        return kind(**{**defaults, **changes})

    return make


def train(config):
    reports = []
    execute(prepare(config), reports.append)
    return reports


def recipe_module(model, recipe, *arguments, **keywords):
    """The training module of a model under RecipeSettings, with its exit blocks."""
    backend = TransformersBackend(
        model.get_base_model() if hasattr(model, "get_base_model") else model
    )
    resolved = resolve_recipe(recipe, backend.spec, 100)
    if resolved.exit_reader != "none":
        keywords["exit_blocks"] = new_exit_blocks(backend, list(map(ExitBlock, resolved.exits)))
    return RecipeModule(model, resolved, *arguments, **keywords)


def batch(rows=3, length=9):
    """Ids and labels (B, T) of the tiny model's tokens, some of them without a target."""
    ids = torch.randint(3, 67, (rows, length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :3] = IGNORED
    labels[1:2, 7:] = IGNORED
    return ids, labels


def loss_rows(folder):
    return [json.loads(line) for line in (Path(folder) / "losses.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same_weights(folder, reference):
    found = weights(folder)
    expected = weights(reference)
    return found.keys() == expected.keys() and all(
        torch.equal(weight, expected[name]) for name, weight in found.items()
    )


def require_exact_resumption(make, folder, between=lambda: None, **changes):
    """A run of four steps that is cut in the third and resumed takes the steps of one that is not,
    bit by bit.
    """
    whole = folder / "whole"
    cut = folder / "cut"
    changes = {**changes, "steps": 4, "save_steps": 2}
    expected = train(make(**changes, output=str(whole)))
    with pytest.raises(Interrupted):
        execute(prepare(make(**changes, output=str(cut))), stop_at(3))
    assert not (cut / "config.json").exists()
    between()
    reports = train(make(**changes, output=str(cut), resume=True))
    assert [report.step for report in reports] == [3, 4]
    assert [report.loss for report in reports] == [report.loss for report in expected[2:]]
    # Those of exits that were on before the cut too
    assert reports[-1].exit_losses == expected[-1].exit_losses
    assert same_weights(cut, whole)
    assert (cut / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
