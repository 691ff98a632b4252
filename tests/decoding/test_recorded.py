"""Recorded passes, on a simulated GPU: what is recorded, for how long, and what happens where it
cannot be.
"""

import warnings
from collections import Counter
from dataclasses import replace
from itertools import zip_longest
from math import inf

import pytest
import torch
from conftest import tiny_model
from decodings import answer_of, ids_of
from exit_block_models import random_blocks
from simulated_cuda import simulated_cuda

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import (
    DecodingLoop,
    Prefixes,
    Scheduler,
    decode,
    graphs,
    new_row,
    without_failure,
)
from layerskip_core.decoding.drafters import Draft
from layerskip_core.decoding.graphs import GraphRecorder
from layerskip_core.decoding.output import Timings
from layerskip_core.decoding.prefixes import NO_PREFIXES
from layerskip_core.errors import ConfigError
from layerskip_core.model import TorchBackend, row_cache
from layerskip_core.model.cache import Places
from layerskip_core.model.exit_blocks import ExitBlock

PROMPT = [5, 11, 23, 42, 8]
OTHER = [7, 9, 30, 31]
JOINING = [PROMPT, OTHER, [3] * 9, [12, 40, 2], [50, 51, 7, 7, 8, 1]]
DRAFTED = DecodingConfig(exit_layer=2, num_draft_tokens=4, max_new_tokens=24)
PLAIN = DecodingConfig("autoregressive", max_new_tokens=24)


@pytest.fixture
def gpu():
    with simulated_cuda() as simulated:
        yield simulated


@pytest.fixture
def model(gpu):
    return on_gpu()


@pytest.fixture
def recordings(monkeypatch):
    made = []
    usual = GraphRecorder._recorded

    def noted(self, work, inputs):
        recording = usual(self, work, inputs)
        made.append(tuple(tuple(tensor.shape) for tensor in inputs))
        return recording

    monkeypatch.setattr(GraphRecorder, "_recorded", noted)
    return made


def on_gpu(context=128, **packing):
    model = tiny_model(num_hidden_layers=3, max_position_embeddings=context)
    return TorchBackend.of(model.to("cuda"), PackingConfig(**packing))


def on_cpu(prompt, config=PLAIN):
    return ids_of(decode(TorchBackend.of(tiny_model(num_hidden_layers=3)), prompt, config))


def test_a_pass_is_recorded_once_and_replayed_for_later_texts(gpu, model, recordings):
    assert ids_of(decode(model, PROMPT, DRAFTED)) == on_cpu(PROMPT)
    first = len(recordings)
    draft = ((1,), (1, 5))
    verification = ((1, 5), (5,), (5, 32))
    assert {draft, verification} <= {*recordings} and len({*recordings}) == first
    gpu.replays = 0
    assert ids_of(decode(model, OTHER, DRAFTED)) == on_cpu(OTHER)
    assert gpu.replays >= 8
    assert recordings.count(draft) == recordings.count(verification) == 1
    assert ids_of(decode(model, OTHER, PLAIN)) == on_cpu(OTHER)
    assert ((1, 1), (1,)) in recordings


class Silent:
    """Drafts nothing."""

    def draft(self, context, limits):
        return Draft(context.newest, (0,) * len(limits))

    def observe(self, row, drafted, verified):
        pass


def test_no_entries_of_a_block_wait_across_a_recorded_pass(gpu):
    """It writes its own tokens' entries: those of the prompt would later be written one position
    too far.
    """
    tiny = tiny_model(num_hidden_layers=3, max_position_embeddings=128)
    blocks = random_blocks(tiny, ExitBlock(2))
    model = TorchBackend.of(tiny.to("cuda"), PackingConfig(), stored_drafters=blocks)
    loop = DecodingLoop(model, [PROMPT], DRAFTED, drafter=Silent())
    next(loop)
    assert loop.engine.cache.num_unwritten == [len(PROMPT)]
    for _ in range(4):
        next(loop)
    assert loop.stats.replayed > 0 and loop.engine.cache.num_unwritten == [0]


def test_two_decodings_at_once_keep_apart(model):
    ids_of(decode(model, PROMPT, DRAFTED))
    both = decode(model, PROMPT, DRAFTED), decode(model, OTHER, DRAFTED)
    found = [[], []]
    for steps in zip_longest(*both, fillvalue=[]):
        for ids, step in zip(found, steps, strict=True):
            ids += [token for row in step for token in row.ids]
    assert found == [on_cpu(PROMPT), on_cpu(OTHER)]


