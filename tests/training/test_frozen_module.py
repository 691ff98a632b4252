"""Exit blocks in training compute what plain models do that have the block as their last layer, and
what decoding does.
"""

from copy import deepcopy

import pytest
import torch
from conftest import run_texts, tiny_model

from layerskip_core.losses import IGNORED, CandidateHead
from layerskip_core.model import TransformersBackend, vocabulary
from layerskip_core.model.exit_blocks import MTP, ExitBlock, StoredDrafters
from layerskip_core.training import exit_blocks
from layerskip_core.training.exit_blocks import FrozenExits
from layerskip_core.training.recipe import RunStep

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 16, 16]])
LABELS = torch.tensor(
    [[IGNORED, IGNORED, IGNORED, 8, 9, 10, 11], [IGNORED, IGNORED, 14, 15, 16, IGNORED, IGNORED]]
)
EXIT = 2


BATCH = {"input_ids": IDS, "labels": LABELS}


def module_of(model, *blocks, noise=0.05):
    """Blocks that have moved away from where they start."""
    module = FrozenExits(TransformersBackend(model), blocks)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight += noise * torch.randn_like(weight)
    return module


def recorded(heads):
    """CandidateHead, which adds every head to the list `heads`."""

    def head(*arguments):
        heads.append(CandidateHead(*arguments))
        return heads[-1]

    return head


def plain_model(model, module, exit_layer):
    """The first layers, the block's layer and norm, and the head, as one model of transformers."""
    block = module.exits[str(exit_layer)]
    plain = deepcopy(model)
    plain.model.layers = plain.model.layers[:exit_layer].append(deepcopy(block.layer))
    plain.model.layers[-1].self_attn.layer_idx = exit_layer
    plain.model.norm = deepcopy(block.norm)
    plain.config.num_hidden_layers = exit_layer + 1
    return plain


def targets_of(logits):
    """At the positions whose next token has a label."""
    return logits[:, :-1][LABELS[:, 1:] != IGNORED]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "olmo2"])
def test_a_block_computes_what_the_plain_model_with_it_computes(model_type):
    model = tiny_model(model_type, dtype=torch.float32)
    module = module_of(model, ExitBlock(EXIT))
    output = module(**BATCH)
    with torch.no_grad():
        exit_logits = targets_of(plain_model(model, module, EXIT)(IDS, use_cache=False).logits)
        full = targets_of(model(IDS, use_cache=False).logits)
    aim = full.log_softmax(-1)
    found = exit_logits.log_softmax(-1)
    assert float(output["loss"].detach()) == pytest.approx(
        float((aim.exp() * (aim - found)).sum()), rel=1e-4
    )
    assert torch.equal(output["per_exit"], output["loss"][None].detach())
    with torch.no_grad():
        output = module(**BATCH)
    assert int(output["agreeing"]) == int((full.argmax(-1) == exit_logits.argmax(-1)).sum())
    assert output["exit_layers"] == (EXIT,)


def test_a_block_starts_as_the_last_layer():
    model = tiny_model(dtype=torch.float32)
    alone = FrozenExits(TransformersBackend(model), [ExitBlock(EXIT)])
    last = model.model.layers[-1].state_dict()
    assert all(
        torch.equal(weight, last[name])
        for name, weight in alone.exits["2"].layer.state_dict().items()
    )


def test_both_exits_are_trained_as_alone_and_nothing_of_the_model():
    model = tiny_model(dtype=torch.float32)
    module = module_of(model, ExitBlock(2), ExitBlock(4))
    both = module(**BATCH)
    both["loss"].backward()
    trained = {name for name, weight in module.named_parameters() if weight.grad is not None}
    assert trained == {name for name, weight in module.weights().items() if weight.dim() == 2}
    assert all(weight.grad is None for weight in model.parameters())
    assert len(module.weights()) == 2 * (len(model.model.layers[-1].state_dict()) + 1)
    single = []
    for exit_layer in (2, 4):
        alone = FrozenExits(module.backend, [ExitBlock(exit_layer)])
        alone.exits[str(exit_layer)].load_state_dict(module.exits[str(exit_layer)].state_dict())
        single.append(alone(**BATCH)["per_exit"])
    assert both["exit_layers"] == (2, 4) and torch.equal(both["per_exit"], torch.cat(single))


