"""The draft side of every backend, against the same layers and head without a cache."""

from functools import cache
from math import prod

import pytest
import torch
from conftest import at, run_texts, tiny_model
from decodings import draft_of, native_or_skip

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding.row import Row
from layerskip_core.decoding.sampling import ChoiceRun, choose
from layerskip_core.model import Submodel, TorchBackend, TransformersBackend

STOPS = (1, 3)
EXIT = 3
MOST = 5
SUBMODEL = Submodel(EXIT, taps=STOPS[:-1])
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
ORDER = torch.randperm(67, generator=torch.Generator().manual_seed(3)).tolist()
PACKINGS = {
    "plain": {},
    "its own head": {"draft_vocab": 40},
    "its own layers": {"draft_weights": ("int8",), "draft_layers": 4},
    "its own layers and head": {"draft_weights": ("int4",), "draft_vocab": 40},
}
PROMPT = torch.randint(3, 67, (1, 9), generator=torch.Generator().manual_seed(9))


@cache
def backend_of(kind, packing=None):
    packing = PackingConfig(**PACKINGS.get(packing, {}))
    if kind == "packed":
        return TorchBackend.of(tiny_model("llama", torch.float64, **WIDE), packing, ORDER)
    if kind.endswith("native"):  # that of gemma2 with capped logits
        return native_or_skip(
            tiny_model(kind.split()[0], torch.float32, **WIDE), packing, token_order=ORDER
        )
    return TransformersBackend(tiny_model(kind))


def side_of(backend):
    return list(backend.draft_sides.values())[-1]


def drafted(backend, **settings):
    """A draft after a prompt; all of the prompt but its last token is cached."""
    side = side_of(backend)
    cache = backend.new_cache()
    last = PROMPT.shape[1] - 1
    positions = torch.arange(last + MOST + 1)[None]
    weights = list(backend.draft_sides)[-1]
    with torch.inference_mode():
        for layers in (backend, side.layers):  # a draft side with its own weights has its own keys
            layers.run_layers(
                layers.embed(PROMPT[:, :last]), 0, side.num_layers, at(positions[:, :last], cache)
            )
    return draft_of(backend, weights, SUBMODEL, PROMPT, positions[:, last:], cache, **settings)


@cache
def expected(backend):
    """The same by the whole sequence for each token, without a cache: MOST + 1 tokens, and their
    states by stop.
    """
    side = side_of(backend)
    ids = PROMPT
    with torch.inference_mode():
        while True:
            states = {
                stop: run_texts(side.layers, side.layers.embed(ids), 0, stop) for stop in STOPS
            }
            if ids.shape[1] == PROMPT.shape[1] + MOST:
                new = slice(PROMPT.shape[1] - 1, None)
                return ids[0, new].tolist(), {
                    stop: reached[:, new] for stop, reached in states.items()
                }
            ids = torch.cat(
                [ids, side.at_exits.choose(side.at_exits.unembed(states[EXIT][:, -1:]))], dim=1
            )


CASES = [
    ("llama", None),
    ("gemma2", None),
    *(("packed", name) for name in PACKINGS),
    *(("llama native", name) for name in PACKINGS),
]


@pytest.mark.parametrize("kind, packing", CASES)
def test_a_greedy_draft_is_the_most_probable_continuation(kind, packing):
    backend = backend_of(kind, packing)
    draft = drafted(backend)
    known_tokens, known_states = expected(backend)
    assert draft.tokens.tolist() == known_tokens and draft.counts == (MOST,)
    assert tuple(draft.exit_states) == (STOPS if side_of(backend).shares_states else ())
    for stop, reached in draft.exit_states.items():
        assert len(reached) == MOST + 1
        error = (reached - known_states[stop][0]).abs().max() / known_states[stop].std()
        # torch's low-bit kernels round differently by row count
        assert error < {"packed": 1e-2, "llama native": 1e-4}.get(kind, 1e-10)


@pytest.mark.parametrize("kind, packing", CASES)
def test_a_draft_ends_after_an_end_token(kind, packing):
    backend = backend_of(kind, packing)
    known, _ = expected(backend)
    end = next(place for place in range(2, MOST + 1) if known[place] not in known[1:place])
    other = next(token for token in range(67) if token not in known)
    draft = drafted(backend, eos_ids=frozenset({other, known[end]}))
    assert draft.tokens.tolist() == known[: end + 1]
    assert all(len(states) == end + 1 for states in draft.exit_states.values())


@pytest.mark.parametrize("kind, packing", [*CASES, ("gemma2 native", None)])
def test_a_draft_ends_where_its_probabilities_are_low(kind, packing):
    """After a token that brings their product below `survival`."""
    backend = backend_of(kind, packing)
    known, states = expected(backend)
    with torch.inference_mode():
        logits = side_of(backend).at_exits.unembed(
            states[EXIT][0, :MOST].to(backend.embed(PROMPT).dtype)
        )
    probs = logits.double().softmax(-1).amax(-1).tolist()
    rough = 1e-2 if kind == "packed" else 1e-5
    full = drafted(backend, survival=1e-30)
    assert full.tokens.tolist() == known and full.confidence == pytest.approx(probs, rel=rough)
    survival = [prod(probs[: place + 1]) for place in range(MOST)]
    for place in (0, 2):
        surviving = drafted(backend, survival=survival[place] * (1 + 10 * rough))
        assert (
            surviving.tokens.tolist() == known[: place + 2]
            and len(surviving.confidence) == place + 1
        )


def test_sampled_drafts_are_chosen_by_the_noise_of_their_positions():
    backend = backend_of("llama")
    sampling = {"temperature": 2.0, "top_k": 7}
    draft = drafted(backend, **sampling)
    ids = torch.cat([PROMPT[0, :-1], draft.tokens[:-1]])[None]
    row = Row(PROMPT[0].tolist(), DecodingConfig(**sampling))
    with torch.no_grad():
        states = run_texts(backend, backend.embed(ids), 0, EXIT)
        chosen, _ = choose(backend.unembed(states[0, -MOST:]), [ChoiceRun(row, MOST)])
    assert draft.tokens[1:].tolist() == chosen.tolist()
