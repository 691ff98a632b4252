"""A prompt that begins like the text before starts at the first difference, and nothing else
changes.
"""

from dataclasses import replace
from functools import cache
from itertools import islice
from math import inf

import pytest
import torch
from conftest import tiny_model
from decodings import WIDE, answer_of, entries, ids_of, letters, native_or_skip, prompt_of
from exit_block_models import random_blocks, random_eagle3

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import (
    DecodingLoop,
    Prefixes,
    Scheduler,
    decode,
    new_row,
    without_failure,
)
from layerskip_core.decoding.prefixes import NO_PREFIXES
from layerskip_core.model import ModelSpec, TorchBackend, TransformersBackend
from layerskip_core.model.exit_blocks import NO_STORED_DRAFTERS, ExitBlock

SHAPE = {**WIDE, "max_position_embeddings": 256}
STRATEGIES = {
    "autoregressive": {"strategy": "autoregressive"},
    "exit": {"strategy": "self-speculative", "exit_layer": 3, "num_draft_tokens": 4},
    "copy": {
        "strategy": "self-speculative",
        "exit_layer": 6,
        "num_draft_tokens": 4,
        "draft_weights": "int8",
    },
    "adaptive": {"strategy": "adaptive", "exits": (2, 4), "num_draft_tokens": 4},
    "skipping": {"strategy": "draft-and-verify", "skip": (3, 4), "num_draft_tokens": 4},
    "early exit": {"strategy": "early-exit", "exit_layer": 3},
    "depth per token": {"strategy": "early-exit", "exits": (2, 4), "exit_confidence": 0.1},
    "sampled": {"strategy": "self-speculative", "exit_layer": 3, "temperature": 0.9, "seed": 4},
}
PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, "int8"),
}


def settings_of(name, limit=12):
    return DecodingConfig(max_new_tokens=limit, **STRATEGIES[name])


@cache
def native(precision="fp32", model_type="llama", **changes):
    dtype, quantize = PRECISIONS[precision]
    packing = PackingConfig(quantize) if quantize else PackingConfig(draft_weights=("int8",))
    return native_or_skip(tiny_model(model_type, dtype, **SHAPE, **changes), packing)


def of_turns():
    return Prefixes(inf, most_texts=2, least=1)


def conversation(backend, config, prefixes):
    """Three turns, each the text so far and new tokens. Returns ids, the tokens reused, and the
    last decoding and its cache.
    """
    text = prompt_of(9)
    outputs = []
    reused = []
    last = None
    for turn in range(3):
        decoding = decode(backend, text, config, prefixes=prefixes)
        last = decoding, decoding.engine.cache  # a loop drops it at its end
        outputs.append(ids_of(decoding))
        reused.append(decoding.reused_tokens)
        # A long one, so that tiled kernels run too
        text = [*text, *outputs[-1], *prompt_of(5 + 80 * (turn == 0), turn)]
    return outputs, reused, last


def keys_and_values(decoding, cache):
    """By layer and position: those of the whole text, or of the prompt alone where tokens leave at
    different depths.
    """
    [row] = decoding.rows
    if (blocks := decoding.engine.target.block_writer) is not None:
        blocks.write(cache, [row.num_computed_tokens])
    stop = (
        len(row.ids) - 1 if decoding.engine.target.decodes_like_prefill else row.num_prompt_tokens
    )
    return entries(cache)[..., :stop, :]


def assert_same_bits(backend, config, layers=None):
    outputs, reused, last = conversation(backend, config, of_turns())
    expected, none, fresh = conversation(backend, config, NO_PREFIXES)
    assert outputs == expected and none == [0, 0, 0]
    assert reused[0] == 0 and 0 < reused[1] < reused[2]
    assert torch.equal(keys_and_values(*last)[:layers], keys_and_values(*fresh)[:layers])
    return reused


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_turns_have_the_bits_of_whole_prefills(strategy):
    reused = assert_same_bits(
        native(), settings_of(strategy), 3 if strategy == "early exit" else None
    )
    # All but the last token of a text are known, or only its prompt where tokens left at different
    # depths.
    assert reused == ([0, 9, 106] if strategy == "depth per token" else [0, 20, 117])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_so_in_every_precision_and_with_windows(precision, kind):
    windows = {"sliding_window": 5} if kind == "gemma3_text" else {}
    assert_same_bits(native(precision, kind, **windows), settings_of("exit"))


@pytest.mark.parametrize("strategy", ["adaptive", "exit 2", "exit 4"])
def test_exit_blocks_go_on_too(strategy):
    """Their keys and values come from the target's states."""
    model = tiny_model("llama", torch.float32, **SHAPE)
    blocks = random_blocks(model, ExitBlock(2), ExitBlock(4))
    backend = native_or_skip(model, PackingConfig(), stored_drafters=blocks)
    exit_layer = int(strategy[-1]) if strategy.startswith("exit") else None
    config = (
        DecodingConfig("self-speculative", exit_layer, 3, 12)
        if exit_layer
        else settings_of("adaptive")
    )
    assert assert_same_bits(backend, config, None if strategy == "adaptive" else 6) == [0, 20, 117]


