"""Random settings on tiny models: drafting, batches, joins and kept prefixes must not change any row's tokens."""

from dataclasses import replace
from functools import cache
from math import inf

import pytest
import torch
from attacking import examples
from conftest import tiny_model
from decodings import answer_of, letters
from exit_block_models import random_blocks
from hypothesis import given
from hypothesis import strategies as st

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import DecodingLoop, Prefixes, decode_batch
from layerskip_core.model import ModelSpec, NativeBackend, TorchBackend, TransformersBackend, can_run_native
from layerskip_core.model.architectures import ARCHITECTURES
from layerskip_core.model.exit_blocks import NO_BLOCKS, ExitBlock

STRATEGIES = ("autoregressive", "early-exit", "self-speculative", "adaptive", "lookup", "draft-and-verify")
KINDS = (
    *("generic", "generic gemma3_text", "packed", "packed mistral", "packed smollm3", "packed qwen2", "packed int8 drafts"),
    *(
        "packed int4 few drafts",
        "native",
        "native bf16",
        "native int8",
        "native int4",
        "native int8 drafts",
        "native few drafts",
        "native gemma2",
        "native gemma3_text",
    ),
    *("native granite", "native olmo3", "native phi3", "native starcoder2", "native qwen3", "native smollm3"),
)
PACKING = {
    "int8": PackingConfig(quantize="int8"),
    "int4": PackingConfig(quantize="int4"),
    "int8 drafts": PackingConfig(draft_weights=("int8",)),
    "int4 few drafts": PackingConfig(draft_weights=("int4",), draft_vocab=40),
    "few drafts": PackingConfig(draft_vocab=30),
}
COUNTS = ("prompt_tokens", "new_tokens", "drafted", "accepted", "rounds", "tested_by_position", "accepted_by_position")


@cache
def model_of(kind, exits, feature, scale):
    """A model of six layers, with exit blocks at `exits`."""
    backend, _, rest = kind.partition(" ")
    architecture = rest if rest in ARCHITECTURES else "llama"
    changes = {"sliding_window": 5} if architecture in ("mistral", "gemma3_text") else {}
    dtype = {"bf16": torch.bfloat16, "int4": torch.bfloat16}.get(rest, torch.float32 if backend == "native" else torch.float64)
    if backend == "native" or rest in PACKING:
        changes = {"intermediate_size": 64, "hidden_size": 64}
    model, packing = tiny_model(architecture, dtype, **changes), PACKING.get(rest)
    blocks = random_blocks(model, *(ExitBlock(exit, feature) for exit in exits), scale=scale) if exits else NO_BLOCKS
    if backend == "generic":
        return TransformersBackend(model, blocks)
    if backend == "packed":
        return TorchBackend.of(model, packing, exit_blocks=blocks)
    if not can_run_native(ModelSpec.of(model.config), dtype, torch.device("cpu"), packing):
        pytest.skip("no compiled kernels here")
    return NativeBackend.of(model, packing, exit_blocks=blocks)


@st.composite
def models(draw, kind):
    exits = draw(st.sampled_from([(), (), (1,), (2, 4), (1, 3, 5)]))
    return model_of(kind, exits, draw(st.sampled_from(["none", "final"])), draw(st.sampled_from([0.05, 0.3, 2.0])))


def answering_exits(model):
    """The exits that can answer: not those whose blocks read the target's final states."""
    only_drafting = {exit_layer for exit_layer, block in model.exit_blocks.items() if block.is_fed}
    return [exit_layer for exit_layer in range(1, model.num_layers + 1) if exit_layer not in only_drafting]


@st.composite
def configs(draw, model, known):
    """`known`: tokens of an answer, some of which become stop strings."""
    strategy = draw(st.sampled_from(STRATEGIES))
    drafts = strategy not in ("autoregressive", "early-exit")
    layers = st.integers(1, model.num_layers - 1)
    places = draw(st.lists(st.integers(0, 17), max_size=2))
    any_exits = tuple(sorted(draw(st.sets(layers, max_size=3))))
    return DecodingConfig(
        strategy,
        draw(layers if drafts else st.sampled_from(answering_exits(model))),
        draw(st.integers(1, 9)),
        draw(st.sampled_from([12, 30, 5, 2, 1, 500])),
        draw(st.sampled_from([0.0, 0.07, 0.12, 0.99])) if strategy in ("self-speculative", "draft-and-verify") else 0.0,
        tuple(letters(known[place : place + 2]) for place in places),
        draw(st.sampled_from(list(model.draft_sides))) if strategy in ("self-speculative", "draft-and-verify") else None,
        lookup=draw(st.sampled_from([0, 0, 1, 2, 5])) if drafts else 0,
        temperature=draw(st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 40])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.1])),
        seed=draw(st.integers(0, 999)),
        exits=(tuple(model.exit_blocks) or any_exits) if strategy == "adaptive" else (),
        skip=tuple(draw(st.sets(layers, min_size=1, max_size=4))) if strategy == "draft-and-verify" else (),
    )


