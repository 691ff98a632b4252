"""Drafts in the EAGLE-3 layout: the output is the target's own, and drafts are those of the
training's forward.
"""

import warnings
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from decodings import (
    WIDE,
    UnroundedDrafter,
    backend_on,
    draft_of,
    ids_of,
    native_or_skip,
    prompt_of,
    rounds_of,
)

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode, decode_batch
from layerskip_core.errors import ConfigError
from layerskip_core.model import Submodel
from layerskip_core.model.eagle3 import Eagle3, Eagle3Form, Eagle3Weights
from layerskip_core.model.exit_blocks import StoredDrafters
from layerskip_core.model.native import compiled
from layerskip_core.model.native.drafters import NativeEagle3
from layerskip_core.model.row_cache import RowCache
from layerskip_core.model.torch_eagle3 import PlacedEagle3
from layerskip_core.training.eagle3 import unrolled

SHAPE = {**WIDE, "max_position_embeddings": 256}
DRAFTS = 4
EAGLE3 = DecodingConfig("eagle3", num_draft_tokens=DRAFTS, max_new_tokens=24)


def model_of(kind):
    return tiny_model("llama", torch.float32 if kind == "native" else torch.float64, **SHAPE)


@cache
def drafter(**norms):
    """With random weights and a head that scores every second token."""
    torch.manual_seed(0)
    model = model_of("native")
    config = model.config
    tokens = torch.arange(1, config.vocab_size, 2)
    form = Eagle3Form(
        (1, 3, 5), config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim, 64, len(tokens),
        1e-5, {"rope_theta": 10_000.0}, **norms,
    )  # fmt: skip
    drafter = Eagle3(form, tokens)
    with torch.no_grad():
        for name in form.shapes:
            drafter.weight(name).add_(0.1 * torch.randn_like(drafter.weight(name)))
    return drafter


def stored(**norms):
    made = drafter(**norms)
    weights = {name: made.weight(name).detach() for name in made.form.shapes}
    return StoredDrafters((), lambda name: None, Eagle3Weights(made.form, made.tokens, weights))


@cache
def backend_of(kind, quantize=None, **norms):
    return backend_on(
        kind, UnroundedDrafter(quantize), blocks_of=lambda model: stored(**norms), **SHAPE
    )


@pytest.mark.parametrize(
    "kind, quantize", [("native", None), ("native", "int8"), ("packed", None), ("generic", None)]
)
def test_the_output_is_the_target_s(kind, quantize):
    backend = backend_of(kind, quantize)
    for length in (1, 9):
        prompt = prompt_of(length)
        decoding = decode(backend, prompt, EAGLE3)
        assert ids_of(decoding) == ids_of(
            decode(backend, prompt, DecodingConfig("autoregressive", max_new_tokens=24))
        )
        assert decoding.stats.drafted > 0


@pytest.mark.parametrize("kind", ["native", "packed", "generic"])
@pytest.mark.parametrize("strategy", ["eagle3", "adaptive"])
def test_rows_of_a_batch_too(kind, strategy):
    backend = backend_of(kind)
    prompts = [prompt_of(length) for length in (1, 14, 5)]
    config = DecodingConfig(strategy, num_draft_tokens=DRAFTS, max_new_tokens=24)
    found = decode_batch(backend, prompts, config)
    plain = DecodingConfig("autoregressive", max_new_tokens=24)
    assert [answer.ids for answer in found] == [
        ids_of(decode(backend, prompt, plain)) for prompt in prompts
    ]
    if strategy == "eagle3":
        alone = [decode(backend, prompt, EAGLE3) for prompt in prompts]
        assert [ids_of(decoding) for decoding in alone] == [answer.ids for answer in found]
        assert [answer.stats.accepted for answer in found] == [
            decoding.stats.accepted for decoding in alone
        ]