def test_a_stop_string_within_accepted_drafts_ends_the_entries_of_blocks_too():
    """Verified tokens after it are not part of the text that is kept."""
    model = tiny_model("gemma3_text", torch.float64, sliding_window=5)
    backend = TransformersBackend(model, random_blocks(model, ExitBlock(1)))
    plain = DecodingConfig("autoregressive", max_new_tokens=12)
    known = answer_of(backend, [3], plain)[0]
    drafting = DecodingConfig("self-speculative", 1, 2, 12)
    assert answer_of(backend, [3], drafting)[2].accepted > 0
    for length in (1, 2, 3):
        config = replace(drafting, stop=(letters(known[:length]),))
        expected = answer_of(backend, [3], config)[0]
        prefixes = of_turns()
        for _ in range(2):
            assert answer_of(backend, [3], config, prefixes=prefixes)[0] == expected


@pytest.mark.parametrize("kept", ["a conversation", "shared"])
@pytest.mark.parametrize("kind", ["native", "packed"])
def test_a_drafter_keeps_its_entry_of_the_token_that_is_rerun(kind, kept):
    """So it drafts after a known beginning, here of 64 tokens and one that is rerun, what it drafts
    after a whole prefill.
    """
    model = tiny_model("llama", torch.float32, **SHAPE)
    blocks = replace(NO_STORED_DRAFTERS, eagle3=random_eagle3(ModelSpec.of(model.config)))
    backend = (native_or_skip if kind == "native" else TorchBackend.of)(
        model, PackingConfig(), stored_drafters=blocks
    )
    config = DecodingConfig("eagle3", None, 3, 1)
    first = [*prompt_of(65), 5, 6]

    def of_drafter(**known):
        """Those of the drafter for the first 65 tokens of a text, in a loop that has taken its
        first step.
        """
        loop = DecodingLoop(backend, [[*first[:65], 7, 8]], config, **known)
        cache = loop.engine.cache
        next(loop)
        return entries(cache)[6, ..., :64, :], loop.reused_tokens

    known = {"prefixes": of_turns() if kept == "a conversation" else Prefixes(1 << 30)}
    list(DecodingLoop(backend, [first], config, **known))
    found, reused = of_drafter(**known)
    assert reused == 64
    torch.testing.assert_close(found, of_drafter()[0])


@pytest.mark.parametrize(
    "prompt, reused",
    [
        (lambda text: text, 19),  # known but for its last token, which gives the next
        (lambda text: text[:20], 19),
        (lambda text: text[:7], 6),
        (lambda text: [*text[:13], 66, *text[14:]], 13),
        (lambda text: [66, *text[1:]], 0),
        (lambda text: [*text, 5, 6, 7], 20),
        (lambda text: text[:1], 0),
    ],
)
def test_a_prompt_starts_at_the_first_difference(prompt, reused):
    backend = native()
    config = settings_of("exit")
    prefixes = of_turns()
    first = prompt_of(9)
    text = [*first, *ids_of(decode(backend, first, config, prefixes=prefixes))]
    assert text[13] != 66 and len(text) == 21
    following = prompt(text[:20] if reused == 19 else text)
    decoding = decode(backend, following, config, prefixes=prefixes)
    assert ids_of(decoding) == ids_of(decode(backend, following, config))
    assert decoding.reused_tokens == reused


def test_an_answer_that_is_left_is_kept_as_far_as_it_came():
    backend = native()
    config = settings_of("exit", 30)
    prefixes = of_turns()
    decoding = decode(backend, prompt_of(9), config, prefixes=prefixes)
    came = ids_of(islice(decoding, 3))
    decoding.keep_texts()
    assert 3 <= len(came) < 30
    text = [*prompt_of(9), *came, 5, 6]
    going_on = decode(backend, text, config, prefixes=prefixes)
    assert ids_of(going_on) == ids_of(decode(backend, text, config))
    assert going_on.reused_tokens == 9 + len(came) - 1


def test_a_text_that_is_given_up_while_it_runs_again_is_not_kept():
    backend = native()
    config = settings_of("exit", 30)
    shared = Prefixes(1 << 30)
    scheduler = Scheduler(backend, max_prefill_tokens=70, prefixes=shared)
    row = new_row(backend, prompt_of(200), config)
    scheduler.add(row)
    for _ in range(6):
        without_failure(scheduler.step())
    text = [*row.ids, 5]
    assert row.output
    scheduler.preempt(row)
    while shared.drop():
        pass
    without_failure(scheduler.step())
    assert scheduler.remove(row) and scheduler.is_idle
    again = decoded(backend, text, settings_of("exit"), shared)
    assert again.reused_tokens == 0 and ids_of(again) == ids_of(
        decoded(backend, text, settings_of("exit"))
    )


