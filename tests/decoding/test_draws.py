"""A sample depends on its prompt, its options and its seed alone: drafts, batches and pre-emption
change no token.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from decodings import WIDE, backend_on, ids_of, prompt_of, stepwise

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import (
    DecodingLoop,
    decode,
    decode_batch,
)
from layerskip_core.decoding.drafters import Draft, DrafterSetup
from layerskip_core.decoding.drafters.adaptive import AdaptiveDrafter
from layerskip_core.decoding.drafters.submodel import SubmodelDrafter
from layerskip_core.model import DraftEnds, Submodel

NEW = 40
DRAFTING = {
    **{
        f"exit, {count}": {
            "strategy": "self-speculative",
            "exit_layer": 4,
            "num_draft_tokens": count,
        }
        for count in (1, 2, 3, 7)
    },
    "copy": {
        "strategy": "self-speculative",
        "exit_layer": 3,
        "num_draft_tokens": 5,
        "draft_weights": "int8",
    },
    "whole copy": {
        "strategy": "self-speculative",
        "exit_layer": 6,
        "num_draft_tokens": 5,
        "draft_weights": "int8",
    },
    "skipping": {"strategy": "draft-and-verify", "skip": (3, 5), "num_draft_tokens": 4},
    "lookup": {"strategy": "lookup", "num_draft_tokens": 8},
    "exit and lookup": {
        "strategy": "self-speculative",
        "exit_layer": 4,
        "num_draft_tokens": 6,
        "lookup": 2,
    },
    "adaptive": {"strategy": "adaptive", "exits": (2, 5), "num_draft_tokens": 8},
}
SAMPLING = {
    "warm": {"temperature": 0.6},
    "hot": {"temperature": 1.5},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k": {"temperature": 1.2, "top_k": 6, "min_p": 0.02},
    "penalties": {"temperature": 0.9, "frequency_penalty": 0.7, "logit_bias": ((9, 2.0),)},
}


@cache
def backend_of(kind):
    """In fp64 without our kernels: rounding there is far below any difference between scores."""
    return backend_on(kind, PackingConfig(draft_weights=("int8",), draft_vocab=40), **WIDE)


@pytest.mark.parametrize(
    "kind, sampling",
    [
        *(("native", sampling) for sampling in SAMPLING),
        ("generic", "top-k"),
        ("generic", "penalties"),
    ],
)
def test_every_drafter_gives_the_sample_of_plain_decoding(kind, sampling):
    backend = backend_of(kind)
    # The kernels draw in C; layers of transformers, which are slow, only have the loop in common
    length, seeds = (NEW, (0, 1, 2**63)) if kind == "native" else (14, (0, 2**63))
    plain = DecodingConfig("autoregressive", max_new_tokens=length, **SAMPLING[sampling])
    prompt = [*prompt_of(9), *prompt_of(9)]  # something to look up
    expected = {seed: ids_of(decode(backend, prompt, replace(plain, seed=seed))) for seed in seeds}
    assert len({*map(tuple, expected.values())}) == len(seeds)
    for name, drafting in DRAFTING.items():
        if kind == "generic" and "draft_weights" in drafting:
            continue  # has no copy
        accepted = 0
        for seed, ids in expected.items():
            decoding = decode(backend, prompt, replace(plain, seed=seed, **drafting))
            assert ids_of(decoding) == ids, (name, seed)
            accepted += decoding.stats.accepted
        assert accepted or name == "lookup" or kind == "generic", name


@pytest.mark.parametrize("kind", ["generic", "native"])
@pytest.mark.parametrize("strategy", ["exit, 3", "whole copy", "lookup", "adaptive"])
def test_rows_of_a_batch_get_their_own_samples(kind, strategy):
    if kind == "generic" and strategy == "whole copy":
        pytest.skip("has no copy")
    backend = backend_of(kind)
    seeds = [5, 6, 5, 7]
    config = DecodingConfig(max_new_tokens=25, temperature=1.0, **DRAFTING[strategy])
    prompts = [prompt_of(9), prompt_of(30), prompt_of(9), prompt_of(3)]
    expected = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        expected.append(
            ids_of(decode(backend, prompt, replace(config, strategy="autoregressive", seed=seed)))
        )
    found = decode_batch(backend, prompts, config, seeds=seeds)
    assert [answer.ids for answer in found] == expected
    assert expected[0] == expected[2] != expected[1]


def test_the_rest_of_an_answer_is_the_sample_of_its_beginning_as_a_prompt():
    """Noise belongs to positions of the text: an answer that was cut by its limit goes on as it
    would have.
    """
    backend = backend_of("native")
    config = DecodingConfig("autoregressive", max_new_tokens=NEW, temperature=1.2, seed=11)
    whole = ids_of(decode(backend, prompt_of(9), config))
    begun = [*prompt_of(9), *whole[:17]]
    assert ids_of(decode(backend, begun, replace(config, max_new_tokens=NEW - 17))) == whole[17:]


@pytest.mark.parametrize("lengths", [[0], [3], [5, 0, 1], [1, 2, 3, 4]])
def test_drafts_of_any_length_and_quality_change_no_sample(lengths):
    """Right ones, wrong ones, and none, as a full pool of a draft model or a new bandit would
    change them.
    """
    backend = backend_of("native")
    plain = DecodingConfig("autoregressive", max_new_tokens=NEW, temperature=1.0, seed=4)
    expected = ids_of(decode(backend, prompt_of(9), plain))

    class Drafter:
        rounds = 0

        def draft(self, context, limits):
            [ids], count = context.ids, min(lengths[self.rounds % len(lengths)], limits[0])
            done = len(ids) - 9
            drafts = expected[done : done + count]
            if self.rounds % 2 and drafts:
                drafts[-1] ^= 1
            self.rounds += 1
            return Draft(torch.tensor([ids[-1], *drafts]), (len(drafts),))

        def observe(self, row, drafted, verified):
            pass

    config = replace(plain, strategy="self-speculative", exit_layer=3)
    decoding = DecodingLoop(backend, [prompt_of(9)], config, drafter=Drafter())
    assert ids_of(decoding) == expected
    assert decoding.stats.accepted or lengths == [0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("layers", [3, 6])
def test_a_draft_in_one_call_is_that_of_single_steps(temperature, layers):
    """With the same probabilities, of scores with noise, by which drafts end."""
    backend = backend_of("native")
    prompt = [*prompt_of(9), *prompt_of(9)]
    weights = "int8" if layers == 6 else None
    drafting = {"exit_layer": layers, "num_draft_tokens": 6, "draft_weights": weights}
    for seed in range(6):
        config = DecodingConfig(
            "self-speculative", temperature=temperature, seed=seed, max_new_tokens=20, **drafting
        )
        drafter = SubmodelDrafter(DrafterSetup(backend, config), weights, Submodel(layers))
        loop = DecodingLoop(backend, [prompt], config)
        made = []
        next(loop)

        def both(context, limits, drafter=drafter, made=made):
            ends = DraftEnds(survival=0.3)
            made.append(drafter.draft(context, limits, ends))
            made.append(stepwise(drafter, context, limits, ends))
            return made[-1]

        loop.engine.drafter = type(
            "Both", (), {"draft": staticmethod(both), "observe": lambda *_: None}
        )()
        ids_of(loop)
        for one, other in zip(made[::2], made[1::2], strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert list(one.confidence) == pytest.approx(list(other.confidence), rel=1e-4)
        assert len({draft.counts for draft in made}) > 1


def test_sampled_adaptive_drafting_measures_times():
    """As greedy drafting does on batch-invariant kernels, because a choice of drafts cannot change
    a sample.
    """
    config = DecodingConfig(max_new_tokens=NEW, temperature=0.7, **DRAFTING["adaptive"])
    loop = decode(backend_of("native"), prompt_of(9), config)
    ids_of(loop)
    assert (
        isinstance(loop.engine.drafter, AdaptiveDrafter)
        and loop.engine.drafter.bandit.passes.is_measured
    )
