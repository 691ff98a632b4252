"""Continuous batching: whoever joins and leaves, every request gets the answer that it gets
alone.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from math import inf
from random import Random
from types import SimpleNamespace

import decodings
import pytest
import torch
from conftest import at
from evaluating import tiny_loaded
from exit_block_models import random_blocks

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import DecodingLoop, Prefixes
from layerskip_core.decoding.dialogue import TextStream
from layerskip_core.decoding.prefixes import NO_PREFIXES
from layerskip_core.decoding.target import FixedTarget
from layerskip_core.errors import ContextError
from layerskip_core.model.exit_blocks import ExitBlock
from layerskip_core.model.pages import PAGE
from layerskip_core.serving import Dispatcher, Embedding, Request

SHAPE = {**decodings.WIDE, "vocab_size": 300}
SPECULATIVE = DecodingConfig("self-speculative", 2, 4)
ADAPTIVE = DecodingConfig("adaptive", exits=(2, 4), num_draft_tokens=6)
HOT = 0.9
prompt_of = partial(decodings.prompt_of, vocabulary=300)


@cache
def decoder_of(kind, **changes):
    """The tiny model with blocks at its exits 2 and 4."""
    blocks = (ExitBlock(2), ExitBlock(4))
    packing = PackingConfig(draft_weights=("int8",))
    backend = decodings.backend_on(
        kind, packing, blocks_of=lambda model: random_blocks(model, *blocks), **SHAPE, **changes
    )
    return replace(tiny_loaded(), backend=backend)


class Client:
    """Keeps what it is told."""

    def __init__(self, ids, config, **keywords):
        self.updates = []
        self.request = Request(ids, config, self.updates.append, **keywords)

    @property
    def answer(self):
        return "".join(update.text for update in self.updates), self.updates[-1].finish_reason

    def alone(self, decoder):
        """The answer that it gets without others, and its counts."""
        found = TextStream(decoder, self.request.ids, self.request.config).finish()
        return (found.text, found.finish_reason), found.stats


def require_own_answers(decoder, clients):
    for client in clients:
        assert client.answer == client.alone(decoder)[0]


def run(scheduler, arrivals):
    """`arrivals`: by step, the clients that come then. Returns the requests that finished."""
    finished = []
    for clients in arrivals:
        for client in clients:
            scheduler.add(client.request)
        finished += scheduler.step()
    while scheduler.held:
        finished += scheduler.step()
    return finished


@pytest.mark.parametrize(
    "kind, config",
    [
        ("generic", SPECULATIVE),
        ("packed", ADAPTIVE),
        ("packed", DecodingConfig("lookup")),
        ("packed", replace(SPECULATIVE, temperature=HOT)),
        ("native", SPECULATIVE),
        ("native", ADAPTIVE),
    ],
    ids=["exit", "adaptive", "lookup", "sampled", "exit-native", "adaptive-native"],
)
def test_requests_that_come_at_any_time_get_their_own_answers(kind, config):
    """With their own lengths, stop strings and seeds; more of them than are decoded at once."""
    decoder = decoder_of(kind)
    random = Random(3)
    clients = []
    for length in (3, 12, 1, 7, 30, 5, 9):
        limit = random.choice([1, 4, 11, 25])
        own = replace(config, max_new_tokens=limit, seed=length)
        if length in (7, 30):
            text = Client(prompt_of(length), replace(own, max_new_tokens=25)).alone(decoder)[0][0]
            own = replace(own, max_new_tokens=25, stop=(text[8:10],))
        clients.append(Client(prompt_of(length), own))
    scheduler = Dispatcher(decoder, batch_size=4)
    finished = run(scheduler, [clients[:2], [], clients[2:3], clients[3:], []])
    assert sorted(map(id, finished)) == sorted(id(client.request) for client in clients)
    for client in clients:
        expected, stats = client.alone(decoder)
        assert client.answer == expected
        own = client.request.stats
        assert (own.prompt_tokens, own.new_tokens, own.sequences) == (
            stats.prompt_tokens,
            stats.new_tokens,
            1,
        )
        if config.strategy == "self-speculative":
            assert (own.drafted, own.accepted) == (stats.drafted, stats.accepted)
    assert {client.answer[1] for client in clients} == {"length", "stop"}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_prompts_with_equal_settings_are_prefilled_together(monkeypatch, temperature):
    """But for what a step has no room for; one that does not fit is refused."""
    decoder = decoder_of("generic")
    passes = []
    honest = FixedTarget.run_mixed

    def recorded(target, tokens, places, scored, needs_states):
        passes.append(list(places.counts))
        return honest(target, tokens, places, scored, needs_states)

    monkeypatch.setattr(FixedTarget, "run_mixed", recorded)
    clients = []
    for length in (3, 9, 999, 5, 4, 100, 90, 2, 50, 8):
        limit = 12 if length == 2 else 6
        config = DecodingConfig(
            "autoregressive", max_new_tokens=limit, temperature=temperature, seed=length
        )
        clients.append(Client(prompt_of(length), config, streams=length != 9))
    scheduler = Dispatcher(decoder, batch_size=9)
    assert len(run(scheduler, [clients])) == len(clients) and scheduler.held == 0
    # Of the others their newest tokens, too
    assert passes == [[3, 9, 5, 4, 100, 90, 2, 43], [1, 1, 1, 1, 1, 1, 1, 7, 8]]
    assert isinstance(clients[2].updates[-1].error, ContextError)
    assert len([update for update in clients[1].updates if update.text]) == 1
    require_own_answers(decoder, [*clients[:2], *clients[3:]])


@pytest.mark.parametrize("kind", ["generic", "native"])
def test_an_embedding_has_one_short_pass_between_two_steps_of_answers(kind, monkeypatch):
    backend = decoder_of(kind).backend
    ids = prompt_of(100)
    positions = at(torch.arange(100)[None], backend.new_cache())
    hidden = backend.run_layers(backend.embed(torch.tensor([ids])), 0, 6, positions)
    mean = backend.normed(hidden)[0].float().mean(0)
    scheduler = Dispatcher(decoder_of(kind), batch_size=1, prefill_tokens=32)
    running = Client(prompt_of(3), replace(SPECULATIVE, max_new_tokens=60))
    heard = []
    first, second, third, too_long, last = (
        Embedding(text, heard.append) for text in (ids, ids[:40], ids, prompt_of(999), ids[:5])
    )
    run_layers = backend.run_layers
    passes = []
    monkeypatch.setattr(
        backend, "run_layers", lambda *given: passes.append(len(given[0])) or run_layers(*given)
    )
    for request in (running.request, first, second, third, too_long, last):
        scheduler.add(request)
    assert isinstance(heard.pop().error, ContextError)
    for step, size in enumerate((32, 32, 32, 4, 32), start=1):
        passes.clear()
        scheduler.step()
        assert passes[0] == size  # alone, and then a step of the answer
        assert len(running.updates) == step and len(heard) == (step >= 4)
    assert heard[0].vector == pytest.approx((mean / mean.norm()).tolist(), abs=1e-6)
    assert scheduler.cancel(second) and scheduler.cancel(third) and not scheduler.cancel(first)
    assert {*map(id, run(scheduler, []))} == {id(running.request), id(last)}
    assert len(heard) == 2 and heard[1].vector and scheduler.held == 0
    assert first._cache is last._cache is None


def test_settings_that_differ_take_turns():
    """None waits for the end of another's answer."""
    decoder = decoder_of("packed")
    long = 40
    slow = Client(prompt_of(4), replace(SPECULATIVE, max_new_tokens=long))
    others = [
        Client(prompt_of(4), DecodingConfig("autoregressive", max_new_tokens=3)),
        Client(
            prompt_of(4),
            DecodingConfig("early-exit", exit_confidence=0.5, exits=(4,), max_new_tokens=3),
        ),
        Client(prompt_of(4), replace(SPECULATIVE, max_new_tokens=3, temperature=HOT)),
    ]
    scheduler = Dispatcher(decoder, batch_size=8)
    finished = run(scheduler, [[slow, *others]])
    assert finished[-1] is slow.request and slow.request.stats.new_tokens == long
    require_own_answers(decoder, [slow, *others])


