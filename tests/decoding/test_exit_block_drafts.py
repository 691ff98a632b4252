"""Decoding with exit blocks: outputs are those of plain decoding, and first drafts are made from
the target's own states.
"""

from functools import cache
from itertools import accumulate
from math import inf

import pytest
import torch
from conftest import run_texts, tiny_model
from decodings import WIDE, entries, ids_of, native_or_skip, plainly, prompt_of
from exit_block_models import random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import DecodingLoop, decode
from layerskip_core.decoding.drafters.adaptive import AdaptiveDrafter
from layerskip_core.decoding.drafters.bandit import Plan
from layerskip_core.decoding.sampling import ChoiceRun, choose
from layerskip_core.model import DraftEnds, TorchBackend, TransformersBackend
from layerskip_core.model.exit_blocks import ExitBlock

SHAPE = {**WIDE, "max_position_embeddings": 64}
EXITS = (2, 4)
KINDS = ["generic", "packed", "native"]


@cache
def backend_of(kind):
    """Of weights near enough to each other that blocks are often right, and often wrong."""
    dtype = {"native": torch.float32, "exact": torch.bfloat16}.get(kind, torch.float64)
    model = tiny_model("llama", dtype, **SHAPE)
    blocks = random_blocks(model, *map(ExitBlock, EXITS))
    packing = (
        PackingConfig(exact=True) if kind == "exact" else PackingConfig(draft_weights=("int8",))
    )
    if kind == "generic":
        return TransformersBackend(model, blocks)
    if kind in ("packed", "exact"):
        return TorchBackend.of(model, packing, stored_drafters=blocks)
    return native_or_skip(model, packing, stored_drafters=blocks)


def first_logits(backend, ids, exit_layer):
    """The logits (V,) of the block after a text, by passes over all of it."""
    block = backend.exit_blocks[exit_layer]
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        states = run_texts(backend, backend.embed(tokens), 0, exit_layer)
        return block.head(run_texts(backend, states, block.layer, block.layer + 1))[0, -1]


def recorded(loop, backend):
    """Compares the first draft of every round by a block with the one from the whole text; returns
    how many there were.
    """
    drafter = loop.engine.drafter
    seen = []
    original = drafter.draft

    def draft(context, most, *ends):
        made = original(context, most, *ends)
        if made.source in ("exit 2", "exit 4"):
            firsts = accumulate(made.counts, initial=0)
            for row, (count, first) in enumerate(zip(made.counts, firsts, strict=False)):
                if count:
                    logits = first_logits(
                        backend, list(context.ids[row]), int(made.source[-1])
                    ).double()
                    chosen, _ = choose(logits[None], [ChoiceRun(context.rows[row])])
                    assert int(made.tokens[first + row + 1]) == int(chosen)
                    seen.append(row)
        return made

    drafter.draft = draft
    return seen


@pytest.mark.parametrize("kind", [*KINDS, "exact"])
@pytest.mark.parametrize("exit_layer", EXITS)
def test_the_output_is_that_of_plain_decoding(kind, exit_layer):
    backend = backend_of(kind)
    accepted = 0
    # The last reaches the context's end
    for length, drafts, limit in ((1, 1, 1), (7, 2, 2), (20, 6, 20), (59, 5, 9)):
        prompt = prompt_of(length)
        config = DecodingConfig("self-speculative", exit_layer, drafts, max_new_tokens=limit)
        decoding = decode(backend, prompt, config)
        seen = recorded(decoding, backend) if kind != "exact" else []
        assert ids_of(decoding) == plainly(backend, prompt, limit)
        assert kind == "exact" or len(seen) == decoding.stats.rounds
        accepted += decoding.stats.accepted
    assert accepted  # else no round would follow accepted drafts
    prompt = prompt_of(9)
    plain = plainly(backend, prompt)
    config = DecodingConfig("self-speculative", exit_layer, 5, max_new_tokens=40)
    for eos_ids in (frozenset({plain[3]}), frozenset({plain[12], plain[20]})):
        assert ids_of(decode(backend, prompt, config, eos_ids)) == plainly(
            backend, prompt, 40, eos_ids
        )
    assert ids_of(decode(backend, prompt, config, reuse_exit_states=False)) == plain


class Scheduled(AdaptiveDrafter):
    """Takes the next of a schedule of arms and lengths, whatever they promise."""

    schedule: list[tuple[int, int]]

    def _best_draft(self, context, limits, step):
        choice, length = self.schedule.pop(0) if self.schedule else (0, 0)
        arms = [None, *self.bandit.arms.values()]
        arm = arms[choice % len(arms)] if length else None
        self.bandit.plan = lambda rows, shortest, found: Plan(
            arm, length, DraftEnds(), inf if arm else 0.0, 0
        )
        return super()._best_draft(
            context, [min(length, limit) for limit in limits] if arm else limits, step
        )


