"""Layers with a memory, and gpt-oss: drafts, batches, pieces, kept texts and rows that run again
change no bit.
"""

from dataclasses import replace
from functools import cache
from itertools import product
from math import inf

import pytest
import torch
from conftest import DENSE_MIXERS, logits_of, tiny_model
from conftest import MIXERS as ALL_MIXERS
from decodings import ids_of, native_or_skip, prompt_of
from evaluating import tiny_loaded
from exit_block_models import random_blocks, random_eagle3
from test_prefix import SHAPE, conversation, entries, of_turns

from layerskip_core.checkpoint.sidecars import matrix_names
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import (
    Prefixes,
    Scheduler,
    decode,
    decode_batch,
    new_row,
    without_failure,
)
from layerskip_core.decoding.dialogue import TextStream
from layerskip_core.decoding.prefixes import NO_PREFIXES
from layerskip_core.errors import LayerSkipError
from layerskip_core.model import ModelSpec, NativeBackend
from layerskip_core.model.exit_blocks import MTP, ExitBlock
from layerskip_core.model.pages import PAGE
from layerskip_core.model.weights import int4_bytes, int4_of
from layerskip_core.serving import Dispatcher, Request

PRECISIONS = {
    "fp32": (torch.float32, PackingConfig(draft_weights=("int8", "int4"))),
    "bf16": (torch.bfloat16, PackingConfig(draft_weights=("int8",), draft_vocab=40)),
    "int8": (torch.bfloat16, PackingConfig("int8", draft_weights=("int4",))),
    "int4": (torch.float32, PackingConfig("int4", draft_weights=("int8",))),
}
DRAFTING = {
    "exit": {"strategy": "self-speculative", "exit_layer": 3},
    "block": {"strategy": "self-speculative", "exit_layer": 2},
    "fed block": {"strategy": "self-speculative", "exit_layer": 4},
    "copy": {"strategy": "self-speculative", "exit_layer": 6, "draft_weights": "int8"},
    "exit of a copy": {"strategy": "self-speculative", "exit_layer": 1, "draft_weights": "int8"},
    "adaptive": {"strategy": "adaptive", "exits": (2, 4, 5)},
    "skipping": {"strategy": "draft-and-verify", "skip": (3, 4)},
    "skipping a copy": {"strategy": "draft-and-verify", "skip": (2, 5), "draft_weights": "int8"},
    "mtp": {"strategy": "mtp"},
    "eagle3": {"strategy": "eagle3"},
    "lookup": {"strategy": "lookup"},
}
# Whose layers others have
MIXERS = [name for name in ALL_MIXERS if name not in ("bamba", "qwen3_5_moe_text")]
RECURRENT = [name for name in MIXERS if name != "gpt_oss"]
TYPES = [*MIXERS, "gemma4_text"]  # whose layers read tokens, and keys of others
PLAIN = DecodingConfig("autoregressive", max_new_tokens=40)


@cache
def backend_of(model_type, precision="fp32"):
    dtype, packing = PRECISIONS[precision]
    model = tiny_model(model_type, dtype, **SHAPE)
    blocks = random_blocks(model, ExitBlock(2), ExitBlock(4))
    if model_type in MIXERS:
        blocks = replace(
            blocks, eagle3=random_eagle3(ModelSpec.of(model.config)), mtp=random_blocks(model, MTP)
        )
    return native_or_skip(model, packing, stored_drafters=blocks)


def drafting(name, precision="fp32", drafts=4, **options):
    settings = dict(DRAFTING[name])
    if settings.get("draft_weights") and precision == "int8":
        settings["draft_weights"] = "int4"
    return DecodingConfig(num_draft_tokens=drafts, max_new_tokens=40, **settings, **options)


@cache
def plainly(model_type, precision, length):
    return ids_of(decode(backend_of(model_type, precision), prompt_of(length), PLAIN))


def together(backend, prompts, config):
    return [answer.ids for answer in decode_batch(backend, prompts, config)]


CELLS = [
    *((kind, "fp32") for kind in TYPES),
    *product(("qwen3_5_text", "gemma4_text"), ("bf16", "int8", "int4")),
]
UNSUITED = [("gemma4_text", "eagle3"), ("gemma4_text", "mtp")]