def test_rows_share_a_pass_and_keep_their_own_sampling_and_changes_of_logits():
    decoder = decoder_of("native")
    options = [
        {"frequency_penalty": 1.5},
        {"logit_bias": ((5, 9.0),)},
        {"repetition_penalty": 1.5, "logprobs": 2},
        {"temperature": HOT},
        {"temperature": 1.5, "top_k": 5, "seed": 7},
        {"temperature": HOT, "seed": 3, "presence_penalty": 0.5},
        {},
        {"ignore_eos": True, "stop_token_ids": (1,)},
    ]
    configs = [
        replace(SPECULATIVE, max_new_tokens=12 + place, **each)
        for place, each in enumerate(options)
    ]
    clients = [
        Client(prompt_of(3 + place), config, streams=place % 2)
        for place, config in enumerate(configs)
    ]
    scheduler = Dispatcher(decoder, batch_size=8)
    for client in clients:
        scheduler.add(client.request)
    scheduler.step()
    assert [len(engine.rows) for engine in scheduler._scheduler._engines.values()] == [8]
    run(scheduler, [])
    for client in clients:
        expected, stats = client.alone(decoder)
        assert client.answer == expected and client.request.stats.new_tokens == stats.new_tokens
    told = [one.id for update in clients[2].updates for one in update.logprobs]
    assert len(told) == clients[2].request.stats.new_tokens


