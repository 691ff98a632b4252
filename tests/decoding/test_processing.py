"""A row's own options: bias, penalties, least tokens; and log probabilities. With drafts as
without.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import run_texts
from decodings import WIDE, backend_on, ids_of, probabilities, prompt_of
from test_loop import NEW, VOCABULARY, joint_of, p_value_on, random_table

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode, decode_batch, processing

PROMPT = prompt_of(9)
ALL = {
    "frequency_penalty": 0.9, "presence_penalty": 1.1, "repetition_penalty": 1.4, "min_tokens": 12,
    "logit_bias": ((3, 4.0), (11, -100.0), (20, 6.0)),
}  # fmt: skip
DRAFTING = {
    "self-speculative": {"exit_layer": 5, "num_draft_tokens": 4},
    "adaptive": {"exits": (2, 5), "num_draft_tokens": 6},
    "lookup": {"num_draft_tokens": 5},
}


@cache
def model_of(kind):
    return backend_on(kind, PackingConfig(draft_weights=("int8",), draft_vocab=40), **WIDE)


def reference(model, prompt, config, eos=()):
    """One token after the other, from a whole pass each, by the definitions of the options."""
    ids = list(prompt)
    while len(ids) < len(prompt) + config.max_new_tokens:
        hidden = run_texts(model, model.embed(torch.tensor([ids])), 0, model.num_layers)
        logits = model.unembed(hidden)[0, -1].double()
        for token, bias in config.logit_bias:
            logits[token] += bias
        output = ids[len(prompt) :]
        for token in set(ids):
            logits[token] *= config.repetition_penalty ** (1 if logits[token] < 0 else -1)
        for token in set(output):
            logits[token] -= (
                config.frequency_penalty * output.count(token) + config.presence_penalty
            )
        if len(output) < config.min_tokens:
            logits[list(eos)] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "kind, names", [("generic", ALL), ("native", ALL), *(("native", [name]) for name in ALL)]
)
def test_greedy_drafts_change_nothing(kind, names):
    options = {name: ALL[name] for name in names}
    model = model_of(kind)
    config = DecodingConfig("autoregressive", max_new_tokens=24, **options)
    free = reference(model, PROMPT, replace(config, min_tokens=0))
    eos = frozenset(free[3:4] if "min_tokens" in options else ())
    expected = reference(model, PROMPT, config, eos)
    assert (expected == free) == (not eos) and len(expected) >= 12
    assert ids_of(decode(model, PROMPT, config, eos)) == expected
    accepted = 0
    for strategy, drafting in DRAFTING.items():
        decoding = decode(model, PROMPT, replace(config, strategy=strategy, **drafting), eos)
        assert ids_of(decoding) == expected, strategy
        accepted += decoding.stats.accepted
    assert accepted or kind == "generic"
    prompts = [PROMPT, PROMPT[:4], PROMPT]
    drafting = replace(config, strategy="self-speculative", exit_layer=5)
    for prompt, answer in zip(prompts, decode_batch(model, prompts, drafting, eos), strict=True):
        assert answer.ids == reference(model, prompt, config, eos)


def test_biased_tokens_and_ends_become_tensors_once(monkeypatch):
    """Not at every pass: there may be a thousand of them, and other rows wait."""
    made = []
    honest = processing._tensor_on

    def counted(logits, values, *dtype):
        made.append(list(values))
        return honest(logits, values, *dtype)

    monkeypatch.setattr(processing, "_tensor_on", counted)
    options = {name: ALL[name] for name in ("logit_bias", "min_tokens")}
    decoding = decode(
        model_of("packed"), PROMPT, DecodingConfig(exit_layer=5, max_new_tokens=24, **options), {7}
    )
    assert len(ids_of(decoding)) >= 12 and decoding.stats.rounds > 2
    assert sorted(made) == [[3, 11, 20], [4.0, -100.0, 6.0], [7]]


def test_sampled_output_follows_the_joint_distribution_of_the_changed_logits():
    """Of answers that an exit drafts, against the exact joint: each place's logits know the tokens
    before it.
    """
    options = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": ((1, 1.0),)}
    table = random_table(1)
    plain = DecodingConfig("autoregressive", max_new_tokens=NEW, temperature=1.0, **options)

    def next_probs(ids):
        logits = table[2, len(ids), ids[-1] if ids else 3].clone()
        logits[1] += 1.0
        for token in set(ids):
            logits[token] -= 1.5 * ids.count(token) + 0.5
        return probabilities(logits, plain)

    joint = joint_of(next_probs, NEW, VOCABULARY)
    drafting = replace(plain, strategy="self-speculative", exit_layer=1, num_draft_tokens=3)
    for config, right in (
        (plain, True),
        (drafting, True),
        (replace(drafting, presence_penalty=-1.0), False),
    ):
        assert (p_value_on(table, config, joint, 500) > 1e-3) == right


@pytest.mark.parametrize("kind", ["generic", "native"])
def test_log_probabilities_are_the_model_s_own(kind):
    """Of whatever options change, and with drafts to the bit on kernels that are
    batch-invariant.
    """
    model = model_of(kind)
    config = DecodingConfig(
        "autoregressive", max_new_tokens=20, logprobs=3, prompt_logprobs=True, frequency_penalty=1.5
    )
    told = {}
    for strategy in ("autoregressive", "self-speculative", "adaptive"):
        decoding = decode(
            model, PROMPT, replace(config, strategy=strategy, **DRAFTING.get(strategy, {}))
        )
        assert all(decoding)
        [row] = decoding.rows
        assert [one.id for one in row.logprobs] == row.output and [
            one.id for one in row.prompt_logprobs
        ] == PROMPT[1:]
        told[strategy] = row.prompt_logprobs + row.logprobs
    ids = PROMPT + row.output
    hidden = run_texts(model, model.embed(torch.tensor([ids])), 0, model.num_layers)
    scores = model.unembed(hidden)[0].double().log_softmax(-1).detach()
    for place, one in enumerate(told["autoregressive"]):
        assert one.logprob == pytest.approx(float(scores[place, one.id]), abs=1e-5)
        assert [token for token, _ in one.top] == scores[place].topk(3).indices.tolist()
    if model.batch_invariant:
        assert told["self-speculative"] == told["adaptive"] == told["autoregressive"]
    answer = decode_batch(model, [PROMPT, PROMPT[:5]], config)[0]
    assert [one.id for one in answer.prompt_logprobs + answer.logprobs] == ids[1:]
