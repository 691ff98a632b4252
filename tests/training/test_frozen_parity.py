"""What training computes for a block is what decoding computes with the saved block, on true states and on its own."""

import pytest
import torch
from conftest import tiny_model

from layerskip_core.losses import IGNORED
from layerskip_core.model import TransformersBackend
from layerskip_core.model.exit_blocks import ExitBlock, ExitBlocks
from layerskip_core.training.exit_blocks import FrozenExits

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]])
EXIT = 2


def moved_blocks(model, block):
    """Blocks in training, away from where they start."""
    module = FrozenExits(TransformersBackend(model), [block])
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return module


def outputs_in_training(module, backend):
    """The normed outputs (T, D) of each run of a block, at all positions but the last."""
    runs = []
    module.exits[str(EXIT)].register_forward_hook(lambda block, _, output: runs.append(output))
    with torch.no_grad():
        hidden, positions = backend.embed(IDS), torch.arange(IDS.shape[1])[None]
        states = backend.run_layers(hidden, 0, EXIT, positions)
        finals = backend.normed(backend.run_layers(states, EXIT, backend.num_layers, positions))
        labels = torch.cat((torch.tensor([[IGNORED]]), IDS[:, 1:]), dim=1)
        module(IDS, labels, states[None], finals, torch.tensor([EXIT]))
    return states, finals, [run[0] for run in runs]


@pytest.mark.parametrize("feature", ["none", "final"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_a_block_gives_the_same_in_training_and_in_decoding(model_type, feature):
    model = tiny_model(model_type, dtype=torch.float32)
    block = ExitBlock(EXIT, feature)
    module = moved_blocks(model, block)
    weights = module.weights()
    decoding = TransformersBackend(model, ExitBlocks((block,), weights.get))
    placed = decoding.exit_blocks[EXIT]
    states, finals, runs = outputs_in_training(module, decoding)

    before = torch.cat((torch.zeros(1, 1, finals.shape[-1]), finals[:, :-1]), dim=1)
    cache = decoding.new_cache(1)
    with torch.no_grad():
        for place in range(IDS.shape[1]):  # token by token, as drafts are made
            positions = torch.tensor([[place]])
            entered = placed.enter(states[:, place : place + 1], before[:, place : place + 1])
            output = placed.norm(decoding.run_layers(entered, placed.layer, placed.layer + 1, positions, cache))
            torch.testing.assert_close(output[0, 0], runs[0][place], rtol=1e-4, atol=1e-4)
            logits = placed.head(decoding.run_layers(entered, placed.layer, placed.layer + 1, positions, cache))
            torch.testing.assert_close(logits[0, 0], module._logits(runs[0][place]), rtol=1e-4, atol=1e-3)


def test_a_second_draft_is_what_the_second_run_gives_where_nothing_stands_before_it():
    """At the second token: the block reads its own output for the first, in both; later keys differ by design."""
    model = tiny_model(dtype=torch.float32)
    block = ExitBlock(EXIT, "final")
    module = moved_blocks(model, block)
    decoding = TransformersBackend(model, ExitBlocks((block,), module.weights().get))
    placed = decoding.exit_blocks[EXIT]
    states, _, runs = outputs_in_training(module, decoding)
    cache, own = decoding.new_cache(1), torch.zeros(1, 1, states.shape[-1])
    with torch.no_grad():
        for place in range(2):  # no token stands before the first, so its draft is the same in both runs
            entered = placed.enter(states[:, place : place + 1], own)
            positions = torch.tensor([[place]])
            own = placed.norm(decoding.run_layers(entered, placed.layer, placed.layer + 1, positions, cache))
            torch.testing.assert_close(own[0, 0], runs[1][place], rtol=1e-4, atol=1e-4)
