"""The loop's invariants: on tiny random transformers models, and on a table of known
probabilities.
"""

import time
from itertools import count
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import tiny_model
from decodings import answer_of, ids_of, letters, probabilities, prompt_of
from torch import tensor

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import DecodingLoop, decode
from layerskip_core.decoding.drafters import Draft
from layerskip_core.decoding.row import Row
from layerskip_core.errors import ConfigError
from layerskip_core.model import TransformersBackend
from layerskip_core.model.backend import DraftHead, choose_by_head
from layerskip_core.model.row_cache import RowCache

WINDOWED = {"sliding_window": 5}
LAYERS = 6


@pytest.fixture(scope="module")
def models(llama):
    return {"llama": llama, "gemma3_text": tiny_model("gemma3_text", **WINDOWED)}


@pytest.fixture(scope="module")
def backend(llama):
    return TransformersBackend(llama)


def run(model, prompt, eos_ids=(), reuse_exit_states=True, **settings):
    return answer_of(
        model, prompt, DecodingConfig(**settings), eos_ids, reuse_exit_states=reuse_exit_states
    )


def plain(model, prompt, **settings):
    return run(model, prompt, strategy="autoregressive", **settings)


# --- the same tokens as other ways to the same answer
# ------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_autoregressive_decoding_equals_generate(models, model_type):
    prompt = prompt_of(9)
    model = TransformersBackend(models[model_type])
    without_eos, _, _ = plain(model, prompt, max_new_tokens=20)
    eos_ids = [66, without_eos[8]]
    for stops_at in ([], eos_ids):
        expected = generate(models[model_type], prompt, 20, eos_token_id=stops_at or None)
        assert plain(model, prompt, max_new_tokens=20, eos_ids=stops_at)[0] == expected


