"""A copy that verifies guesses drafts what it drafts token by token, in fewer passes."""

from dataclasses import replace

import pytest
import torch
from decodings import context_of, prompt_of
from test_eagle3 import backend_of

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding.drafters import DrafterSetup, stepwise
from layerskip_core.decoding.drafters.submodel import SubmodelDrafter
from layerskip_core.model import DraftEnds, Submodel
from layerskip_core.model.cache import Places


def drafted(backend, texts, config, limits, ends, steps):
    """The drafts of rows by the cascade, or in single steps, and how many passes they took."""
    setup = DrafterSetup(backend, config, reuse_exit_states=False)
    passes = []
    drafter = SubmodelDrafter(setup, None, Submodel(6))
    cache = backend.new_cache(len(texts), 64)
    filled = [len(ids) - 1 for ids in texts]
    part = drafter._part
    if steps:
        part = replace(part, guesses=None)
    layers = part.side.layers
    newest = torch.tensor([ids[-1] for ids in texts])
    context = context_of(texts, newest, cache, range(len(texts)), filled, config, {9})
    run = layers.run_layers
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        told = torch.tensor([token for ids in texts for token in ids[:-1]])
        run(layers.embed(told), 0, 6, Places(cache, [0] * len(texts), filled))
        patch.setattr(
            layers,
            "run_layers",
            lambda *given: passes.append(given[1] == 0 < given[2]) or run(*given),
        )
        made = stepwise.StepwiseDraft(part, context, limits, ends).make()
    return made, sum(passes)


@pytest.mark.parametrize("kind", ["generic", "native"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("ends", [DraftEnds(), DraftEnds(survival=0.05)])
def test_the_drafts_are_those_of_single_steps(kind, temperature, ends, monkeypatch):
    """With guesses that are right, with some that are not, and where nothing is found: of rows of
    other lengths and limits.
    """
    monkeypatch.setattr(stepwise, "_GUESSES", 16)
    backend = backend_of(kind)
    config = DecodingConfig("self-speculative", 3, 8, temperature=temperature, seed=5)
    texts = [prompt_of(12, vocabulary=12), prompt_of(30, vocabulary=8), [*range(3, 20)]]
    limits = [8, 6, 7]
    made, expected = (
        drafted(backend, texts, config, limits, ends, steps)[0] for steps in (False, True)
    )
    assert made.counts == expected.counts and torch.equal(made.tokens, expected.tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_right_guesses_save_passes(temperature, monkeypatch):
    backend = backend_of("generic")
    config = DecodingConfig("self-speculative", 3, 8, temperature=temperature, seed=5)
    text = prompt_of(12)
    drafts, steps = drafted(backend, [text], config, [8], DraftEnds(), True)
    answer = drafts.tokens.tolist()[1:]
    monkeypatch.setattr(
        stepwise.RowLookup, "guessed", lambda self, row, most, own: answer[len(own) :][:most]
    )
    made, passes = drafted(backend, [text], config, [8], DraftEnds(), False)
    assert made.tokens.tolist() == drafts.tokens.tolist() and (steps, passes) == (8, 2)