@pytest.mark.parametrize(
    "model_type, precision, name",
    [(*cell, name) for cell, name in product(CELLS, DRAFTING) if (cell[0], name) not in UNSUITED],
)
def test_drafts_change_nothing(model_type, precision, name):
    """Of one prompt, whose draft is one call, and of rows, some of which draft while others
    begin.
    """
    backend = backend_of(model_type, precision)
    lengths = (1, 9, 70)
    expected = [plainly(model_type, precision, length) for length in lengths]
    decodings = [
        decode(backend, prompt_of(length), drafting(name, precision, drafts))
        for length, drafts in zip(lengths, (6, 1, 6), strict=True)
    ]
    assert list(map(ids_of, decodings)) == expected
    assert all(decoding.stats.drafted for decoding in decodings) or name == "lookup"
    assert together(backend, list(map(prompt_of, lengths)), drafting(name, precision)) == expected


@pytest.mark.parametrize("model_type", TYPES)
def test_a_draft_model_too(model_type):
    """Of the same weights: all of its drafts are right, unless its state went wrong."""
    backend = native_or_skip(tiny_model(model_type, torch.float32, **SHAPE))
    backend.draft_model = native_or_skip(tiny_model(model_type, torch.float32, **SHAPE))
    lengths = (1, 9, 70)
    config = DecodingConfig("draft-model", num_draft_tokens=4, max_new_tokens=40)
    prompts = list(map(prompt_of, lengths))
    expected = [ids_of(decode(backend, prompt, PLAIN)) for prompt in prompts]
    assert together(backend, prompts, config) == expected
    for prompt, ids in zip(prompts, expected, strict=True):
        decoding = decode(backend, prompt, config)
        assert ids_of(decoding) == ids and decoding.stats.accepted == decoding.stats.drafted > 0


@pytest.mark.parametrize("name", ["exit", "copy", "adaptive"])
@pytest.mark.parametrize("model_type", TYPES)
def test_rows_join_leave_and_run_again_in_pieces(model_type, name):
    backend = backend_of(model_type)
    config = drafting(name)
    lengths = (20, 3, 50, 31)
    scheduler = Scheduler(backend, max_prefill_tokens=7)
    rows = [new_row(backend, prompt_of(length), config) for length in lengths]
    for turn in range(200):
        if turn in (0, 2, 5, 8):
            scheduler.add(rows[(0, 2, 5, 8).index(turn)])
        if turn == 7 and rows[1] in scheduler.running:
            scheduler.preempt(rows[1])
        without_failure(scheduler.step())
    assert [row.output for row in rows] == [
        plainly(model_type, "fp32", length) for length in lengths
    ]


@pytest.mark.parametrize(
    "name", ["plain", "exit", "copy", "adaptive", "mtp", "eagle3", "depth per token", "early exit"]
)
@pytest.mark.parametrize("model_type", MIXERS)
def test_a_text_goes_on_from_its_end(model_type, name):
    """Or from the token before, for drafters that need its last token once more."""
    own = {
        "plain": {"strategy": "autoregressive"},
        "early exit": {"strategy": "early-exit", "exit_layer": 3},
    }
    own["depth per token"] = {"strategy": "early-exit", "exits": (3, 5), "exit_confidence": 0.1}
    config = drafting(name) if name in DRAFTING else DecodingConfig(max_new_tokens=40, **own[name])
    config = replace(config, max_new_tokens=12)
    backend = backend_of(model_type)
    outputs, reused, last = conversation(backend, config, of_turns())
    expected, _, fresh = conversation(backend, config, NO_PREFIXES)
    assert outputs == expected
    known = {
        "adaptive": (19, 116),
        "mtp": (19, 116),
        "eagle3": (19, 116),
        "depth per token": (9, 106),
    }
    assert reused == [0, *known.get(name, (20, 117))]
    (last, held), (_, wanted) = last, fresh
    stop = len(last.rows[0].ids) - 1
    if name in ("plain", "copy"):
        assert torch.equal(entries(held)[:2, ..., :stop, :], entries(wanted)[:2, ..., :stop, :])