def generate(model, prompt, max_new_tokens, **settings):
    model.generation_config.eos_token_id = None
    output = model.generate(
        tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, **settings
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("exit_layer", [1, 4, 6])
def test_early_exit_equals_the_truncated_model(llama, backend, exit_layer):
    truncated = tiny_model(num_hidden_layers=exit_layer)
    truncated.load_state_dict(llama.state_dict(), strict=False)
    ids, _, _ = run(
        backend, prompt_of(9), strategy="early-exit", exit_layer=exit_layer, max_new_tokens=20
    )
    assert ids == generate(truncated, prompt_of(9), 20)


# --- how much is computed
# ----------------------------------------------------------------------------------------------


def tokens_by_layer(model, run_it):
    calls: list[list[int]] = [[] for _ in model.layers]

    def watch(layer):
        return lambda module, args: calls[layer].append(args[0].shape[1])

    hooks = [
        layer.mlp.register_forward_pre_hook(watch(index))
        for index, layer in enumerate(model.layers)
    ]
    try:
        run_it()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def test_a_round_runs_the_first_layers_once_a_token_and_the_others_once(backend):
    """E = 2, d = 3: (d+1)E = 8 passes of one token and L-E = 4 passes of d+1 tokens; the prompt of
    9 once through all.
    """
    decoding = decode(backend, prompt_of(9), DecodingConfig(exit_layer=2, num_draft_tokens=3))
    assert tokens_by_layer(backend, lambda: next(decoding)) == [[9]] * 6
    assert tokens_by_layer(backend, lambda: next(decoding)) == [[1, 1, 1, 1]] * 2 + [[4]] * 4
    decoding = decode(
        backend,
        prompt_of(9),
        DecodingConfig(exit_layer=2, num_draft_tokens=3),
        reuse_exit_states=False,
    )
    next(decoding)
    assert tokens_by_layer(backend, lambda: next(decoding)) == [[1, 1, 1, 4]] * 2 + [[4]] * 4
    config = DecodingConfig(strategy="early-exit", exit_layer=2, max_new_tokens=3)
    assert (
        tokens_by_layer(backend, lambda: list(decode(backend, prompt_of(9), config)))
        == [[9, 1, 1]] * 2 + [[]] * 4
    )


# --- rejected drafts, interruptions
# ------------------------------------------------------------------------------------


def test_an_abandoned_decoding_leaves_the_model_usable(backend):
    config = DecodingConfig(exit_layer=3, max_new_tokens=17)
    expected, _, _ = plain(backend, prompt_of(9), max_new_tokens=17)
    for tokens in decode(backend, prompt_of(9), config):
        assert tokens
        assert not torch.is_inference_mode_enabled()
        break
    assert torch.is_grad_enabled()
    assert backend.config.num_hidden_layers == len(backend.layers) == LAYERS
    assert run(backend, prompt_of(9), exit_layer=3, max_new_tokens=17)[0] == expected


def test_an_interrupt_ends_a_decoding(backend, monkeypatch):
    """Wherever it comes: what follows would stand at wrong positions. The model is as before."""
    config = DecodingConfig(exit_layer=2, num_draft_tokens=3, max_new_tokens=17)
    expected = run(backend, prompt_of(9), exit_layer=2, num_draft_tokens=3, max_new_tokens=17)[0]
    for layer in (0, 2, LAYERS - 1):  # while drafting, before and during verification
        decoding = decode(backend, prompt_of(9), config)
        next(decoding)
        hook = backend.layers[layer].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(decoding)
        hook.remove()
        assert not torch.is_inference_mode_enabled()
        assert list(decoding) == [] and decoding.finish_reason is None
    with monkeypatch.context() as patched:  # after the tokens were added to the output
        decoding = decode(backend, prompt_of(9), config)
        next(decoding)
        commit = Row.commit
        patched.setattr(Row, "commit", lambda *given: interrupt(commit(*given)))
        with pytest.raises(KeyboardInterrupt):
            next(decoding)
    assert list(decoding) == []
    assert (
        run(backend, prompt_of(9), exit_layer=2, num_draft_tokens=3, max_new_tokens=17)[0]
        == expected
    )


def interrupt(*_):
    raise KeyboardInterrupt


# --- doubles with known answers
# ----------------------------------------------------------------------------------------


class TableModel:
    """A model of two layers whose logits are `table[layers run, position, token]`, (3, P, V, V):
    all is known.

    Hidden states are (token, layers run, position); a state given to the wrong layer fails.
    """

    num_layers = 2
    device = torch.device("cpu")
    exact = False
    batch_invariant = False
    recordable = False
    exit_blocks: ClassVar[dict] = {}
    drafters: ClassVar[dict] = {}
    choose = choose_by_head
    # Of its draft side, which is the model itself
    shares_states = True
    kernel = None

    def __init__(self, table):
        self.table = table
        self.spec = SimpleNamespace(context=table.shape[1])
        self.layers = self
        self.draft_sides = {None: self}
        self.context_length = lambda num_draft_tokens: table.shape[1]

    def head(self, submodel):
        return DraftHead(self.unembed)

    def new_cache(self, batch_size=1, max_positions=None):
        return RowCache((2, 1, 1), batch_size, max_positions, torch.empty(0))

    def embed(self, ids):
        return torch.stack((ids, torch.zeros_like(ids), torch.zeros_like(ids)), dim=-1)

    def run_layers(self, hidden, start, stop, places):
        assert (hidden[..., 1] == start).all()
        return torch.stack(
            (hidden[..., 0], torch.full_like(hidden[..., 0], stop), places.positions), dim=-1
        )

    def unembed(self, hidden):
        token, layer, position = hidden.unbind(-1)
        return self.table[layer, position, token]


class Scripted:
    """Drafts `choose(place, token before it)`, without exit states."""

    def __init__(self, choose):
        self.choose = choose
        self.calls = []  # of `draft` and `observe`, by the number of drafts

    def draft(self, context, most):
        self.calls.append(("draft", most[0]))
        ids = [int(context.newest)]
        assert ids == context.ids[0][-1:]
        for place in range(most[0]):
            ids.append(self.choose(place, ids[-1]))
        return Draft(tensor(ids), counts=(len(ids) - 1,))

    def observe(self, row, drafted, verified):
        self.calls.append(("observe", drafted))


def counting_model(limit=100):
    """Its greedy continuation counts up, modulo 50."""
    return TableModel(torch.eye(50, dtype=torch.double).roll(1, dims=1).expand(3, limit, 50, 50))


def scripted_decoding(choose, max_new_tokens=9, eos_ids=(), stop=(), limit=100):
    config = DecodingConfig(num_draft_tokens=3, max_new_tokens=max_new_tokens, stop=stop)
    return DecodingLoop(
        counting_model(limit),
        [[3, 4]],
        config,
        frozenset(eos_ids),
        letters,
        drafter=Scripted(choose),
    )


def written(decoding):
    """Ids round by round, accepted drafts negative."""
    return [
        [*(-token for token in step.ids[: step.counts.accepted]), *step.ids[step.counts.accepted :]]
        for [step] in decoding
    ]


def counts(stats):
    return (
        stats.rounds,
        stats.drafted,
        stats.accepted,
        stats.tested_by_position,
        stats.accepted_by_position,
    )


def always(place, token):
    return token + 1


def never(place, token):
    return token + 2


def first_only(place, token):
    return token + 1 if place == 0 else token + 2


ROUNDS = {
    "always accepted": (
        always,
        {},
        [[5], [-6, -7, -8, 9], [-10, -11, -12, 13]],
        (2, 6, 6, (2, 2, 2), (2, 2, 2)),
        "length",
    ),
    # With 4, 3, 2 tokens of room after it, the round drafts 3, 2, 1; the last token has no room for
    # a draft.
    "never accepted": (
        never,
        {"max_new_tokens": 5},
        [[5], [6], [7], [8], [9]],
        (3, 6, 0, (3,), ()),
        "length",
    ),
    "sometimes accepted": (
        first_only,
        {},
        [[5], [-6, 7], [-8, 9], [-10, 11], [-12, 13]],
        (4, 3 + 3 + 3 + 1, 4, (4, 3), (4,)),
        "length",
    ),
    "drafts behind an EOS": (
        always,
        {"eos_ids": [30, 7]},
        [[5], [-6, -7]],
        (1, 3, 2, (1, 1), (1, 1)),
        "eos",
    ),
    "a stop string inside drafts": (
        always,
        {"stop": (letters([7, 8]), letters([40])), "max_new_tokens": 20},
        [[5], [-6, -7, -8]],
        (1, 3, 3, (1, 1, 1), (1, 1, 1)),
        "stop",
    ),
    "an EOS first": (always, {"eos_ids": [5]}, [[5]], (0, 0, 0, (), ()), "eos"),
}


@pytest.mark.parametrize("choose, settings, rounds, counted, reason", ROUNDS.values(), ids=ROUNDS)
def test_rounds_of_scripted_drafts(choose, settings, rounds, counted, reason):
    decoding = scripted_decoding(choose, **settings)
    assert written(decoding) == rounds and list(decoding) == []
    stats, (number, drafted, accepted, *_) = decoding.stats, counted
    assert (counts(stats), decoding.finish_reason, stats.new_tokens) == (
        counted,
        reason,
        sum(map(len, rounds)),
    )
    assert (stats.acceptance_rate, stats.mean_accepted_tokens) == (
        accepted / max(drafted, 1),
        accepted / max(number, 1),
    )


@pytest.mark.parametrize("choose", [always, never, first_only])
def test_the_context_ends_the_output(choose):
    """A prompt of 2 tokens and 5 new ones fill a context of 7."""
    decoding = scripted_decoding(choose, limit=7)
    assert (ids_of(decoding), decoding.finish_reason) == ([5, 6, 7, 8, 9], "context")
    limited = scripted_decoding(choose, max_new_tokens=5, limit=7)
    assert (ids_of(limited), limited.finish_reason) == ([5, 6, 7, 8, 9], "length")


def test_seconds_are_counted_where_they_are_spent(monkeypatch):
    """Every look at the clock takes a second: 1 in a prefill, 2 in a plain step, 4 in a round."""
    monkeypatch.setattr(time, "perf_counter", count(0.0).__next__)
    decoding = scripted_decoding(always, max_new_tokens=6)
    for _ in decoding:
        time.perf_counter()  # the caller's time
    stats = decoding.stats
    assert (stats.draft_seconds, stats.verify_seconds, stats.total_seconds) == (1, 3, 1 + 4 + 2)
    assert stats.tokens_per_second == 6 / 7


def test_bad_settings_are_refused(backend):
    with pytest.raises(ConfigError, match="the prompt is empty"):
        run(backend, [], exit_layer=3)
    with pytest.raises(ConfigError, match="at most 127 tokens, got 128"):
        run(backend, [5] * 128, exit_layer=3)
    with pytest.raises(ConfigError, match="`stop` must be used with a detokenizer"):
        decode(backend, [5], DecodingConfig(strategy="autoregressive", stop=("x",)))
    assert run(backend, [5] * 127, exit_layer=3)[1] == "context"


# --- sampling
# ----------------------------------------------------------------------------------------------------------


def p_value_of(outputs, joint):
    """Chi-square of outputs (tuples of ids) against their exact joint {ids: probability}; rare ones
    are one cell.
    """
    # Never a token of zero target mass
    assert set(outputs) <= {ids for ids, mass in joint.items() if mass > 0}
    total = len(outputs)
    cells = []
    rare = [0.0, 0.0]
    observed = dict.fromkeys(joint, 0)
    for ids in outputs:
        observed[ids] += 1
    for ids, mass in joint.items():
        if mass * total >= 5:
            cells.append((observed[ids], mass * total))
        else:
            rare = [rare[0] + observed[ids], rare[1] + mass * total]
    if rare[1] > 0:
        cells.append(tuple(rare))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return float(torch.special.gammaincc(tensor((len(cells) - 1) / 2), tensor(statistic / 2)))


def joint_of(next_probs, length, vocabulary):
    """Exact probability of every continuation of `length`; `next_probs(ids)` (V,) are those behind
    a continuation.
    """
    joint = {(): 1.0}
    for _ in range(length):
        joint = {
            (*ids, token): mass * float(probs[token])
            for ids, mass in joint.items()
            for probs in [next_probs(ids)]
            for token in range(vocabulary)
        }
    return joint


VOCABULARY = 5
NEW = 4


def random_table(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 8, VOCABULARY, VOCABULARY, generator=generator, dtype=torch.double)


def p_value_on(table, config, joint, draws):
    """The p-value of as many answers under their exact joint distribution."""
    loop = DecodingLoop(TableModel(table), [[3]] * draws, config, seeds=range(draws))
    list(loop)
    return p_value_of([tuple(row.output) for row in loop.rows], joint)


def test_sampled_output_follows_the_target_s_joint_distribution():
    """Four tokens: one from the prefill, three from a round of up to two drafts and, after
    rejections, of fewer.
    """
    table = random_table(1)
    config = DecodingConfig("self-speculative", 1, 3, NEW, temperature=1.2, top_k=4, top_p=0.9)
    joint = joint_of(
        lambda ids: probabilities(table[2, len(ids), ids[-1] if ids else 3], config),
        NEW,
        VOCABULARY,
    )
    assert p_value_on(table, config, joint, 800) > 1e-3


def test_sampling_is_repeatable_by_its_seed(backend):
    def sampled(seed):
        sampling = {"temperature": 2.0, "seed": seed}
        return run(
            backend, prompt_of(9), exit_layer=4, num_draft_tokens=3, max_new_tokens=17, **sampling
        )[0]

    assert sampled(1) == sampled(1) != sampled(2)