@pytest.mark.parametrize(
    "norms", [{}, {"fc_norm": True, "norm_before_fc": True, "norm_output": True}]
)
@pytest.mark.parametrize("kind", ["native", "packed", "generic"])
def test_drafts_are_those_of_training(kind, norms):
    """Round by round, at each position of the draft: the features that the loss saw are those that
    drafts read.
    """
    backend = backend_of(kind, **norms)
    model = model_of(kind)
    prompt = prompt_of(9)
    layer = (made := drafter(**norms)).layer
    form = made.form
    tokens = made.tokens
    _, rounds = rounds_of(backend, prompt, EAGLE3)
    assert len(rounds) > 3
    for ids, drafts in rounds:
        known = len(ids)
        text = torch.tensor([[*ids, *drafts]])
        with torch.no_grad():
            states = model(text, output_hidden_states=True).hidden_states
            feature = layer.feature([states[tap][:, :-1].float() for tap in form.layers])
            outputs = unrolled(layer, states[0][:, 1:].float(), feature, len(drafts))
        for number, (token, output) in enumerate(zip(drafts, outputs, strict=False)):
            assert int(tokens[layer.logits(output[0, known - 2 + number]).argmax()]) == token


class OnKernels:
    """A drafter of random weights on a variant's kernels, with its entries of two rows of 9 tokens,
    and the same on torch.
    """

    FORMS = {  # noqa: RUF012
        "as the target": {},
        "imported": {
            "heads": 6,
            "inner": 51,
            "eps": 1e-3,
            "norm_before_residual": True,
            "norm_output": True,
            "rope": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
    }
    PRECISIONS = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.05}  # noqa: RUF012

    def __init__(self, variant, form, precision):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        form = replace(drafter().form, **self.FORMS[form])
        weights = {
            name: (3 * torch.randn(shape) / shape[-1] ** 0.5).to(dtype)
            for name, shape in form.shapes.items()
        }
        stored = Eagle3Weights(form, drafter().tokens, weights)
        packing = PackingConfig() if precision == "int8" else UnroundedDrafter()
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(compiled.SWITCH, variant)
            model = tiny_model("llama", dtype, **SHAPE)
            self.backend = native_or_skip(
                model, packing, stored_drafters=StoredDrafters((), lambda name: None, stored)
            )
        self.like = torch.zeros(0, dtype=torch.float64)
        vocab = self.backend.spec.vocab
        self.shape = 7, form.kv_heads, form.head_dim
        self.torch = PlacedEagle3(
            stored, 6, vocab, self.like, lambda matrix: partial(F.linear, weight=matrix.double())
        )
        self.states = torch.randn(2, 9, form.hidden)
        self.before = torch.randn(2, 9, form.hidden)

    def run(self, drafter, dtype, first=0, cache=None, rows=slice(None)):
        """The head's logits of the entries from the `first` on."""
        states, before = (part[rows, first:].to(dtype) for part in (self.states, self.before))
        count = len(states)
        of_torch = RowCache(self.shape, count, 16, self.like)
        cache = cache or (of_torch if drafter is self.torch else self.backend.new_cache(count))
        states, before = (part.flatten(0, 1) for part in (states, before))
        return drafter.head(drafter.run(None, states, before, cache.span(1 + first, 10))).view(
            count, 9 - first, -1
        )


@pytest.fixture(params=[name for name in compiled.VARIANTS if compiled.kernels(name) is not None])
def variant(request):
    return request.param


@pytest.mark.parametrize("precision", OnKernels.PRECISIONS)
@pytest.mark.parametrize("form", OnKernels.FORMS)
def test_the_kernels_compute_what_torch_does(variant, form, precision):
    """Entries of several tokens and rows have the bits that each has alone, whether earlier ones
    were written or run.
    """
    of = OnKernels(variant, form, precision)
    ours = of.run(of.backend.drafters["eagle3"], torch.float32)
    right = of.run(of.torch, torch.float64)
    assert float((ours - right).norm() / right.norm()) < OnKernels.PRECISIONS[precision]
    for row in (0, 1):
        cache = of.backend.new_cache(1)
        rows = slice(row, row + 1)
        of.backend.drafters["eagle3"].write(
            None, {0: of.states[row, :8]}, of.before[row, :8], cache.span(1, 9)
        )
        assert torch.equal(
            of.run(of.backend.drafters["eagle3"], torch.float32, 8, cache, rows), ours[rows, 8:]
        )


