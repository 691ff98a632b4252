"""Drafts by a draft model: whatever it says, and whoever joins, outputs are the target's."""

import time
from dataclasses import replace
from functools import cache
from itertools import count
from math import inf

import decoder_types
import pytest
import torch
from conftest import tiny_model
from decodings import (
    WIDE,
    answer_of,
    ids_of,
    letters,
    native_or_skip,
    plainly,
    prompt_of,
)
from evaluating import tiny_loaded

from layerskip_core.config.decoding import DecodingConfig, DraftProfile
from layerskip_core.decoding import (
    DecodingLoop,
    Prefixes,
    Scheduler,
    decode,
    decode_batch,
    new_row,
    without_failure,
)
from layerskip_core.model import TorchBackend, TransformersBackend
from layerskip_core.model.pages import PAGE
from layerskip_core.serving import Dispatcher, Request

KINDS = ("generic", "packed", "native")
DRAFTED = DecodingConfig("draft-model", num_draft_tokens=4, max_new_tokens=24)
# Drafts of the draft model that cost little, so that it is chosen where times are not measured.
ADAPTIVE = replace(
    DRAFTED, strategy="adaptive", profile=DraftProfile({}, (1.0, 1.0), {"draft model": 0.05})
)


def backend_on(kind, model):
    if kind == "generic":
        return TransformersBackend(model)
    return native_or_skip(model) if kind == "native" else TorchBackend.of(model)


def pair_of(kind, context=128, layers=4, model_type="llama", **changes):
    """A target of six layers, of which the last two add little, and a draft model: as many layers
    of the same weights.
    """
    dtype = torch.float32 if kind == "native" else torch.float64
    target = tiny_model(model_type, dtype, **WIDE, **changes)
    with torch.no_grad():
        for layer in target.model.layers[4:]:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    sizes = {**WIDE, **changes, "num_hidden_layers": layers, "max_position_embeddings": context}
    draft = tiny_model(model_type, dtype, **sizes)
    draft.load_state_dict(target.state_dict(), strict=False)
    backend = backend_on(kind, target)
    backend.draft_model = backend_on(kind, draft)
    return backend


cached_pair = cache(pair_of)


def together(backend, prompts, config, eos_ids=frozenset(), **options):
    found = decode_batch(backend, prompts, config, eos_ids, letters, **options)
    return [answer.ids for answer in found], [answer.stats for answer in found]


def passes_of(model, monkeypatch):
    """Records how many tokens of each row run in the passes of a model that are no draft's steps,
    and all other calls.
    """
    passes = []
    run = model.run_layers

    def recorded(hidden, start, stop, places):
        passes.append(list(places.counts))
        return run(hidden, start, stop, places)

    monkeypatch.setattr(model, "run_layers", recorded)
    return passes