@pytest.mark.parametrize("config", [PLAIN, DRAFTED], ids=["plain", "drafted"])
def test_a_text_that_outgrows_the_cache_is_recorded_anew(
    gpu, model, recordings, monkeypatch, config
):
    """A later text goes on with the recordings, but for a short one after a long one: that would
    attend to many places.
    """
    monkeypatch.setattr(row_cache, "_STRIDE", 16)
    monkeypatch.setattr(row_cache, "_AHEAD", 8)
    monkeypatch.setattr(graphs, "_WORTH_KEEPING", 32)
    long = replace(config, max_new_tokens=40)
    for settings, rooms in (
        (config, [16, 32]),
        (config, [32]),
        (long, [32, 48]),
        (config, [16, 32]),
    ):
        loop = decode(model, PROMPT, settings)
        seen = []
        found = list(next(loop)[0].ids)  # whose pass is not recorded
        for [step] in loop:
            if loop.engine.rows:  # at its end a loop drops its cache
                seen.append(loop.engine.cache.capacity)
            found += step.ids
        assert sorted({*seen}) == rooms and loop.stats.replayed > 0
        assert found == on_cpu(PROMPT, replace(PLAIN, max_new_tokens=settings.max_new_tokens))
        # Known from the text before
        assert max(Counter(recordings).values(), default=0) == len(rooms) - (rooms[0] == 32)
        recordings.clear()


def test_a_cache_has_room_for_the_text_and_not_for_all_that_may_come(gpu):
    model = on_gpu(40_000)
    for prompt, count, room in (
        (PROMPT, 30_000, 320),
        (1000 * [7], 30_000, 1536),
        (PROMPT, 30_000, 320),
        (PROMPT, 24, 320),
    ):
        loop = decode(model, prompt, replace(PLAIN, max_new_tokens=count))
        next(loop), next(loop)
        assert loop.engine.cache.capacity == room
        loop.engine.recorder.give_back(model)


def test_only_what_was_replayed_is_counted(model):
    passes = 24 - 1  # after the prefill
    for prefixes, replayed in (
        (NO_PREFIXES, passes - 2),
        (NO_PREFIXES, passes),
        (Prefixes(inf), passes),
    ):
        assert answer_of(model, PROMPT, PLAIN, prefixes=prefixes)[2].replayed == replayed


@pytest.mark.parametrize("config", [PLAIN, DRAFTED], ids=["plain", "drafted"])
def test_a_conversation_goes_on_in_the_recorded_cache(gpu, model, config):
    """Another text's numbers that stand there are overwritten, and those of a text that is kept
    stay its own.
    """
    prefixes = Prefixes(inf, least=1)
    text = list(PROMPT)
    for turn in range(3):
        decoding = decode(model, text, config, prefixes=prefixes)
        found = ids_of(decoding)
        assert (
            found == on_cpu(text)
            and decoding.stats.replayed > 0
            and (decoding.reused_tokens > 0) == (turn > 0)
        )
        assert ids_of(decode(model, OTHER, config)) == on_cpu(OTHER)
        text = [*text, *found, 7 + turn, 9]
    # As the first turn, then otherwise
    again = decode(model, [*PROMPT, *on_cpu(PROMPT), 30], config, prefixes=prefixes)
    assert ids_of(again) == on_cpu([*PROMPT, *on_cpu(PROMPT), 30]) and again.reused_tokens > len(
        PROMPT
    )


@pytest.mark.parametrize(
    "config",
    [PLAIN, DRAFTED, replace(DRAFTED, strategy="lookup")],
    ids=["plain", "drafted", "lookup"],
)
def test_the_passes_of_a_batch_are_replayed(gpu, model, recordings, config):
    """Rows end one after another, and the passes of fewer have fewer slots."""
    prompts = [PROMPT, OTHER, [3] * 9, [4, 5, 4, 5, 4]]
    loop = DecodingLoop(model, prompts, config)
    for row, room in zip(loop.rows, (24, 24, 7, 5), strict=True):
        row.scanner.num_tokens_left = room
    for _ in loop:
        pass
    assert [row.output for row in loop.rows] == [
        on_cpu(row.ids[: row.num_prompt_tokens])[: len(row.output)] for row in loop.rows
    ]
    assert [len(row.output) for row in loop.rows] == [24, 24, 7, 5] and loop.stats.replayed > 0
    # Of the positions
    slots = {shapes[0][0] if len(shapes[0]) == 2 else shapes[1][0] for shapes in recordings}
    assert {4, 2} <= slots <= {4, 2, 1} and len({*recordings}) == len(recordings)