@pytest.mark.parametrize("kind", KINDS)
@examples(4)
@given(data=st.data())
def test_drafts_batches_and_joins_change_no_tokens(kind, data):
    model = data.draw(models(kind))
    prompts = data.draw(st.lists(st.lists(st.integers(3, 66), min_size=1, max_size=14), min_size=1, max_size=4))
    known = answer_of(model, prompts[0], DecodingConfig("autoregressive", max_new_tokens=20), frozenset())[0]
    config = data.draw(configs(model, known))
    ends = frozenset(data.draw(st.lists(st.sampled_from(known), max_size=2)))
    single = [answer_of(model, prompt, config, ends) for prompt in prompts]
    for prompt, (ids, reason, stats) in zip(prompts, single, strict=True):
        require_consistent(model, len(prompt), config, ids, reason, stats)
    drafts, sampled = config.strategy not in ("autoregressive", "early-exit"), config.temperature > 0
    if drafts and not sampled:
        plain = DecodingConfig("autoregressive", None, 1, config.max_new_tokens, 0.0, config.stop)
        for prompt, answer in zip(prompts, single, strict=True):
            assert answer[:2] == answer_of(model, prompt, plain, ends)[:2]
            assert answer[:2] == answer_of(model, prompt, config, ends, reuse_exit_states=False)[:2]
    require_prefixes_to_change_nothing(model, prompts, config, ends)
    if sampled and drafts:  # the other rows of a batch limit the number of drafts, and so the draws
        return
    assert joined(data, model, prompts, config, ends) == [ids for ids, _, _ in single]
    same_drafts = config.strategy != "adaptive" and (not config.lookup or config.strategy == "lookup")
    near_the_end = any(reason == "context" for _, reason, _ in single)  # there, the longest row limits the drafts
    for output in decode_batch(model, prompts, config, ends, letters):
        ids, reason, stats = single[output.row]
        assert (output.ids, output.finish_reason) == (ids, reason)
        for name in COUNTS if same_drafts and not near_the_end else ():
            assert getattr(output.stats, name) == getattr(stats, name), name


def require_consistent(model, prompt_tokens, config, ids, reason, stats):
    """The counts of one output do not contradict each other."""
    assert (stats.prompt_tokens, stats.new_tokens) == (prompt_tokens, len(ids))
    assert 0 <= stats.accepted <= stats.drafted and stats.accepted < max(1, len(ids))
    assert sum(count for source, count in stats.steps_by_drafter.items() if source != "plain") == stats.rounds
    assert sum(stats.accepted_by_position) == stats.accepted and stats.rounds <= stats.drafted
    room = min(config.max_new_tokens, model.spec.context - prompt_tokens)
    assert len(ids) <= room
    assert (reason in ("length", "context")) == (len(ids) == room and reason not in ("eos", "stop"))
    assert all(0 <= token < model.spec.vocab for token in ids)
    if config.strategy == "adaptive" and reason == "length":  # a token of the prefill, and one of each step
        assert sum(stats.steps_by_drafter.values()) + stats.accepted == len(ids) - 1


def require_prefixes_to_change_nothing(model, prompts, config, ends):
    """Texts one after another, each beginning with a part of the one before, as the turns of a conversation do."""
    kept, text = Prefixes(inf, 2, 1), prompts[0]
    for more in (*prompts[1:], prompts[0]):
        expected = answer_of(model, text, config, ends)[0]
        ids = answer_of(model, text, config, ends, prefixes=kept)[0]
        assert ids == expected
        longer = [*text, *ids, *more]
        text = longer if len(longer) < model.spec.context // 2 else text[: len(more)]


def joined(data, model, prompts, config, ends):
    """The outputs of prompts of which each joins the others after some of their steps."""
    outputs = [[] for _ in prompts]
    owners, running = {}, None
    for index, prompt in enumerate(prompts):
        loop = DecodingLoop(model, [prompt], config, ends, letters)
        (step,) = next(loop)
        outputs[index] += step.ids
        if step.finish_reason is None:
            if running is None or not owners:
                running, row = loop, step.row
            else:
                (row,) = running.join(loop)
            owners[row] = index
        steps = 1000 if index == len(prompts) - 1 else data.draw(st.integers(0, 3))
        while owners and steps > 0:
            steps -= 1
            for step in next(running):
                outputs[owners[step.row]] += step.ids
                if step.finish_reason is not None:
                    del owners[step.row]
    return outputs


@pytest.mark.parametrize("kind", ["generic", "packed", "native", "native bf16"])
@examples(2)
@given(data=st.data())
def test_depth_by_confidence_is_between_early_exit_and_plain_decoding(kind, data):
    """Where no exit is ever confident it equals plain decoding; where the first always is, early exit at that one."""
    model = data.draw(models(kind))
    prompt = data.draw(st.lists(st.integers(3, 66), min_size=1, max_size=14))
    exits = tuple(sorted(data.draw(st.sets(st.sampled_from(answering_exits(model)[:-1]), min_size=1))))
    plain = DecodingConfig("autoregressive", max_new_tokens=data.draw(st.sampled_from([1, 12, 30])))
    early = replace(plain, strategy="early-exit", exit_layer=exits[0])
    for confidence, same in ((1.0, plain), (5e-324, early), (data.draw(st.floats(0.01, 0.99)), None)):
        config = replace(early, exit_layer=None, exits=exits, exit_confidence=confidence)
        ids, reason, stats = answer_of(model, prompt, config, frozenset())
        require_consistent(model, len(prompt), config, ids, reason, stats)
        assert sum(stats.tokens_by_layers) == len(ids) and len(stats.tokens_by_layers) <= model.num_layers
        assert same is None or (ids, reason) == answer_of(model, prompt, same, frozenset())[:2]