def scheduled(backend, prompts, schedule, limit, eos_ids=frozenset()):
    """A loop in which arms of adaptive drafting take turns: 0 is none, 1 and 2 are the exits."""
    config = DecodingConfig("adaptive", max_new_tokens=limit, num_draft_tokens=6, exits=EXITS)
    loop = DecodingLoop(backend, prompts, config, eos_ids, None)
    loop.engine.drafter.__class__ = Scheduled
    loop.engine.drafter.schedule = list(schedule)
    loop.engine.drafter._by_clock = False  # by the clock some steps are plain, to be timed
    return loop


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    schedule=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=20),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    limit=st.integers(1, 25),
    eos_place=st.none() | st.integers(0, 24),
)
def test_no_schedule_changes_the_output_or_the_states_that_blocks_draft_on(
    kind, schedule, lengths, limit, eos_place
):
    """Blocks of two exits, low-bit copies, lookups and plain steps take turns on one cache."""
    backend = backend_of(kind)
    prompts = [prompt_of(length) for length in lengths]
    eos_ids = (
        frozenset()
        if eos_place is None
        else frozenset({plainly(backend, prompts[0], 25)[eos_place]})
    )
    loop = scheduled(backend, prompts, schedule, limit, eos_ids)
    found = {row: [] for row in loop.rows}
    recorded(loop, backend)
    for steps in loop:
        for row, ids, *_ in steps:
            found[row] += ids
    assert [*found.values()] == [plainly(backend, prompt, limit, eos_ids) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_does_not_draft_writes_nothing_and_catches_up_when_it_does(kind):
    """Two rows, ten steps without drafts, then one draft by exit 2: entries are those of a pass
    over each whole text.
    """
    backend = backend_of(kind)
    plain_steps = 10
    loop = scheduled(
        backend, [prompt_of(5), prompt_of(9, 1)], [(0, 0)] * plain_steps + [(1, 3)], 40
    )
    block = backend.exit_blocks[2]
    next(loop)  # the prompts
    for _ in range(plain_steps):
        next(loop)
    for index, row in enumerate(loop.rows):
        assert loop.engine.cache.num_unwritten[index] == row.num_computed_tokens
        if kind != "native":  # whose new pages are not zeroed
            found = entries(loop.engine.cache, index)[block.layer]
            assert not found[..., : row.num_computed_tokens, :].any()
    before = [row.num_computed_tokens for row in loop.rows]
    steps = next(loop)
    assert all(step.counts.drafted == 3 for step in steps)
    for index, (row, filled) in enumerate(zip(loop.rows, before, strict=True)):
        assert loop.engine.cache.num_unwritten[index] == row.num_computed_tokens - filled
        found = entries(loop.engine.cache, index)[block.layer, ..., :filled, :]
        cache = backend.new_cache(1)
        tokens = torch.tensor(row.ids[:filled])
        with torch.inference_mode():
            states = backend.run_layers(backend.embed(tokens), 0, 2, cache.span(0, filled))
            backend.run_layers(states, block.layer, block.layer + 1, cache.span(0, filled))
        torch.testing.assert_close(found, entries(cache)[block.layer, ..., :filled, :])


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_goes_on_from_the_exit_that_drafted(kind, monkeypatch):
    """The other exit's block gets its states too. Only the last draft may still need the layers
    before the exit.
    """
    backend = backend_of(kind)
    spans = []
    run_layers = backend.run_layers
    choose = backend.choose

    def choice(step):
        spans.extend((layer, len(step.tokens)) for layer in (step.start, *step.taps[:-1]))
        return choose(step)

    def record(hidden, start, stop, places):
        spans.append((start, len(hidden)))
        return run_layers(hidden, start, stop, places)

    loop = scheduled(backend, [prompt_of(7)], [(1, 4), (2, 4)] * 3, 40)
    next(loop)
    monkeypatch.setattr(backend, "run_layers", record)
    monkeypatch.setattr(backend, "choose", choice)
    for exit_layer, starts in ((2, {2, 4}), (4, {4})) * 3:
        spans.clear()
        next(loop)
        assert loop.rows[0].steps[-1].steps_by_drafter == {f"exit {exit_layer}": 1}
        assert {start for start, count in spans if count > 1} == starts


@pytest.mark.parametrize("exit_layer", EXITS)
def test_sampled_drafts_are_chosen_from_the_block_s_logits_by_the_target_s_noise(exit_layer):
    backend = backend_of("generic")
    sampling = {"temperature": 1.0, "seed": 7}
    config = DecodingConfig("self-speculative", exit_layer, 3, max_new_tokens=30, **sampling)
    decoding = decode(backend, prompt_of(6), config)
    seen = recorded(decoding, backend)
    assert len(ids_of(decoding)) == 30 and len(seen) == decoding.stats.rounds > 3


@pytest.mark.parametrize("kind", ["generic", "native"])
def test_early_exit_runs_the_block(kind):
    backend = backend_of(kind)
    prompt = prompt_of(8)
    expected = list(prompt)
    for _ in range(12):
        expected.append(int(first_logits(backend, expected, 2).argmax()))
    for config in (
        DecodingConfig("early-exit", 2, max_new_tokens=12),
        DecodingConfig("early-exit", exits=(2,), exit_confidence=1e-9, max_new_tokens=12),
    ):
        assert ids_of(decode(backend, prompt, config)) == expected[8:]
    sure = DecodingConfig("early-exit", exits=(2, 3), exit_confidence=1 - 1e-12, max_new_tokens=12)
    assert ids_of(decode(backend, prompt, sure)) == plainly(backend, prompt, 12)
    plain_exit = DecodingConfig("early-exit", 3, max_new_tokens=12)
    assert ids_of(decode(backend, prompt, plain_exit)) != expected[8:]
