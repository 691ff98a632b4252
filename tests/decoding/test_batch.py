"""Batches: every row gives what it gives alone."""

from functools import cache

import pytest
import torch
from conftest import tiny_model
from decodings import COUNTS, WIDE, answer_of, letters, native_or_skip, prompt_of

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import DecodingLoop, Scheduler, decode_batch, new_row, without_failure
from layerskip_core.errors import ConfigError
from layerskip_core.model import NativeBackend, TorchBackend, TransformersBackend
from layerskip_core.model.native.compiled import kernels
from layerskip_core.model.row_cache import RowCache

KINDS = ["generic", "packed", "windows", *(["native"] if kernels() else [])]


@cache
def model_of(kind):
    if kind == "generic":
        return TransformersBackend(tiny_model())
    if kind == "native":
        return NativeBackend.of(tiny_model("llama", torch.float32))
    if kind == "windows":
        return TorchBackend.of(tiny_model("mistral", sliding_window=5))
    return TorchBackend.of(tiny_model())


def alone(model, prompt, config, eos_ids=frozenset()):
    """Tokens, reason and all counts of a prompt that is decoded by itself."""
    ids, reason, stats = answer_of(model, prompt, config, eos_ids)
    return ids, reason, *(getattr(stats, name) for name in ("sequences", *COUNTS))


def together(model, prompts, config, eos_ids=frozenset()):
    return [
        (one.ids, one.finish_reason, *(getattr(one.stats, name) for name in ("sequences", *COUNTS)))
        for one in decode_batch(model, prompts, config, eos_ids, letters)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_has_room_from_the_start(kind, monkeypatch):
    """Its end is near: no keys and values are ever copied elsewhere."""
    model = model_of(kind)
    filled = []
    hold = RowCache._hold

    def noted(cache, storage):
        filled.append(getattr(cache, "storage", storage).shape[4])
        return hold(cache, storage)

    monkeypatch.setattr(RowCache, "_hold", noted)
    assert (
        len(alone(model, prompt_of(5), DecodingConfig(exit_layer=3, max_new_tokens=120))[0]) == 120
    )
    assert {*filled} <= {0}


def test_a_row_draws_for_itself_while_an_older_one_reads_its_prompt():
    """The older prompt has a piece that ends early, as where prompts part; the younger one drafts
    before its end.
    """
    backend = native_or_skip(tiny_model("llama", torch.float32, **WIDE))
    config = DecodingConfig("self-speculative", 3, 4, max_new_tokens=24, temperature=0.9)
    scheduler = Scheduler(backend, max_prefill_tokens=12)
    rows = [new_row(backend, prompt_of(length), config, seed=length) for length in (100, 5)]
    engine = scheduler.engine_for(rows[0])
    for row in rows:
        engine.add(row)
    rows[0].branch_point = 4
    while not scheduler.is_idle:
        without_failure(scheduler.step())
    alone = [
        DecodingLoop(backend, [prompt_of(length)], config, seeds=[length]) for length in (100, 5)
    ]
    assert [row.output for row in rows] == [
        [token for [step] in each for token in step.ids] for each in alone
    ]


def test_no_prompts_have_no_answers():
    assert decode_batch(model_of("packed"), [], DecodingConfig("autoregressive")) == []


def test_what_cannot_be_batched_is_refused():
    exact = TorchBackend.of(tiny_model(), PackingConfig(exact=True))
    with pytest.raises(ConfigError, match="`batch_size` must be 1 with `exact`"):
        decode_batch(exact, [[3], [4]], DecodingConfig("autoregressive"))
    config = DecodingConfig("autoregressive", max_new_tokens=8)
    assert together(exact, [[3]], config) == [alone(exact, [3], config)]
    with pytest.raises(ConfigError, match="at most 127 tokens, got 128"):
        decode_batch(model_of("packed"), [[3], [4] * 128], DecodingConfig("autoregressive"))
    with pytest.raises(ConfigError, match="`batch_size` must be 1 with `exit_confidence`"):
        decode_batch(
            model_of("packed"),
            [[3], [4]],
            DecodingConfig("early-exit", exits=(2,), exit_confidence=0.5),
        )