def test_rows_join_and_leave_without_new_recordings(gpu, model, recordings):
    """Until there are more than slots: each has a place of its own, and the cache does not move."""
    scheduler = Scheduler(model, max_rows=4)
    limits = (5, 24, 9, 24, 24, 24)
    rows = []
    for prompt, limit in zip((*JOINING, OTHER), limits, strict=True):
        rows.append(new_row(model, prompt, replace(DRAFTED, max_new_tokens=limit)))
        scheduler.add(rows[-1])
    engine = scheduler.engine_for(rows[0])
    for _ in range(2):
        without_failure(scheduler.step())
    storage = engine.cache.storage
    while not scheduler.is_idle:
        without_failure(scheduler.step())
        assert not engine.rows or engine.cache.storage is storage
    assert [row.output for row in rows] == [
        on_cpu(row.ids[: row.num_prompt_tokens])[: len(row.output)] for row in rows
    ]
    assert [len(row.output) for row in rows] == list(limits)
    assert engine.timings.replayed > 10 and len({*recordings}) == len(recordings)


def test_a_row_that_cannot_join_ends_the_others_and_not_those_that_wait(model, monkeypatch):
    """These get the same engine, and neither its cache nor its recordings."""
    scheduler = Scheduler(model)
    running, joining, waiting = (new_row(model, prompt, PLAIN) for prompt in JOINING[:3])
    scheduler.add(running)
    for _ in range(6):
        without_failure(scheduler.step())

    def failing(cache, other):
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr(row_cache.RowCache, "join", failing)
    scheduler.add(joining)
    scheduler.add(waiting)
    failed = [step.row for step in scheduler.step() if step.failure]
    assert failed == [running, joining]
    while not scheduler.is_idle:
        without_failure(scheduler.step())
    assert waiting.output == on_cpu(JOINING[2])


def test_where_recording_fails_decoding_goes_on(gpu, model, monkeypatch):
    """A pass that waits for the device cannot be recorded."""
    usual = TorchBackend.unembed

    def waiting(self, hidden):
        logits = usual(self, hidden)
        float(logits.sum())
        return logits

    monkeypatch.setattr(TorchBackend, "unembed", waiting)
    with pytest.warns(
        RuntimeWarning, match="decoding goes on without CUDA graphs: operation not permitted"
    ):
        found = ids_of(decode(model, PROMPT, DRAFTED))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found == ids_of(decode(model, PROMPT, DRAFTED)) == on_cpu(PROMPT)


def test_what_the_environment_asks_for(gpu, monkeypatch):
    assert on_gpu().recordable and on_gpu().implementation == "packed"
    assert (
        not on_gpu(exact=True).recordable
        and not TorchBackend.of(tiny_model(num_hidden_layers=3)).recordable
    )
    monkeypatch.setenv("LAYERSKIP_CUDA_GRAPHS", "off")
    assert not on_gpu().recordable
    monkeypatch.setenv("LAYERSKIP_CUDA_GRAPHS", "yes")
    with pytest.raises(ConfigError, match="LAYERSKIP_CUDA_GRAPHS"):
        on_gpu()


def test_recorded_passes_see_no_key_that_the_mask_hides(model):
    """Whatever the places after a text hold, such as an older text."""
    recorder = GraphRecorder(model.new_cache(), Timings())
    with torch.inference_mode():
        model.run_layers(
            model.embed(torch.tensor(PROMPT).to("cuda")), 0, 3, recorder.cache.span(0, 5)
        )
        newest, positions = (
            tokens.to("cuda") for tokens in (torch.tensor([8, 9, 10, 11]), torch.arange(5, 9)[None])
        )

        def run():
            hidden = model.run_layers(
                model.embed(newest), 0, 3, Places(recorder.cache, (), (), recorded=positions)
            )
            return model.unembed(hidden).cpu()

        expected = run()
        recorder.cache.storage[..., 9:, :] = 1e3
        assert torch.equal(run(), expected)
        usual = model.run_layers(model.embed(newest), 0, 3, recorder.cache.span(5, 9))
        torch.testing.assert_close(model.unembed(usual).cpu(), expected)
