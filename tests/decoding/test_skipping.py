"""Drafts that leave out layers: Draft & Verify."""

from functools import cache

import pytest
import torch
from conftest import at, tiny_model
from decodings import WIDE, context_after, entries, ids_of, native_or_skip, plainly, silent_layers

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode
from layerskip_core.decoding.drafters import DrafterSetup, drafter_for
from layerskip_core.decoding.drafters.submodel import kept_layers
from layerskip_core.decoding.target import FixedTarget
from layerskip_core.errors import ConfigError
from layerskip_core.model import TorchBackend, TransformersBackend
from layerskip_core.model.position_cache import PositionCache
from layerskip_core.model.row_cache import EntryWriter

LAYERS = 6
MOST = 5
PROMPT = [5, 11, 23, 42, 8]
KINDS = ("generic", "packed", "packed windows", "native", "native int8 drafts")
SKIPS = [(1,), (6,), (2, 5), (3, 4, 6), (2, 3, 4, 5, 6)]


@cache
def model_of(kind):
    """In fp64, or fp32 where kernels have no more: those are batch-invariant."""
    if kind == "generic":
        return TransformersBackend(tiny_model())
    if kind.startswith("packed"):
        return TorchBackend.of(
            tiny_model("mistral", sliding_window=4 if "windows" in kind else None)
        )
    model = tiny_model(dtype=torch.float32, **WIDE)
    return native_or_skip(model, PackingConfig(draft_weights=("int8",)) if "int8" in kind else None)


def config_of(kind, skip, drafts=4, **changes):
    weights = {"draft_weights": "int8"} if "int8" in kind else {}
    return DecodingConfig("draft-and-verify", None, drafts, skip=skip, **weights, **changes)


@pytest.mark.parametrize(
    "skip, exit_layer, beyond",
    [
        ((3,), 2, ((3, 6),)),
        ((1,), 0, ((1, 6),)),
        ((6,), 5, ()),
        ((4, 5, 6), 3, ()),
        ((5, 2, 2), 1, ((2, 4), (5, 6))),
        ((1, 3, 5), 0, ((1, 2), (3, 4), (5, 6))),
    ],
)
def test_the_layers_that_are_left(skip, exit_layer, beyond):
    assert kept_layers(skip, LAYERS) == (exit_layer, beyond)


def draft_of(model, config, reuse=True):
    """A draft after PROMPT, all of which but its last token is cached, and the cache."""
    context = context_after(model, PROMPT, config=config)
    with torch.inference_mode():
        drafter = drafter_for(DrafterSetup(model, config, reuse))
        return drafter.draft(context, [MOST]), context.cache


@cache
def pruned_drafts(skip):
    """The greedy drafts of a model that lacks the layers, on the keys and values that the whole
    model wrote for the prompt.
    """
    whole = TransformersBackend(tiny_model())
    pruned = tiny_model()
    kept = [index for index in range(LAYERS) if index + 1 not in skip]
    pruned.model.layers = torch.nn.ModuleList(pruned.model.layers[index] for index in kept)
    pruned.config.num_hidden_layers = len(kept)
    pruned.config.layer_types = None
    for place, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = place
    backend = TransformersBackend(pruned)
    last = len(PROMPT) - 1
    full = whole.new_cache()
    cache = backend.new_cache()
    ids = list(PROMPT)
    logits = []
    before = torch.arange(last)[None]
    with torch.inference_mode():
        prompt = whole.embed(torch.tensor([PROMPT[:last]]))
        whole.run_layers(prompt, 0, LAYERS, at(before, full))
        held = entries(full)[:, :, None]
        for place, index in enumerate(kept):
            PositionCache(EntryWriter(cache, before)).update(*held[index, ..., :last, :], place)
        for place in range(last, last + MOST):
            hidden = backend.embed(torch.tensor([ids[place:]]))
            hidden = backend.run_layers(hidden, 0, len(kept), at(torch.tensor([[place]]), cache))
            logits.append(backend.unembed(hidden)[0, 0])
            ids.append(int(logits[-1].argmax()))
    return ids[last:], torch.stack(logits)


@pytest.mark.parametrize("kind", ["generic", "packed"])
@pytest.mark.parametrize("skip", SKIPS)
def test_drafts_are_those_of_a_pruned_model_on_the_same_cache(kind, skip):
    model = (
        TransformersBackend(tiny_model()) if kind == "generic" else TorchBackend.of(tiny_model())
    )
    tokens, _ = pruned_drafts(skip)
    draft, _ = draft_of(model, config_of(kind, skip))
    assert draft.tokens.tolist() == tokens
    assert (draft.counts, draft.source) == ((MOST,), f"{LAYERS - len(skip)} of 6 layers")
    # Step by step, and the same tokens
    sampled, _ = draft_of(model, config_of(kind, skip, temperature=1, top_k=1))
    assert sampled.tokens.tolist() == tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", SKIPS)
def test_the_target_goes_on_from_the_states_before_the_first_skipped_layer(kind, skip):
    """Recomputing them gives the same logits, and the same keys and values for the tokens that
    follow.
    """
    model = model_of(kind)
    found = []
    for reuse in (True, False):
        draft, cache = draft_of(model, config_of(kind, skip), reuse=reuse)
        last = len(PROMPT) - 1
        with torch.inference_mode():
            target = FixedTarget(model, DecodingConfig("autoregressive", logprobs=0))
            places = cache.span(last, last + MOST + 1)
            logits = target.run_drafts(draft.tokens, draft.exit_states, places).logits
            # The next token sees all that was written.
            newest = torch.tensor([[7]])
            hidden = model.run_layers(
                model.embed(newest), 0, LAYERS, at(torch.tensor([[last + MOST + 1]]), cache)
            )
        found.append((draft, logits, model.unembed(hidden)))
    (reused, *numbers), (recomputed, *others) = found
    shares = "int8" not in kind
    assert recomputed.exit_states == {} and list(reused.exit_states) == (
        [skip[0] - 1] if shares else []
    )
    for ours, expected in zip(numbers, others, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=0, atol=1e-9 if numbers[0].dtype == torch.float64 else 0
        )


def test_drafts_without_layers_that_add_nothing_are_always_accepted():
    decoding = decode(
        silent_layers(2, 5), PROMPT, config_of("generic", (2, 5), drafts=3, max_new_tokens=17)
    )
    assert len(ids_of(decoding)) == 17
    assert (decoding.stats.drafted, decoding.stats.accepted, decoding.stats.rounds) == (12, 12, 4)


def test_a_copy_of_the_first_layers_is_not_enough():
    packing = PackingConfig(draft_weights=("int8",), draft_layers=4)
    model = TorchBackend.of(tiny_model(dtype=torch.float32, **WIDE), packing)
    with pytest.raises(
        ConfigError, match="`skip` must be a list with all layers after the 4 layers"
    ):
        decode(model, PROMPT, config_of("int8", (2,)))
    assert ids_of(decode(model, PROMPT, config_of("int8", (2, 5, 6), max_new_tokens=5))) == plainly(
        model, PROMPT, 5
    )
