"""Dynamic depth per token: against a reference in plain torch, on every backend, and against the
fixed depths at its ends.
"""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import run_texts, tiny_model
from decodings import WIDE, ids_of, prompt_of
from exit_block_models import random_blocks

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import DecodeStats, Scheduler, decode, new_row, without_failure
from layerskip_core.decoding.target import TargetOutput
from layerskip_core.model import NativeBackend, TorchBackend, TransformersBackend
from layerskip_core.model.exit_blocks import ExitBlock
from layerskip_core.model.native.compiled import kernels

LAYERS = 6
EXITS = (1, 2, 4)
# A head of its own: a tied one mostly repeats the last token
UNTIED = {"tie_word_embeddings": False}
MODELS = {
    "llama": {},
    "gemma2": {**UNTIED, "sliding_window": 5},
    "gemma3_text": {
        **UNTIED,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "olmo2": {},
    "starcoder2": UNTIED,
}
CONFIDENCE = 0.08  # of 67 tokens: some tokens of these models leave at each exit
BACKENDS = [
    TransformersBackend,
    TorchBackend.of,
    *([NativeBackend.of] if kernels() is not None else []),
]


def model_of(backend, model_type="llama"):
    dtype = torch.float32 if backend == NativeBackend.of else torch.float64
    return backend(tiny_model(model_type, dtype, **MODELS[model_type]))


def run(model, prompt, count=24, **settings):
    decoding = decode(model, prompt, DecodingConfig(max_new_tokens=count, **settings))
    return ids_of(decoding), decoding.stats


def dynamic(model, prompt, confidence, count=24, **settings):
    return run(
        model,
        prompt,
        count,
        strategy="early-exit",
        exits=EXITS,
        exit_confidence=confidence,
        **settings,
    )


@torch.no_grad()
def reference(backend, prompt, confidence, count=24, draft_vocab=67, possible=EXITS):
    """The whole sequence again for each token, layer by layer: above its exit a token stays as it
    was at its exit.
    """
    ids = list(prompt)
    exits = []
    for _ in range(count):
        hidden = backend.embed(torch.tensor([ids]))
        ran = torch.tensor([LAYERS] * len(prompt) + exits[1:] + [LAYERS] * (len(ids) > len(prompt)))
        for layer in range(LAYERS):
            after = run_texts(backend, hidden, layer, layer + 1)
            hidden = torch.where((ran > layer)[None, :, None], after, hidden)
            if (block := backend.exit_blocks.get(layer + 1)) is None:
                logits = backend.unembed(hidden[0, -1])
            else:
                logits = block.head(run_texts(backend, hidden, block.layer, block.layer + 1)[0, -1])
            if layer + 1 == LAYERS or (
                layer + 1 in possible and logits[:draft_vocab].softmax(-1).max() > confidence
            ):
                break
        exits.append(layer + 1)
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], exits


@cache
def expected_of(model_type, length):
    plain = TransformersBackend(tiny_model(model_type, **MODELS[model_type]))
    return reference(plain, prompt_of(length), CONFIDENCE)


