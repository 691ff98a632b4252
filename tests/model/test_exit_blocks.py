"""Exit blocks in every backend, against transformers' own layers with the block's weights."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from conftest import at, run_texts, tiny_model
from decodings import WIDE, draft_of, native_or_skip
from exit_block_models import random_blocks
from test_native import threads  # noqa: F401  a fixture

from layerskip_core.config.model import PackingConfig
from layerskip_core.model import Submodel, TorchBackend, TransformersBackend
from layerskip_core.model.exit_blocks import ExitBlock

IDS = torch.randint(3, 67, (2, 11), generator=torch.Generator().manual_seed(4))
ORDER = torch.randperm(67, generator=torch.Generator().manual_seed(3)).tolist()
BLOCKS = (ExitBlock(2), ExitBlock(4))
MODELS = ["llama", "gemma2", "starcoder2", "phi3", "smollm3"]


DTYPES = {"native": torch.float32, "packed": torch.float64, "generic": torch.float64}


def backend_of(kind, model, packing, blocks):
    if kind == "generic":
        return TransformersBackend(model, blocks)
    return (native_or_skip if kind == "native" else TorchBackend.of)(
        model, packing, token_order=ORDER, stored_drafters=blocks
    )


def shortened(model, blocks, block):
    """A transformers model of the layers below the exit and the block's layer, with the block's
    norm.
    """
    short = deepcopy(model)
    layer = deepcopy(model.model.layers[-1])
    layer.load_state_dict(
        {name: blocks.take(f"{block.prefix}layer.{name}") for name in layer.state_dict()}
    )
    norm = short.model.norm
    norm.load_state_dict(
        {name: blocks.take(f"{block.prefix}norm.{name}") for name in norm.state_dict()}
    )
    short.model.layers = torch.nn.ModuleList([*short.model.layers[: block.exit_layer], layer])
    short.config.num_hidden_layers = block.exit_layer + 1
    if (kinds := getattr(model.config, "layer_types", None)) is not None:
        short.config.layer_types = [*kinds[: block.exit_layer], kinds[-1]]
    return short


def block_logits(backend, block, ids):
    states = run_texts(backend, backend.embed(ids), 0, block.block.exit_layer)
    return block.head(run_texts(backend, states, block.layer, block.layer + 1))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("architecture", MODELS)
def test_a_block_is_a_model_of_one_layer_more_than_its_exit(kind, architecture):
    model = tiny_model(architecture, DTYPES[kind], **WIDE)
    blocks = random_blocks(model, ExitBlock(2), ExitBlock(5))
    short = {block.exit_layer: shortened(model, blocks, block) for block in blocks.blocks}
    backend = backend_of(kind, model, None, blocks)
    with torch.inference_mode():
        known = {
            exit_layer: model(IDS, use_cache=False).logits for exit_layer, model in short.items()
        }
        assert list(backend.exit_blocks) == [2, 5] and backend.num_layers == 6
        for exit_layer, block in backend.exit_blocks.items():
            torch.testing.assert_close(
                block_logits(backend, block, IDS), known[exit_layer], rtol=1e-4, atol=1e-4
            )


PACKINGS = {
    "plain": {},
    "a trimmed head": {"draft_vocab": 40},
    "int8 copies": {"draft_weights": ("int8",), "draft_layers": 4},
    "int4 copies and a trimmed head": {"draft_weights": ("int4",), "draft_vocab": 40},
}


@pytest.mark.parametrize(
    "kind, packing", [("generic", "plain"), *product(("native", "packed"), PACKINGS)]
)
@pytest.mark.parametrize("exit_layer", [2, 4])
def test_a_greedy_draft_carries_the_block_s_own_states(kind, packing, exit_layer):
    """Against the same steps over the whole text for each token."""
    model = tiny_model("llama", DTYPES[kind], **WIDE)
    backend = backend_of(
        kind, model, PackingConfig(**PACKINGS[packing]), random_blocks(model, *BLOCKS)
    )
    side = list(backend.draft_sides.values())[-1]
    block = side.exit_blocks[exit_layer]
    ids = IDS[:1]
    last = IDS.shape[1] - 1
    most = 5
    with torch.inference_mode():
        cache = backend.new_cache()
        positions = torch.arange(last + most)[None]
        states = side.layers.run_layers(
            side.layers.embed(ids[:, :last]), 0, exit_layer, at(positions[:, :last], cache)
        )
        side.layers.run_layers(states, block.layer, block.layer + 1, at(positions[:, :last], cache))
        weights = list(backend.draft_sides)[-1]
        following = torch.arange(last, last + most + 1)[None]
        draft = draft_of(
            backend, weights, Submodel(exit_layer), ids, following, cache, survival=1e-30
        )
        probs = []
        for _ in range(most):
            states = run_texts(side.layers, side.layers.embed(ids), 0, exit_layer)
            hidden = run_texts(side.layers, states, block.layer, block.layer + 1)
            logits = block.head(hidden[:, -1:])
            probs.append(float(logits.softmax(-1).amax()))
            ids = torch.cat(
                [ids, side.head(Submodel(exit_layer, block=block)).choose(logits)], dim=1
            )
    assert draft.tokens.tolist() == ids[0, last:].tolist()
    assert draft.confidence == pytest.approx(probs, rel=1e-2 if kind == "packed" else 1e-4)
    assert not side.shares_states or len(draft.exit_states[exit_layer]) == most + 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_draft_in_one_call_keeps_the_states_at_lower_exits(number, threads):  # noqa: F811  a fixture
    threads(number)
    model = tiny_model("llama", torch.float32, **WIDE)
    backend = backend_of("native", model, None, random_blocks(model, *BLOCKS))
    last = IDS.shape[1] - 1
    with torch.inference_mode():
        cache = backend.new_cache()
        positions = torch.arange(last + 6)[None]
        backend.run_layers(backend.embed(IDS[:1, :last]), 0, 6, at(positions[:, :last], cache))
        draft = draft_of(
            backend, None, Submodel(4, taps=(1, 2)), IDS[:1], positions[:, last:], cache
        )
        ids = torch.cat([IDS[0, :last], draft.tokens])[None]
        for stop in (1, 2, 4):
            states = run_texts(backend, backend.embed(ids), 0, stop)
            assert torch.equal(draft.exit_states[stop], states[0, last:])


def test_copies_have_the_blocks_of_the_exits_that_they_reach():
    model = tiny_model("llama", torch.float64, **WIDE)
    packing = PackingConfig(draft_weights=("int8",), draft_layers=3)
    backend = backend_of("packed", model, packing, random_blocks(model, *BLOCKS))
    side = backend.draft_sides["int8"]
    assert side.num_layers == 3 and list(side.exit_blocks) == [2]
    assert list(backend.draft_sides[None].exit_blocks) == [2, 4]
    hidden = side.layers.embed(IDS)
    for start in (3, 7):
        with pytest.raises(AssertionError):
            run_texts(side.layers, hidden, start, start + 1)
    run_texts(side.layers, hidden, 6, 7)