@pytest.mark.parametrize("strategy", ["draft-model", "adaptive"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_target_s(kind, strategy):
    """Alone and in a batch of rows that end at different times: at an EOS, at their limit, at the
    end of the context.
    """
    backend = cached_pair(kind)
    prompts = [prompt_of(length) for length in (1, 14, 60, 5, 120)]
    config = replace(ADAPTIVE if strategy == "adaptive" else DRAFTED, max_new_tokens=40)
    free = [plainly(backend, prompt) for prompt in prompts]
    eos_ids = frozenset({free[0][21], free[2][9]})
    expected = [plainly(backend, prompt, eos_ids=eos_ids) for prompt in prompts]
    assert len({*map(len, expected)}) > 2
    alone = [answer_of(backend, prompt, config, eos_ids) for prompt in prompts]
    assert [ids for ids, _, _ in alone] == expected
    assert any(0 < stats.accepted < stats.drafted for _, _, stats in alone)
    assert any("draft model" in stats.steps_by_drafter for _, _, stats in alone)
    ids, counted = together(backend, prompts, config, eos_ids)
    assert ids == expected
    if strategy == "draft-model":
        assert [(each.drafted, each.accepted) for each in counted] == [
            (each.drafted, each.accepted) for _, _, each in alone
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_itself_as_draft_model_is_always_right(kind):
    backend = pair_of(kind, layers=6)
    for length in (1, 30):
        ids, _, stats = answer_of(backend, prompt_of(length), DRAFTED)
        assert ids == plainly(backend, prompt_of(length), 24)
        # 1 token from the prefill, rounds of 5, 5, 5, 5 and 3
        assert stats.accepted == stats.drafted == 18


def test_stop_strings_penalties_lookups_and_confidence_keep_the_output():
    backend = cached_pair("packed")
    prompt = prompt_of(9)
    plain = replace(DRAFTED, strategy="autoregressive")
    stop = letters(plainly(backend, prompt, 24)[10:12])
    for changes in (
        {"stop": (stop,)},
        {"frequency_penalty": 0.8, "repetition_penalty": 1.3},
        {"lookup": 1},
        {"temperature": 0.8},
    ):
        config = replace(DRAFTED, **changes)
        expected, reason, _ = answer_of(backend, prompt, replace(plain, **changes))
        ids, found, stats = answer_of(backend, prompt, config)
        assert (ids, found) == (expected, reason) and stats.drafted
        assert together(backend, [prompt, prompt_of(3)], config)[0][0] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_of_a_text_runs_twice(kind, monkeypatch):
    """But for rejected ones: the prompt in one pass before the first draft, and the last draft
    where all were accepted.
    """
    backend = pair_of(kind)
    config = replace(DRAFTED, num_draft_tokens=3)
    passes = passes_of(backend.draft_model, monkeypatch)
    prompt = prompt_of(30)
    loop = decode(backend, prompt, config)
    drafts = 0
    for [step] in loop:
        drafts += step.counts.drafted
    counted = kind == "generic"  # elsewhere the steps of drafts are those of its layers
    caught_up = [counts for counts in passes if counts[0] > 1 or not counted]
    assert caught_up[0] == [30] and all(counts == [1] for counts in caught_up[1:])
    whole = loop.stats.accepted_by_position[2]  # rounds in which all three drafts were accepted
    assert whole and loop.stats.rounds - whole > 2
    ran = len(passes) - 1 - (drafts if counted else 0)
    assert whole - 1 <= ran <= whole  # not after the last round


@pytest.mark.parametrize("model_type", ["lfm2", "mamba2"])
def test_recurrent_draft_models_go_back_too(model_type):
    """As a draft model of itself one is always right, also where a lookup drafted before, and as
    that of another it is not.
    """
    backend, other = (
        TransformersBackend(decoder_types.tiny.__wrapped__(model_type)) for _ in range(2)
    )
    backend.draft_model = other
    target = TransformersBackend(tiny_model(dtype=torch.float32))
    target.draft_model = other
    prompts = [prompt_of(9), [5, 6, 7, 8] * 4]
    for config in (DRAFTED, replace(DRAFTED, lookup=2)):
        plain = [plainly(backend, prompt, 24) for prompt in prompts]
        assert (
            [ids_of(decode(backend, prompt, config)) for prompt in prompts]
            == plain
            == together(backend, prompts, config)[0]
        )
        assert [ids_of(decode(target, prompt, config)) for prompt in prompts] == [
            plainly(target, p, 24) for p in prompts
        ]
    stats = answer_of(backend, prompts[0], DRAFTED)[2]
    assert stats.accepted == stats.drafted > 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_drafts_as_far_as_its_context_reaches(kind):
    """Beyond it the target goes on alone, and adaptive drafting by something else."""
    backend = pair_of(kind, context=32, layers=6)
    prompts = [prompt_of(20), prompt_of(60)]
    config = DRAFTED
    config = replace(config, max_new_tokens=30)
    (near, far), (counted, none) = together(backend, prompts, config)
    assert [near, far] == [plainly(backend, prompt, 30) for prompt in prompts]
    alone = answer_of(backend, prompts[0], config)[2]
    # 21 tokens after the prefill: rounds of 4 drafts give 26 and 31; then there is room for 1
    # draft.
    assert (alone.drafted, alone.accepted) == (counted.drafted, counted.accepted) == (9, 9)
    assert none.drafted == 0
    exits = replace(
        ADAPTIVE,
        exits=(5,),
        max_new_tokens=30,
        profile=DraftProfile({"exit 5": 0.5}, (1.0, 1.0), {"draft model": 0.01}),
    )
    ids, _, stats = answer_of(backend, prompts[1], exits)
    assert ids == far and "draft model" not in stats.steps_by_drafter


def test_memory_bounds_what_is_drafted_and_loses_nothing():
    """The draft model's pool has as many pages as the target's; where rows share pages there, it
    cannot hold all of them.
    """
    backend = pair_of("native", max_position_embeddings=512, context=512)
    draft = backend.draft_model
    bytes_of_both = sum(each._pool.page_bytes for each in (backend, backend.draft_model))
    assert draft._pool.page_bytes < backend._pool.page_bytes
    config = replace(DRAFTED, max_new_tokens=60)
    prompts = [prompt_of(100), prompt_of(70), prompt_of(90)]
    expected = [plainly(backend, prompt, 60) for prompt in prompts]
    backend.limit_memory(12 * bytes_of_both + 7)
    assert (backend._pool.most, draft._pool.most) == (12, 12)
    draft._pool.most = 5
    loop = DecodingLoop(backend, prompts, config)
    for _ in range(4):
        next(loop)
    assert [sum(step.drafted for step in row.steps) > 0 for row in loop.rows] == [True, True, False]
    list(loop)
    assert [row.output for row in loop.rows] == expected and loop.rows[2].steps[-1].drafted


@pytest.mark.parametrize("kind", ["packed", "native"])
def test_a_common_beginning_runs_once(kind, monkeypatch):
    """As in a conversation: only what is new of a text runs."""
    backend = pair_of(kind, max_position_embeddings=512, context=512)
    prefixes = Prefixes(inf, most_texts=2, least=1)
    first = prompt_of(100)
    ids = ids_of(decode(backend, first, DRAFTED, prefixes=prefixes))
    following = [*first, *ids, *prompt_of(40)]
    passes = passes_of(backend.draft_model, monkeypatch)
    loop = decode(backend, following, DRAFTED, prefixes=prefixes)
    assert (
        ids_of(loop) == plainly(backend, following, 24)
        and loop.reused_tokens > 110
        and loop.stats.drafted
    )
    assert max(counts[0] for counts in passes) <= 24 + 40


def kept_by(prefixes):
    """The models whose texts are kept, and their lengths."""
    return [(text.model, len(text.ids)) for text in prefixes._texts]


def test_a_shortage_in_one_pool_drops_texts_of_that_pool_only():
    """Those of the other model have no pages there."""
    backend = pair_of("native", max_position_embeddings=512, context=512)
    prefixes = Prefixes(1 << 30, least=1)
    draft = backend.draft_model
    config = DRAFTED
    first = prompt_of(130)
    other = prompt_of(250)
    ids = ids_of(decode(backend, first, config, prefixes=prefixes))
    assert {owner for owner, _ in kept_by(prefixes)} == {backend, draft}
    draft._pool.most = 5  # of which 3 hold the kept text, and the other prompt needs 5
    assert ids_of(decode(backend, other, config, prefixes=prefixes)) == plainly(backend, other, 24)
    assert (backend, 130 + 23) in kept_by(prefixes) and (draft, 129) not in kept_by(prefixes)
    again = decode(backend, [*first, *ids, 5], config, prefixes=prefixes)
    assert again.reused_tokens == 130 + 23
    list(again)
    plain = DecodingConfig("autoregressive", max_new_tokens=24, ignore_eos=True)
    told = Told(prompt_of(300), plain)
    of_draft = [text for text in kept_by(prefixes) if text[0] is draft]
    backend._pool.most = 6
    scheduler = Dispatcher(replace(tiny_loaded(), backend=backend), 4, prefixes=prefixes)
    scheduler.add(told.request)
    while scheduler.held:
        scheduler.step()
    assert (
        told.reason == "length"
        and of_draft
        and [text for text in kept_by(prefixes) if text[0] is draft] == of_draft
    )


def test_a_full_pool_of_the_draft_model_costs_drafts_and_no_answer():
    """Where a kept text would be continued, whose last page is copied."""
    backend = pair_of("native", max_position_embeddings=512, context=512)
    prefixes = Prefixes(1 << 30)
    first = prompt_of(100)
    ids = ids_of(decode(backend, first, DRAFTED, prefixes=prefixes))
    draft = backend.draft_model
    following = [*first, *ids, 5]
    held = [draft._pool.take() for _ in range(3)]
    draft._pool.most = draft._pool.used
    assert ids_of(decode(backend, following, DRAFTED, prefixes=prefixes)) == plainly(
        backend, following, 24
    )
    assert len(held) == 3


def test_one_row_that_drafts_does_not_stall_those_that_are_prefilled(monkeypatch):
    """The draft model reads its prompt in chunks, too."""
    backend = pair_of("native", max_position_embeddings=1024, context=1024)
    passes = passes_of(backend.draft_model, monkeypatch)
    scheduler = Scheduler(backend, max_prefill_tokens=64)
    drafting, prefilled = (new_row(backend, prompt_of(length), DRAFTED) for length in (300, 900))
    for row in (drafting, prefilled):
        scheduler.add(row)
    while not (prefilled.output or scheduler.is_idle):
        without_failure(scheduler.step())
    assert drafting.output and passes and max(sum(counts) for counts in passes) <= 64


class Told:
    def __init__(self, ids, config):
        self.text = ""
        self.reason = None
        self.request = Request(ids, config, self.hear)

    def hear(self, update):
        assert update.error is None
        self.text = self.text + update.text
        self.reason = update.finish_reason


@pytest.mark.parametrize("config", [DRAFTED, ADAPTIVE], ids=["draft-model", "adaptive"])
def test_requests_are_answered_while_long_prompts_are_read(config, monkeypatch):
    """A long prompt runs in pieces in the draft model too, and one that was set aside comes back.

    Every look at the clock takes a second, so that drafts of any length take as long as a pass, and
    adaptive drafting has them.
    """
    monkeypatch.setattr(time, "perf_counter", count(0.0).__next__)
    backend = pair_of("native", vocab_size=300, max_position_embeddings=2048, context=2048)
    decoder = replace(tiny_loaded(), backend=backend)
    config = replace(config, ignore_eos=True, max_new_tokens=50)
    lengths = (120, 600, 60, 120, 500, 64)
    clients = [Told(prompt_of(length, vocabulary=300), config) for length in lengths]
    expected = [decoder.detokenize(plainly(backend, client.request.ids, 50)) for client in clients]
    passes = passes_of(backend.draft_model, monkeypatch)
    scheduler = Dispatcher(decoder, 4, prefixes=Prefixes(1 << 30))
    aside = 0
    backend.limit_memory(13 * (backend._pool.page_bytes + backend.draft_model._pool.page_bytes))
    for client in clients:
        scheduler.add(client.request)
    while scheduler.held:
        scheduler.step()
        aside = max(aside, sum(bool(row.output) for row in scheduler._scheduler.waiting))
    assert [client.text for client in clients] == expected and aside
    assert all(sum(counts) <= 256 for counts in passes if len(counts) > 1)
    assert sum(client.request.stats.drafted for client in clients) > 100
    assert backend.draft_model._pool.used <= 13 and sum(lengths) > PAGE * 13