def test_a_pass_that_fails_ends_its_own_requests_only(monkeypatch):
    decoder = decoder_of("packed")
    scheduler = Dispatcher(decoder, batch_size=4)
    doomed = [
        Client(prompt_of(length), replace(SPECULATIVE, max_new_tokens=30)) for length in (4, 6)
    ]
    spared = Client(prompt_of(5), DecodingConfig("autoregressive", max_new_tokens=10))
    too_long = Client([5] * 200, spared.request.config)
    for client in [*doomed, spared, too_long]:
        scheduler.add(client.request)
    assert scheduler.step() == [too_long.request]
    assert "at most 127 tokens, got 200" in str(too_long.updates[-1].error)
    engines = scheduler._scheduler._engines.values()
    engine = next(engine for engine in engines if len(engine.rows) == 2)
    monkeypatch.setattr(engine, "target", None)
    finished = scheduler.step()
    assert finished == [client.request for client in doomed]
    assert all(isinstance(client.updates[-1].error, AttributeError) for client in doomed)
    run(scheduler, [])
    require_own_answers(decoder, [spared])


@pytest.mark.parametrize("kind", ["native", "packed", "generic"])
def test_longer_and_longer_prompts_beside_a_long_answer_take_bounded_memory(kind):
    decoder = decoder_of(kind, max_position_embeddings=640)
    scheduler = Dispatcher(decoder, batch_size=3)
    held = []
    clients = [
        Client(prompt_of(length), replace(ADAPTIVE, max_new_tokens=3))
        for length in range(70, 600, 105)
    ]
    clients.append(Client(prompt_of(4), replace(ADAPTIVE, max_new_tokens=100, ignore_eos=True)))
    scheduler.add(clients[-1].request)
    for client in clients[:-1]:
        scheduler.add(client.request)
        for _ in range(2):
            scheduler.step()
            [engine] = scheduler._scheduler._engines.values()
            held.append(sum(engine.cache.memory.values()) / engine.cache.rows)
    longest = DecodingLoop(decoder.backend, [prompt_of(630)], ADAPTIVE)
    next(longest)
    slots = 1 if kind == "native" else 2  # for a row: PyTorch's caches double them
    assert len(held) >= 12 and max(held) <= slots * sum(longest.engine.cache.memory.values())
    run(scheduler, [])
    require_own_answers(decoder, clients)


@pytest.mark.parametrize("kind", ["native", "packed", "generic"])
@pytest.mark.parametrize(
    "config",
    [
        ADAPTIVE,
        replace(SPECULATIVE, lookup=2),
        DecodingConfig("early-exit", exits=(4,), exit_confidence=0.1),
    ],
    ids=["adaptive", "exit", "depth per token"],
)
def test_a_long_prompt_runs_in_pieces_between_the_steps_of_others(kind, config):
    """The other gets a step for each piece, and both the answers that they get alone. A prompt that
    is given up leaves.
    """
    decoder = decoder_of(kind, max_position_embeddings=400)
    other, long, gone = (
        Client(prompt_of(length), replace(config, max_new_tokens=40, ignore_eos=True))
        for length in (5, 225, 250)
    )
    scheduler = Dispatcher(decoder, batch_size=4, prefill_tokens=64)
    for client in (other, long, gone):
        scheduler.add(client.request)
        scheduler.step()
    while not long.updates:
        assert scheduler.running == 2 and scheduler.held == 3
        scheduler.step()
    # One for its own prompt, and for each of four pieces
    assert len(other.updates) >= 5 and not gone.updates
    scheduler.step()
    assert scheduler.running == 3 and scheduler.cancel(gone.request) and scheduler.running == 2
    run(scheduler, [])
    assert not gone.updates
    require_own_answers(decoder, (other, long))