def scoring(monkeypatch, model, tokens, *blocks):
    """A module whose exits score so many tokens, as those of a large vocabulary do."""
    monkeypatch.setattr(vocabulary, "_EXIT_VOCABULARY", tokens)
    module = module_of(model, *blocks)
    module.begin([{"input_ids": row.numpy(), "labels": row.numpy()} for row in LABELS])
    return module


def test_exits_of_a_large_vocabulary_score_a_part_of_it_in_training(monkeypatch):
    """The sample has all others at first: the loss of the whole vocabulary. Evaluation scores all."""
    model = tiny_model(dtype=torch.float32)
    expected = module_of(model, ExitBlock(EXIT))(**BATCH)
    expected["loss"].backward()
    module = scoring(monkeypatch, model, 4, ExitBlock(EXIT))
    heads = []
    monkeypatch.setattr(exit_blocks, "CandidateHead", recorded(heads))
    found = module(**BATCH, step=RunStep(1, 2))
    torch.testing.assert_close(found["per_exit"], expected["per_exit"])
    assert len(heads) == 1

    monkeypatch.setattr(exit_blocks, "_SAMPLED", 5)
    first, again, other = (
        module(**BATCH, step=RunStep(done, 2))["loss"].item() for done in (0, 0, 1)
    )
    assert first == again != other
    module.eval()
    with torch.no_grad():
        measured = module(**BATCH, step=RunStep(1, 2))
    torch.testing.assert_close(measured["per_exit"], expected["per_exit"])


@pytest.mark.parametrize("model_type, blocks", [("gemma2", ExitBlock(EXIT)), ("llama", MTP)])
def test_heads_that_change_their_products_and_mtp_score_all_tokens(model_type, blocks, monkeypatch):
    module = scoring(monkeypatch, tiny_model(model_type, dtype=torch.float32), 4, blocks)
    monkeypatch.setattr(exit_blocks, "CandidateHead", None)
    module(**BATCH, step=RunStep(0, 2))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_states_are_those_of_each_text_alone(model_type):
    """Gemma's final norm is another one."""
    module = FrozenExits(
        TransformersBackend(tiny_model(model_type, dtype=torch.float32)),
        [ExitBlock(2), ExitBlock(4)],
    )
    backend, (states, finals) = module.backend, module.states(IDS)
    for row, ids in enumerate(IDS):
        hidden = backend.embed(ids[None])
        expected = [run_texts(backend, hidden, 0, stop)[0] for stop in (2, 4, backend.num_layers)]
        for found, wanted in zip(
            (*states, finals), (*expected[:2], backend.normed(expected[2])), strict=True
        ):
            torch.testing.assert_close(found[row], wanted)
    module.decoder = None  # padded further, known texts need no pass
    again, _ = module.states(torch.nn.functional.pad(IDS.flip(0), (0, 3)))
    assert torch.equal(again[0].flip(0)[:, : IDS.shape[1]], states[0])


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_muon_trains_the_matrices_alone(model_type):
    """Not the experts of a mixture, which are in one weight of three dimensions."""
    module = module_of(tiny_model(model_type, dtype=torch.float32), ExitBlock(2))
    trained, _ = module.muon(0.1)
    assert list(map(id, trained)) == [
        id(weight) for weight in module.parameters() if weight.dim() == 2 and weight.requires_grad
    ]
    assert len(trained) == sum(weight.dim() == 2 for weight in module.exits.parameters())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
@torch.no_grad()
def test_a_block_gives_the_same_in_training_and_in_decoding(model_type):
    model = tiny_model(model_type, dtype=torch.float32)
    block = ExitBlock(EXIT)
    module = module_of(model, block)
    decoding = TransformersBackend(model, StoredDrafters((block,), module.weights().get))
    (states,), _ = module.states(IDS)
    placed = decoding.exit_blocks[EXIT]
    cache = decoding.new_cache(2)
    expected = module.backend.head(module.exits[str(EXIT)](states, IDS))
    for place in range(7):  # token by token, as drafts are made
        hidden = decoding.run_layers(
            states[:, place : place + 1],
            placed.layer,
            placed.layer + 1,
            cache.span(place, place + 1),
        )
        torch.testing.assert_close(
            placed.head(hidden), expected[:, place : place + 1], rtol=1e-4, atol=1e-3
        )