@pytest.mark.parametrize("model_type", TYPES)
def test_a_text_that_differs_begins_anew(model_type):
    backend = backend_of(model_type)
    prefixes = Prefixes(1 << 30)
    first = prompt_of(70)
    config = drafting("exit")
    assert ids_of(decode(backend, first, config, prefixes=prefixes)) == plainly(
        model_type, "fp32", 70
    )
    for prompt in ([*first[:-1], 3], first, [*first, 3, 4]):
        decoding = decode(backend, prompt, config, prefixes=prefixes)
        assert ids_of(decoding) == ids_of(decode(backend, prompt, PLAIN))


@pytest.mark.parametrize("model_type", RECURRENT)
def test_memories_count_as_pages(model_type):
    backend = backend_of(model_type)
    pool = backend._pool
    before = backend._pool.used
    cache = backend.new_cache(2)
    held = pool.pages_of_memory(9 + backend.spec.recurrence.kernel_size - 1)
    pool.most = before + 5 + 2 * held
    assert cache.free_pages([1, PAGE + 1]) == 2
    pool.most = inf
    logits_of(backend, torch.tensor([prompt_of(5), prompt_of(5, 1)]))
    assert pool.used == before
    with torch.inference_mode():
        backend.run_layers(backend.embed(torch.tensor([[3], [4]])), 0, 6, cache.span(0, 1))
    assert pool.used - before == 2 + 2 * held and len(cache.memory) == 4
    branch = cache.branch([0, 0], [1, 1])
    assert pool.used - before == 4 + 4 * held
    pool.most = pool.used
    with pytest.raises(LayerSkipError, match="the memory for keys and values is full"):
        cache.branch([0], [1])
    del cache, branch
    pool.most = inf
    assert pool.used == before


@pytest.mark.parametrize("drafts", [6, 32])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_an_answer_ends_where_the_memory_does(model_type, drafts):
    """A text's memory has a slot for each draft of a round."""
    backend = backend_of(model_type)
    config = replace(drafting("lookup", ignore_eos=True), num_draft_tokens=drafts)
    config = replace(config, max_new_tokens=1000)
    pool = backend._pool
    pool.most = pool.used + pool.pages_of_memory(drafts + backend.spec.recurrence.kernel_size) + 1
    try:
        loop = decode(backend, prompt_of(10), config)
        ids = ids_of(loop)
        assert len(ids) == PAGE - 10 and loop.rows[0].scanner.num_tokens_left == 0
        assert backend.context_length(
            drafts
        ) == PAGE and backend.context_length() == backend.context_length(32)
    finally:
        pool.most = inf
    assert ids == ids_of(decode(backend, prompt_of(10), replace(config, max_new_tokens=PAGE - 10)))


@pytest.mark.parametrize("model_type", RECURRENT)
def test_freed_pages_make_room_for_memories(model_type):
    """What is allocated stays within the limit, whatever pages were in use before."""
    backend = backend_of(model_type)
    pool = backend._pool
    rows = 3
    pool.most = pool.used + 3 * pool.pages_of_memory(backend.new_cache()._slots) + 12
    try:
        tokens = PAGE * 3
        most = 0
        cache = backend.new_cache(rows)
        with torch.inference_mode():
            hidden = backend.embed(torch.tensor([prompt_of(tokens)] * rows))
            backend.run_layers(hidden, 0, 6, cache.span(0, tokens, no_rollback=True))
            assert pool.allocated == pool.used > 9
            del cache
            held = [backend.new_cache() for _ in range(50)]
            for each in held:
                if each.free_pages([1]) < 0:
                    break
                backend.run_layers(backend.embed(torch.tensor([[3]])), 0, 6, each.span(0, 1))
                most = max(most, pool.allocated)
        assert pool.most - pool.pages_of_memory(each._slots) - 1 <= most <= pool.most
        del held, each
    finally:
        pool.most = inf
    assert pool.allocated == pool.used


def served(model_type):
    shape = {**SHAPE, "vocab_size": 300, "max_position_embeddings": 512}
    backend = native_or_skip(
        tiny_model(model_type, torch.float32, **shape), PackingConfig(draft_weights=("int8",))
    )
    return replace(tiny_loaded(), backend=backend)