@pytest.mark.parametrize("config", [ADAPTIVE, SPECULATIVE, replace(SPECULATIVE, temperature=HOT)])
def test_a_pool_of_a_tenth_of_what_is_asked_for_loses_nothing(config):
    """Requests wait, or run again after they were set aside; a quarter of the clients leaves. Kept
    texts go first.
    """
    decoder = decoder_of("native", max_position_embeddings=701)
    random = Random(5)
    config = replace(config, ignore_eos=True)
    lengths = [
        random.randint(2, 60) if number % 4 else random.randint(200, 400) for number in range(24)
    ]
    limits = [random.randint(60, 200) for _ in lengths]
    prompts = [
        [*prompt_of(70), *prompt_of(length, length)] if length % 3 else prompt_of(length)
        for length in lengths
    ]
    asked = list(zip(prompts, limits, strict=True))
    clients = [
        Client(prompt, replace(config, max_new_tokens=limit, seed=number))
        for number, (prompt, limit) in enumerate(asked)
    ]
    expected = [client.alone(decoder)[0] for client in clients]
    pages = sum(-(-(len(prompt) + limit) // PAGE) for prompt, limit in asked)
    pool = decoder.backend._pool
    prefixes = Prefixes(1 << 30)
    waited = 0
    used = 0
    scheduler = Dispatcher(decoder, batch_size=24, prefixes=prefixes)
    decoder.backend.limit_memory(max(pages // 10, 12) * pool.page_bytes)
    try:
        embedding = []
        scheduler.add(Embedding(prompt_of(300), embedding.append))
        for client in clients:
            scheduler.add(client.request)
        gone = random.sample(range(len(clients)), 6)
        for step in range(10_000):
            if not scheduler.held:
                break
            if step < len(gone):
                scheduler.cancel(clients[gone[step]].request)
            scheduler.step()
            waited = max(waited, sum(bool(row.output) for row in scheduler._scheduler.waiting))
            used = max(used, pool.used)
        assert not scheduler.held and waited and used <= pool.most and embedding[0].vector
        for number, client in enumerate(clients):
            if number not in gone:
                assert client.answer == expected[number]
        decoder.backend.limit_memory(5 * pool.page_bytes)
        with pytest.raises(
            ContextError,
            match=r"319 tokens, got 400 \(the memory for keys and values has room for 320 tokens",
        ):
            DecodingLoop(decoder.backend, [prompt_of(400)], config)
    finally:
        pool.most = inf
    while prefixes.drop():
        pass
    assert pool.used == 0


def test_a_full_pool_keeps_no_text_and_an_embedding_gives_back_what_it_has():
    """The prompt and its answer fill both pages; then a row grows beside an embedding that has been
    read in part.
    """
    decoder = decoder_of("native", max_position_embeddings=702)
    backend = decoder.backend
    config = DecodingConfig("autoregressive", max_new_tokens=20, ignore_eos=True)
    full = Client(prompt_of(100), config)
    grown = Client(prompt_of(60), replace(config, max_new_tokens=200))
    expected = [client.alone(decoder)[0] for client in (full, grown)]
    told = {"alone": [], "beside": []}
    whole, part = (Embedding(prompt_of(600), told[name].append) for name in told)
    run(Dispatcher(decoder, 1), [[SimpleNamespace(request=whole)]])
    try:
        backend.limit_memory(2 * backend._pool.page_bytes)
        prefixes = Prefixes(1 << 30)
        run(Dispatcher(decoder, 4, prefixes=prefixes), [[full]])
        assert full.answer == expected[0] and prefixes.bytes == 0
        backend.limit_memory(12 * backend._pool.page_bytes)
        scheduler = Dispatcher(decoder, 4)
        for request in (part, grown.request):
            scheduler.add(request)
        scheduler.step()
        assert part._cache is not None
        backend.limit_memory(5 * backend._pool.page_bytes)  # less than both need
        while grown.request.stats.new_tokens < 100:
            scheduler.step()
        assert part._cache is None
        backend.limit_memory(12 * backend._pool.page_bytes)
        run(scheduler, [])
    finally:
        backend._pool.most = inf
    assert grown.answer == expected[1] and told["beside"] == told["alone"]


CALM = DecodingConfig("early-exit", exits=(2, 4), exit_confidence=0.1)


@contextmanager
def memory_of(decoder, pages):
    """Limits the pool, which nothing uses before and after."""
    pool = decoder.backend._pool
    assert pool.used == 0
    decoder.backend.limit_memory(pages * pool.page_bytes)
    try:
        yield pool
    finally:
        pool.most = inf


@pytest.mark.parametrize("seed", range(12))
def test_whoever_leaves_a_full_pool_nothing_live_fails(seed):
    """Greedy and sampled requests share an engine, those that exit by confidence have one each; an
    embedding comes between.

    The pool has room for the longest text and little more.
    """
    decoder = decoder_of("native", max_position_embeddings=703)
    random = Random(seed)
    configs = [SPECULATIVE, replace(SPECULATIVE, temperature=HOT), CALM]
    clients = []
    heard = []
    for number in range(14):
        limit = random.choice([1, 3, 30, 90, 200])
        config = replace(random.choice(configs), max_new_tokens=limit, ignore_eos=True, seed=number)
        prompt = prompt_of(random.choice([2, 60, 64, 130, 250]), random.randrange(3))
        clients.append(Client(prompt, config, streams=random.random() < 0.7))
    expected = [client.alone(decoder)[0] for client in clients]
    embedding = Embedding(prompt_of(400), heard.append)
    gone = set()
    late = list(clients)
    prefixes = Prefixes(1 << 30) if seed % 2 else NO_PREFIXES
    with memory_of(decoder, 8) as pool:
        scheduler = Dispatcher(decoder, 6, prefixes=prefixes)
        scheduler.add(embedding)
        while late or scheduler.held:
            for _ in range(random.choice([0, 0, 0, 1, 3]) if late else 0):
                if late:
                    scheduler.add(late.pop(0).request)
            if random.random() < 0.1:
                leaving = random.choice(clients)
                if scheduler.cancel(leaving.request):
                    gone.add(leaving)
            scheduler.step()
        for client, answer in zip(clients, expected, strict=True):
            assert client.updates or client in gone
            assert client in gone or client.answer == answer
        assert heard[-1].vector and gone and not scheduler.held
        while prefixes.drop():
            pass
        assert pool.used == 0


def test_a_cancelled_row_and_a_finished_loop_give_back_their_pages_at_once():
    """Also in the middle of a step, while other loops have not taken theirs."""
    decoder = decoder_of("native", max_position_embeddings=704)
    plain = DecodingConfig("autoregressive", max_new_tokens=40, ignore_eos=True)
    long = Client(prompt_of(140), plain)
    short = Client(prompt_of(190), replace(plain, max_new_tokens=3))
    beside = Client(prompt_of(60), plain)
    hot = Client(prompt_of(63), replace(plain, temperature=HOT))
    expected = [client.alone(decoder)[0] for client in (beside, short, hot)]
    with memory_of(decoder, 4) as pool:
        scheduler = Dispatcher(decoder, 4)
        for client in (long, beside):
            scheduler.add(client.request)
        scheduler.step()
        assert pool.used == 3 + 1
        assert scheduler.cancel(long.request) and pool.used == 1
        run(scheduler, [])
        # In the third step one ends, with three pages, and the other needs its second
        run(scheduler, [[short, hot]])
        assert [beside.answer, short.answer, hot.answer] == expected and pool.used == 0


def test_a_pass_that_fails_gives_back_its_memory_though_its_clients_keep_the_error(monkeypatch):
    decoder = decoder_of("native", max_position_embeddings=705)
    client = Client(prompt_of(100), replace(SPECULATIVE, max_new_tokens=50))
    heard = []
    embedding = Embedding(prompt_of(400), heard.append)
    with memory_of(decoder, 20) as pool:
        scheduler = Dispatcher(decoder, 4)
        for request in (embedding, client.request):
            scheduler.add(request)
        scheduler.step()
        assert pool.used == 4 + 2

        def failing():
            raise RuntimeError("no memory on this machine")

        monkeypatch.setattr(pool, "take", failing)
        while scheduler.held:
            scheduler.step()
        assert pool.used == 0
        assert [str(told[-1].error) for told in (heard, client.updates)] == [
            "no memory on this machine"
        ] * 2
