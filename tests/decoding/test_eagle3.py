"""Drafts in the EAGLE-3 layout: the output is the target's own, and drafts are those of the training's forward."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import tiny_model
from decodings import WIDE, ids_of, native_or_skip, prompt_of

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode, decode_batch
from layerskip_core.errors import ConfigError
from layerskip_core.model import TorchBackend, TransformersBackend
from layerskip_core.model.eagle3 import Eagle3, Eagle3Form, Eagle3Weights
from layerskip_core.model.exit_blocks import ExitBlocks
from layerskip_core.training.eagle3 import unrolled

SHAPE = {**WIDE, "max_position_embeddings": 256}
DRAFTS = 4
EAGLE3 = DecodingConfig("eagle3", num_draft_tokens=DRAFTS, max_new_tokens=24)


def model_of(kind):
    return tiny_model("llama", torch.float32 if kind == "native" else torch.float64, **SHAPE)


@cache
def drafter():
    """With random weights and a head that scores every second token."""
    torch.manual_seed(0)
    model = model_of("native")
    config = model.config
    tokens = torch.arange(1, config.vocab_size, 2)
    form = Eagle3Form(
        (1, 3, 5), config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim, 64, len(tokens),
        1e-5, {"rope_theta": 10_000.0},
    )  # fmt: skip
    drafter = Eagle3(form, tokens)
    with torch.no_grad():
        for name in form.shapes:
            drafter.weight(name).add_(0.1 * torch.randn_like(drafter.weight(name)))
    return drafter


def stored():
    weights = {name: drafter().weight(name).detach() for name in drafter().form.shapes}
    return ExitBlocks((), lambda name: None, Eagle3Weights(drafter().form, drafter().tokens, weights))


@cache
def backend_of(kind, quantize=None):
    packing = PackingConfig(quantize=quantize)
    if kind == "generic":
        return TransformersBackend(model_of(kind), stored())
    if kind == "packed":
        return TorchBackend.of(model_of(kind), packing, exit_blocks=stored())
    return native_or_skip(model_of(kind), packing, exit_blocks=stored())


@pytest.mark.parametrize(("kind", "quantize"), [("native", None), ("native", "int8"), ("packed", None), ("generic", None)])
def test_the_output_is_the_target_s(kind, quantize):
    backend = backend_of(kind, quantize)
    for length in (1, 9):
        prompt = prompt_of(length)
        decoding = decode(backend, prompt, EAGLE3)
        assert ids_of(decoding) == ids_of(decode(backend, prompt, DecodingConfig("autoregressive", max_new_tokens=24)))
        assert decoding.stats.drafted > 0


@pytest.mark.parametrize("kind", ["native", "packed", "generic"])
@pytest.mark.parametrize("strategy", ["eagle3", "adaptive"])
def test_rows_of_a_batch_too(kind, strategy):
    backend, prompts = backend_of(kind), [prompt_of(length) for length in (1, 14, 5)]
    config = DecodingConfig(strategy, num_draft_tokens=DRAFTS, max_new_tokens=24)
    found = sorted(decode_batch(backend, prompts, config), key=lambda answer: answer.row)
    plain = DecodingConfig("autoregressive", max_new_tokens=24)
    assert [answer.ids for answer in found] == [ids_of(decode(backend, prompt, plain)) for prompt in prompts]
    if strategy == "eagle3":
        alone = [decode(backend, prompt, EAGLE3) for prompt in prompts]
        assert [ids_of(decoding) for decoding in alone] == [answer.ids for answer in found]
        assert [answer.stats.accepted for answer in found] == [decoding.stats.accepted for decoding in alone]


@pytest.mark.parametrize("kind", ["native", "packed", "generic"])
def test_drafts_are_those_of_training(kind):
    """Round by round, at each position of the draft: the features that the loss saw are those that drafts read."""
    backend, model, prompt, rounds = backend_of(kind), model_of(kind), prompt_of(9), []
    layer, form, tokens = drafter().layer, drafter().form, drafter().tokens
    loop = decode(backend, prompt, EAGLE3)
    draft = loop._drafter.draft

    def recorded(context, limits):
        found = draft(context, limits)
        rounds.append((len(context.ids[0]), found.tokens[0, 1:].tolist()))
        return found

    loop._drafter.draft = recorded
    ids = [*prompt, *ids_of(loop)]
    assert len(rounds) > 3
    for known, drafts in rounds:
        text = torch.tensor([[*ids[:known], *drafts]])
        with torch.no_grad():
            states = model(text, output_hidden_states=True).hidden_states
            feature = layer.feature([states[tap][:, :-1].float() for tap in form.layers])
            outputs = unrolled(layer, states[0][:, 1:].float(), feature, len(drafts))
        for number, (token, output) in enumerate(zip(drafts, outputs, strict=False)):
            assert int(tokens[layer.logits(output[0, known - 2 + number]).argmax()]) == token


def test_penalties_and_seeds_keep_the_output():
    """Logits are processed over all tokens, of which the head scores some."""
    backend, prompt = backend_of("native"), prompt_of(9)
    penalised = replace(EAGLE3, frequency_penalty=0.8, repetition_penalty=1.3)
    assert ids_of(decode(backend, prompt, penalised)) == ids_of(
        decode(backend, prompt, replace(penalised, strategy="autoregressive"))
    )
    sampled = replace(EAGLE3, temperature=0.9, seed=3)
    first = ids_of(decode(backend, prompt, sampled))
    assert first == ids_of(decode(backend, prompt, sampled)) != ids_of(decode(backend, prompt, replace(sampled, seed=4)))


def test_without_a_drafter_it_is_refused():
    with pytest.raises(ConfigError, match="layout eagle3"):
        decode(native_or_skip(tiny_model("llama", torch.float32, **SHAPE), PackingConfig()), prompt_of(4), EAGLE3)
