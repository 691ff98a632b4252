"""Drafts by the first layers: tokens, states and probabilities, against passes over the whole text."""

import pytest
import torch
from torch import tensor

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding.drafters import Context, DrafterSetup
from layerskip_core.decoding.drafters.exit import ExitDrafter
from layerskip_core.decoding.sampling import Sampler
from layerskip_core.model import Submodel, TransformersBackend

EXIT = 3


@pytest.fixture(scope="module")
def backend(llama):
    return TransformersBackend(llama)


def exit_states_and_logits(backend, ids):
    """The exit's states (T, D) and logits (T, V) over the whole sequence at once, without a cache."""
    states = backend.run_layers(backend.embed(tensor([ids])), 0, EXIT, torch.arange(len(ids))[None])
    return states[0], backend.unembed(states)[0]


def draft_after(backend, prompt, limit, reuse=True, eos_ids=frozenset(), **settings):
    """The draft of a drafter for which all of the prompt but the last token is cached."""
    config = DecodingConfig(**settings)
    drafter = ExitDrafter(DrafterSetup(backend, Sampler(config, backend.device), config, eos_ids, reuse), None, Submodel(EXIT))
    cache, last = backend.new_cache(), len(prompt) - 1
    with torch.inference_mode():
        backend.run_layers(backend.embed(tensor([prompt[:last]])), 0, backend.num_layers, torch.arange(last)[None], cache)
        positions = torch.arange(last, last + limit + 1)[None]
        return drafter.draft(Context([0], [prompt], tensor([prompt[last:]]), positions, cache), [limit])


PROMPT = [5, 11, 23, 42, 8]


def greedy_exit_continuation(backend, count):
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(exit_states_and_logits(backend, ids)[1][-1].argmax()))
    return ids[len(PROMPT) :]


def test_drafts_are_the_exit_s_own_tokens_and_states(backend):
    expected = greedy_exit_continuation(backend, 4)
    draft = draft_after(backend, PROMPT, limit=4)
    assert draft.tokens.tolist() == [[PROMPT[-1], *expected]]
    assert (draft.counts, list(draft.exit_states), draft.probs) == ((4,), [EXIT], None)
    with torch.no_grad():
        states, _ = exit_states_and_logits(backend, PROMPT + expected[:3])
    torch.testing.assert_close(draft.exit_states[EXIT][0], states[-4:])  # of all tokens but the last draft
    assert draft_after(backend, PROMPT, limit=4, reuse=False).exit_states == {}


def test_an_eos_ends_the_draft(backend):
    expected = greedy_exit_continuation(backend, 4)
    end = expected.index(expected[1]) + 1
    draft = draft_after(backend, PROMPT, limit=4, eos_ids=frozenset({66, expected[1]}))
    assert draft.tokens.tolist() == [[PROMPT[-1], *expected[:end]]]
    assert (draft.exit_states[EXIT].shape[1], draft.counts) == (end, (end,))


def test_low_confidence_ends_the_draft_before_the_token(backend):
    """The exit's state is there already then, also for the last token."""
    expected = greedy_exit_continuation(backend, 4)
    with torch.no_grad():
        states, logits = exit_states_and_logits(backend, PROMPT + expected[:3])
    top = logits.softmax(-1).amax(-1)[-4:].tolist()
    sure = next(place for place in range(4) if top[place] == min(top))
    draft = draft_after(backend, PROMPT, limit=4, draft_confidence=min(top) + 1e-6)
    assert draft.tokens.tolist() == [[PROMPT[-1], *expected[:sure]]]
    torch.testing.assert_close(draft.exit_states[EXIT][0], states[len(PROMPT) - 1 : len(PROMPT) + sure])
    assert draft_after(backend, PROMPT, limit=4, draft_confidence=min(top) - 1e-6).counts == (4,)


def test_sampled_confidence_is_that_of_the_draft_probs(backend):
    """With top_k 1 every draft is certain, whatever the logits."""
    draft = draft_after(backend, PROMPT, 4, temperature=1, top_k=1, draft_confidence=0.99)
    assert draft.tokens.tolist() == [[PROMPT[-1], *greedy_exit_continuation(backend, 4)]]


def test_draft_probs_are_what_each_draft_was_drawn_from(backend):
    config = DecodingConfig(temperature=2, top_k=7)
    draft = draft_after(backend, PROMPT, 4, temperature=2, top_k=7)
    drafted = draft.tokens[0, 1:].tolist()
    with torch.no_grad():
        _, logits = exit_states_and_logits(backend, PROMPT + drafted[:3])
    expected = Sampler(config, backend.device).probs(logits[-4:])
    torch.testing.assert_close(draft.probs[0], expected)
    assert all(expected[place, token] > 0 for place, token in enumerate(drafted))
