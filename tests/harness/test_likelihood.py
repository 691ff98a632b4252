"""Log-likelihoods through several exits, against one pass per continuation, and tasks of lm-eval
where it is not installed.
"""

import random
import sys

import pytest
import torch
from command_line import fails
from conftest import at, run_texts
from evaluating import tiny_loaded

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.errors import ContextError
from layerskip_core.harness.likelihood import Likelihood, likelihoods


@torch.inference_mode()
def alone(model, context, continuation, exit_layer):
    """The likelihood by definition: one pass over one text, cut at its beginning if the context
    limit needs it.
    """
    ids = [*context, *continuation][-(model.spec.context + 1) :]
    tokens = torch.tensor([ids[:-1]])
    places = torch.arange(len(ids) - 1)[None]
    cache = model.new_cache(1)
    hidden = model.run_layers(model.embed(tokens), 0, exit_layer, at(places, cache))
    block = model.exit_blocks.get(exit_layer)
    if block is not None:
        hidden = model.run_layers(hidden, block.layer, block.layer + 1, at(places, cache))
    logits = (model.unembed if block is None else block.head)(hidden)[
        0, -len(continuation) :
    ].double()
    wanted = torch.tensor(continuation)
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


def greedy(model, context, count):
    ids = list(context)
    with torch.inference_mode():
        for _ in range(count):
            hidden = run_texts(model, model.embed(torch.tensor([ids])), 0, model.num_layers)
            ids.append(int(model.unembed(hidden)[0, -1].argmax()))
    return ids[len(context) :]


def pairs_for(model):
    """Choices that share contexts, contexts that begin alike, single ones, one that is cut, and one
    as long as it can be.
    """
    draw = random.Random(3)

    def some(count):
        return [draw.randrange(model.spec.vocab) for _ in range(count)]

    start = some(70)
    limit = 128
    shared = [start + some(draw.randrange(1, 30)) for _ in range(4)]
    pairs = [(context, some(draw.randrange(1, 6))) for context in shared for _ in range(3)]
    pairs += [(some(draw.randrange(1, 40)), some(draw.randrange(1, 9))) for _ in range(4)]
    pairs += [(some(5), [7])] * 2 + [
        (some(limit + 9), some(4)),
        (some(3), some(limit)),
        (some(limit - 3), some(3)),
    ]
    return [*pairs, (shared[0], greedy(model, shared[0], 3))]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("kind", ["generic", "kernels"])
def test_every_exit_of_one_pass_equals_a_pass_of_its_own(kind, batch_size, wide):
    model = (
        tiny_loaded().backend
        if kind == "generic"
        else for_decoding(str(wide), dtype="fp32").backend
    )
    assert model.spec.context == 128
    pairs = pairs_for(model)
    exits = [1, 4, 6]
    found = dict(likelihoods(model, pairs, exits, batch_size))
    assert sorted(found) == list(range(len(pairs)))
    for place, (context, continuation) in enumerate(pairs):
        for exit_layer in exits:
            total, best = alone(model, context, continuation, exit_layer)
            assert found[place][exit_layer].total == pytest.approx(total, rel=1e-5, abs=1e-5)
            assert found[place][exit_layer].greedy == best
    assert found[len(pairs) - 1][6].greedy and not found[0][6].greedy
    totals = {round(found[0][exit_layer].total, 3) for exit_layer in exits}
    assert len(totals) == 3  # the exit counts


def test_what_does_not_fit_and_what_is_empty():
    model = tiny_loaded().backend
    assert list(likelihoods(model, [([1], [])], [6], 1)) == [(0, {6: Likelihood(0.0, True)})]
    with pytest.raises(ContextError, match="at most 128 tokens, got 129"):
        list(likelihoods(model, [([1], [2] * 129)], [6], 1))


def test_the_missing_package_and_how_to_install_it(monkeypatch):
    for name in [
        name for name in sys.modules if name.startswith(("lm_eval", "layerskip_core.harness"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    needed = "lm-evaluation-harness is needed, whose package lm_eval is missing: pip install 'layerskip[lm-eval]'"
    fails(needed, "sweep-exits --task lm-eval:piqa")
    fails(needed, "bench --task lm-eval:piqa,gsm8k")


def test_where_the_flags_of_lm_eval_belong():
    fails(
        "--include-path must be used with --task lm-eval:..., got here", "bench --include-path here"
    )
    fails("--log-samples must be used with --output, got none", "sweep-exits --log-samples")
    fails(
        "--task must be lm-eval: with the name of a task, got lm-eval: ,",
        "bench --task",
        "lm-eval: ,",
    )