@pytest.mark.parametrize("name", ["lookup", "adaptive", "copy"])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_served_prompts_that_begin_alike_share_states(model_type, name):
    """A prompt leaves a state where it leaves an earlier one, and one at its end. The oldest states
    go first.
    """
    decoder = served(model_type)
    config = replace(drafting(name, ignore_eos=True), max_new_tokens=9)
    first, second, third, fourth = (
        [*prompt_of(290, 1, 300), *prompt_of(length, length, 300)] for length in (9, 2, 70, 20)
    )
    prefixes = Prefixes(1 << 30)

    def reused(prompt):
        told = []
        scheduler = Dispatcher(decoder, 2, prefixes=prefixes)
        scheduler.add(request := Request(prompt, config, told.append))
        while scheduler.held:
            scheduler.step()
        assert (
            "".join(update.text for update in told)
            == TextStream(decoder, prompt, config).finish().text
        )
        return request.reused

    assert [reused(prompt) for prompt in (first, second, third, first, [*third, 7], fourth)] == [
        0,
        0,
        290,
        298,
        360,
        290,
    ]
    assert prefixes.bytes > 3 * sum(decoder.backend._pool.memory[:2])
    prefixes._most_bytes = prefixes.bytes
    for seed in range(3):
        assert reused(prompt_of(300, seed + 5, 300)) == 0 and prefixes.bytes <= prefixes._most_bytes
    assert reused(first) == 0


@pytest.mark.parametrize("name", ["adaptive", "copy"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_full_pool_loses_nothing(model_type, name):
    """Requests wait, or run again after they were set aside, and kept texts go."""
    decoder = served(model_type)
    config = replace(drafting(name, ignore_eos=True), max_new_tokens=90)
    backend = decoder.backend
    prompts = [prompt_of(length, length, 300) for length in (200, 3, 40, 9, 120, 64, 5, 30)]
    expected = [TextStream(decoder, prompt, config).finish().text for prompt in prompts]
    told = [[] for _ in prompts]
    pool = backend._pool
    prefixes = Prefixes(1 << 30)
    waited = 0
    pool.most = 4 * pool.pages_of_memory(14) + 12
    scheduler = Dispatcher(decoder, 8, prefixes=prefixes)
    for prompt, updates in zip(prompts, told, strict=True):
        scheduler.add(Request(prompt, config, updates.append))
    while scheduler.held:
        scheduler.step()
        waited = max(waited, sum(bool(row.output) for row in scheduler._scheduler.waiting))
        assert pool.used <= pool.most
    assert waited and ["".join(update.text for update in updates) for updates in told] == expected
    while prefixes.drop():
        pass
    assert pool.used == 0


@pytest.mark.parametrize("model_type", [name for name in MIXERS if name in DENSE_MIXERS])
def test_low_bits_are_those_of_the_weights(model_type):
    """int4 near the model with the rounded weights in fp32: what differs is the rounding of
    activations, which changes the choice of experts, so no model has any. Stored int4 too.
    """
    ids = torch.tensor([prompt_of(30)])
    shape = {**SHAPE, "tie_word_embeddings": False}
    rounded = tiny_model(model_type, torch.float32, **shape)
    spec = ModelSpec.of(rounded.config)
    others = (spec.embedding_name, *spec.architecture.mixer.steps)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if weight.dim() == 2 and not any(part in name for part in others):
                weight.copy_(int4_of(weight).weight)
    expected = logits_of(native_or_skip(rounded), ids)
    actual = logits_of(
        native_or_skip(tiny_model(model_type, torch.float32, **shape), PackingConfig("int4")), ids
    )
    assert (actual - expected).std() < 0.1 * expected.std()
    model = tiny_model(model_type, torch.float32, **shape)
    levels = {
        name: int4_bytes(int4_of(model.get_parameter(name).detach())) for name in matrix_names(spec)
    }
    assert torch.equal(
        logits_of(NativeBackend.of(model, PackingConfig("int4"), None, levels.get), ids), actual
    )
