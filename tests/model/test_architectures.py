"""The commands on a small random checkpoint of every supported architecture: with an exit of one's own, and without."""

import pytest
import torch
from command_line import run
from conftest import tiny_model
from evaluating import tiny_loaded

from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.model.spec import SUPPORTED

NEW = ("--max-new-tokens", "3")
ONE = ("--samples", "1", "--device", "cpu")


@pytest.fixture(scope="module", params=SUPPORTED)
def folder(request, tmp_path_factory):
    loaded = tiny_loaded(torch.float32)
    vocabulary = {"vocab_size": len(loaded.tokenizer), "eos_token_id": loaded.tokenizer.eos_token_id}
    model = tiny_model(request.param, torch.float32, num_hidden_layers=3, **vocabulary)
    path = str(tmp_path_factory.mktemp(request.param))
    save_checkpoint(model, loaded.tokenizer, loaded.info, path, torch.float32)
    return path


@pytest.mark.parametrize("chosen", [(), ("--exit", "2", "--spec", "2")], ids=["default", "exit"])
def test_generate(folder, chosen):
    result = run("generate", "wake me up", *chosen, *NEW, "--stats", "--model", folder)
    assert result.code == 0 and "error" not in result.err
    plain = run("generate", "wake me up", "--strategy", "autoregressive", *NEW, "--model", folder)
    assert result.out == plain.out and "3 tokens" in result.err


@pytest.mark.parametrize("chosen", [(), ("--exit", "2", "--spec", "2")], ids=["default", "exit"])
def test_bench(folder, chosen):
    result = run("bench", *chosen, *ONE, *NEW, "--repeats", "1", "--format", "csv", "--model", folder)
    assert result.code == 0 and len(result.out.splitlines()) == 4, result.err


@pytest.mark.parametrize("chosen", [(), ("--exits", "2")], ids=["default", "exit"])
def test_sweep_exits(folder, chosen):
    result = run("sweep-exits", *chosen, "--specs", "2", *ONE, *NEW, "--format", "csv", "--model", folder)
    assert result.code == 0 and len(result.out.splitlines()) > 2, result.err


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [(), ("--exits", "2")], ids=["default", "exit"])
def test_finetune(folder, chosen, tmp_path):
    settings = ("--steps", "1", "--batch-size", "2", "--samples", "4", "--max-length", "48", "--dtype", "fp32")
    output = str(tmp_path / "out")
    result = run("finetune", "--model", folder, *settings, *chosen, "--device", "cpu", "--output", output)
    assert result.code == 0, result.err
    assert run("generate", "wake me up", *NEW, "--exit", "2", "--model", output).code == 0