@pytest.mark.parametrize("precision", OnKernels.PRECISIONS)
@pytest.mark.parametrize("form", OnKernels.FORMS)
def test_drafts_in_one_call_are_those_of_single_calls(variant, form, precision, monkeypatch):
    """Up to their largest number, an end token, a token that is too uncertain, and drafts that
    probably fail.
    """
    of = OnKernels(variant, form, precision)
    ids = torch.tensor([prompt_of(10)])
    block = of.backend.drafters["eagle3"]
    cache = of.backend.new_cache()
    positions = torch.arange(9, 18)[None]
    block.write(None, {0: of.states[0]}, of.before[0], cache.span(1, 10))

    def drafted(**ends):
        return draft_of(
            of.backend,
            None,
            Submodel(0, block=block),
            ids,
            positions,
            cache,
            of.before[:1, :1],
            **ends,
        )

    whole = drafted(survival=1e-9)
    ends = [
        {},
        {"survival": 1e-9},
        {"eos_ids": {int(whole.tokens[3])}},
        {"survival": 0.9 * whole.confidence[0] * whole.confidence[1]},
    ]
    found = [drafted(**end) for end in ends]
    monkeypatch.setattr(NativeEagle3, "kernel", None)
    for ours, end in zip(found, ends, strict=True):
        right = drafted(**end)
        assert torch.equal(ours.tokens, right.tokens) and ours.counts == right.counts
        assert list(ours.confidence) == pytest.approx(list(right.confidence), rel=1e-4)
    assert found[0].counts == (8,) and 0 < found[2].counts[0] <= 3 and found[3].counts[0] < 8
    assert len(set(whole.tokens.tolist())) > 2


@pytest.mark.parametrize(
    "packing, kinds",
    [
        ({}, ("int8", "int8")),
        ({"draft_weights": ("int4",)}, ("int4", "int8")),
        ({"draft_weights": ("int8",), "draft_head": "int4"}, ("int8", "int4")),
        ({"quantize": "int4"}, ("int4", "int8")),
    ],
)
def test_its_precision_is_that_of_what_else_drafts(packing, kinds):
    block = native_or_skip(
        model_of("native"), PackingConfig(**packing), stored_drafters=stored()
    ).drafters["eagle3"]
    assert (block._fc.matrix.form.kind, block.head.matrix.form.kind) == kinds
    assert {matrix.form.kind for matrix in block._layers.layers[-1].matrices} == {kinds[0]}


def test_penalties_and_seeds_keep_the_output():
    """Logits are processed over all tokens, of which the head scores some."""
    backend = backend_of("native")
    prompt = prompt_of(9)
    penalised = replace(EAGLE3, frequency_penalty=0.8, repetition_penalty=1.3)
    assert ids_of(decode(backend, prompt, penalised)) == ids_of(
        decode(backend, prompt, replace(penalised, strategy="autoregressive"))
    )
    sampled = replace(EAGLE3, temperature=0.9, seed=3)
    first = ids_of(decode(backend, prompt, sampled))
    assert (
        first
        == ids_of(decode(backend, prompt, sampled))
        != ids_of(decode(backend, prompt, replace(sampled, seed=4)))
    )


def test_without_a_drafter_it_is_refused():
    with pytest.raises(ConfigError, match="layout eagle3"):
        decode(
            native_or_skip(tiny_model("llama", torch.float32, **SHAPE), PackingConfig()),
            prompt_of(4),
            EAGLE3,
        )


def test_norms_in_training_are_those_of_fp32_without_a_warning():
    """Autocast gives bf16 states and leaves the weights in fp32; PyTorch warns of the mixture, once
    in a process.
    """
    layer = drafter().layer
    states = torch.randn(2, 3, drafter().form.hidden).bfloat16()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            warnings.simplefilter("error")
            found = layer._normed("norm.weight", states)
    finally:
        torch.set_warn_always(False)
    weight = drafter().weight("norm.weight")
    assert torch.equal(
        found, F.rms_norm(states.float(), weight.shape, weight, drafter().form.eps).bfloat16()
    )