def by_layers(exits):
    return tuple(exits.count(layers) for layers in range(1, max(exits) + 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", MODELS)
def test_each_token_leaves_at_its_exit_and_is_seen_from_above(backend, model_type):
    model = model_of(backend, model_type)
    seen = Counter()
    for length in (1, 2, 9):
        expected, exits = expected_of(model_type, length)
        ids, stats = dynamic(model, prompt_of(length), CONFIDENCE)
        assert ids == expected
        assert stats.tokens_by_layers == by_layers(exits)
        assert stats.mean_layers == pytest.approx(sum(exits) / len(exits))
        assert stats.new_tokens == 24
        seen.update(exits)
    assert min(seen[layers] for layers in (*EXITS, LAYERS)) > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_was_preempted_is_decoded_again(backend):
    """Its new cache lacks the entries that its tokens had before."""
    model = model_of(backend)
    expected, stats = dynamic(model, prompt_of(2), CONFIDENCE)
    assert len([count for count in stats.tokens_by_layers if count]) > 2
    config = DecodingConfig("early-exit", exits=EXITS, exit_confidence=CONFIDENCE)
    row = new_row(model, prompt_of(2), replace(config, max_new_tokens=24))
    scheduler = Scheduler(model)
    scheduler.add(row)
    for _ in range(12):
        without_failure(scheduler.step())
    scheduler.preempt(row)
    while not scheduler.is_idle:
        without_failure(scheduler.step())
    assert row.output == expected


def test_exits_are_tested_with_the_head_that_drafts():
    """Over the first 40 of 67 tokens more tokens leave early; which token it is decide all."""
    model = TorchBackend.of(tiny_model(), PackingConfig(draft_vocab=40))
    plain = model_of(TransformersBackend)
    prompt = prompt_of(9)
    expected, exits = reference(plain, prompt, 0.12, draft_vocab=40)
    ids, stats = dynamic(model, prompt, 0.12)
    assert ids == expected and max(ids) >= 40
    assert stats.tokens_by_layers == by_layers(exits)
    assert exits != reference(plain, prompt, 0.12)[1]


def test_blocks_decide_and_attend_to_tokens_that_left_below_them():
    model = tiny_model("llama", torch.float64, **WIDE)
    backend = TransformersBackend(model, random_blocks(model, ExitBlock(2), ExitBlock(4)))
    expected, exits = reference(backend, prompt_of(8), 0.3, 20, possible=(2, 4))
    ids, stats = run(
        backend, prompt_of(8), 20, strategy="early-exit", exits=(2, 4), exit_confidence=0.3
    )
    assert len(set(exits)) > 1
    assert (ids, stats.tokens_by_layers) == (expected, by_layers(exits))


def test_each_layer_runs_once_for_a_token_that_reaches_it(monkeypatch):
    """And keys are written for tokens that left, all together, only when a token goes where they
    are missing.
    """
    model = model_of(TransformersBackend)
    calls = []
    for name in ("run_layers", "write_kv"):
        recorded(monkeypatch, model, name, calls)
    decoding = decode(
        model,
        prompt_of(9),
        DecodingConfig("early-exit", exits=(2, 4), exit_confidence=0.5, max_new_tokens=9),
    )
    monkeypatch.setattr(decoding.engine.target, "_leaving", scripted([2, 2, 4, 2, 2, 6, 2], model))
    for _ in range(7):
        next(decoding)
    assert calls == [
        ("run_layers", 0, 2, [*range(9)]),
        ("run_layers", 2, 4, [*range(9)]),
        ("run_layers", 4, 6, [*range(9)]),
        ("run_layers", 0, 2, [9]),
        ("run_layers", 0, 2, [10]),
        ("write_kv", 2, 4, [9]),
        ("run_layers", 2, 4, [10]),
        ("run_layers", 0, 2, [11]),
        ("run_layers", 0, 2, [12]),
        ("run_layers", 0, 2, [13]),
        ("write_kv", 2, 4, [11, 12]),
        ("run_layers", 2, 4, [13]),
        ("write_kv", 4, 6, [9, 10, 11, 12]),
        ("run_layers", 4, 6, [13]),
        ("run_layers", 0, 2, [14]),
    ]
    assert decoding.stats.tokens_by_layers == (0, 5, 0, 1, 0, 1)


def recorded(monkeypatch, model, name, calls):
    original = getattr(model, name)

    def method(hidden, start, stop, places):
        calls.append((name, start, stop, places.positions.tolist()))
        return original(hidden, start, stop, places)

    monkeypatch.setattr(model, name, method)


def scripted(exits, model):
    """In the place of `_leaving`: the tokens leave after so many layers each."""
    left = iter(exits)
    current = next(left)

    def leaving(hidden, layers):
        nonlocal current
        if layers != current:
            return None
        current = next(left, LAYERS)
        return TargetOutput(model.unembed(hidden), layers)

    return leaving


def test_fixed_depths_are_counted_too():
    model = model_of(TransformersBackend)
    assert run(model, prompt_of(9), 5, strategy="early-exit", exit_layer=2)[1].tokens_by_layers == (
        0,
        5,
    )
    stats = run(model, prompt_of(9), 5, exit_layer=2, num_draft_tokens=3)[1]
    assert stats.tokens_by_layers == (0, 0, 0, 0, 0, 5) and stats.drafted > 0
    both = stats + run(model, prompt_of(9), 15, strategy="early-exit", exit_layer=2)[1]
    assert both.tokens_by_layers == (0, 15, 0, 0, 0, 5) and both.mean_layers == 3
    assert DecodeStats().mean_layers == 0