def test_an_interrupted_step_does_no_harm(monkeypatch):
    """In a prefill and in a verification, after some of the layers have written to the cache."""
    backend = native()
    config = settings_of("exit")
    prefixes = of_turns()
    first = prompt_of(9)
    second = [*prompt_of(6), 40, 41, 42]
    ids_of(decode(backend, first, config, prefixes=prefixes))
    original = backend.run_layers
    choose = backend.choose

    def interrupted(hidden, start, stop, places):
        original(hidden, start, stop - 1, places)
        raise KeyboardInterrupt

    def interrupted_choice(step):
        choose(replace(step, end=step.end - 1))
        raise KeyboardInterrupt

    for prompt, steps in ((second, 0), (first, 1)):
        decoding = decode(backend, prompt, config, prefixes=prefixes)
        for _ in range(steps):
            next(decoding)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(backend, "run_layers", interrupted)
            patch.setattr(backend, "choose", interrupted_choice)
            next(decoding)
        for again in (first, second):
            assert ids_of(decode(backend, again, config, prefixes=prefixes)) == ids_of(
                decode(backend, again, config)
            )


def test_other_settings_begin_afresh():
    """A prompt that ran through three layers only lacks keys for those above. Limits and sampling
    change nothing.
    """
    backend = native()
    prefixes = of_turns()
    prompt = prompt_of(9)
    ids_of(decode(backend, prompt, settings_of("early exit"), prefixes=prefixes))
    whole = decode(backend, prompt, settings_of("exit"), prefixes=prefixes)
    assert (
        ids_of(whole) == ids_of(decode(backend, prompt, settings_of("exit")))
        and whole.reused_tokens == 0
    )
    for config in (settings_of("exit", 3), settings_of("exit")):
        assert decode(backend, prompt, config, prefixes=prefixes).reused_tokens == 8
    sampled = DecodingConfig("self-speculative", 3, 4, temperature=0.5)
    assert decode(backend, prompt, sampled, prefixes=prefixes).reused_tokens == 8
    assert decode(native("bf16"), prompt, sampled, prefixes=prefixes).reused_tokens == 0


def decoded(backend, prompt, config, shared=NO_PREFIXES):
    return DecodingLoop(backend, [prompt], config, prefixes=shared)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_texts_with_a_common_beginning_compute_it_once(strategy):
    """Whichever of them came last. Keys and values have the bits of whole prefills."""
    backend = native()
    config = settings_of(strategy)
    shared = Prefixes(1 << 30)
    system = prompt_of(80)
    other = prompt_of(70, 5)
    prompts = [[*system, 3, 4], [*other, 7], [*system, 9, 9, 9], [*other, 8, 5], system]
    reused = []
    for prompt in prompts:
        found = decoded(backend, prompt, config, shared)
        fresh = decoded(backend, prompt, config)
        caches = found.engine.cache, fresh.engine.cache  # a loop drops its cache at its end
        assert ids_of(found) == ids_of(fresh)
        layers = 3 if strategy == "early exit" else None
        assert torch.equal(
            keys_and_values(found, caches[0])[:layers], keys_and_values(fresh, caches[1])[:layers]
        )
        reused.append(found.reused_tokens)
    assert reused == [0, 0, 80, 70, 79]


def test_the_memory_of_shared_texts_is_bounded():
    """The text that was not used for the longest time goes first; one that does not fit at all is
    not kept.
    """
    backend = native()
    config = settings_of("autoregressive", 1)
    prompts = [prompt_of(100, seed) for seed in range(3)]

    shared = Prefixes(1 << 30)
    ids_of(decoded(backend, prompts[0], config, shared))
    one = shared.bytes
    shared = Prefixes(2 * one)
    for number in (0, 1, 0, 2):
        ids_of(decoded(backend, prompts[number], config, shared))
        assert shared.bytes <= 2 * one
    assert [decoded(backend, prompt, config, shared).reused_tokens for prompt in prompts] == [
        99,
        0,
        99,
    ]
    small = Prefixes(one - 1)
    ids_of(decoded(backend, prompts[0], config, small))
    assert small.bytes == 0


def test_exact_weights_reuse_and_share_nothing():
    backend = TorchBackend.of(
        tiny_model("llama", torch.bfloat16, **SHAPE), PackingConfig(exact=True)
    )
    config = settings_of("exit")
    outputs, reused, _ = conversation(backend, config, of_turns())
    assert outputs == conversation(backend, config, NO_PREFIXES)[0] and reused == [0, 0, 0]
    shared = Prefixes(1 << 30)
    for _ in range(2):
        decoding = decoded(backend, prompt_of(80), config, shared)
        assert ids_of(decoding) and decoding.reused_tokens == 0
