"""A text whose values are not finite leaves nothing behind: what takes its place in the cache
decodes as it would alone.
"""

import math
from math import inf

import pytest
import torch
from conftest import at, tiny_model
from decodings import WIDE
from test_native import variant  # noqa: F401  a fixture

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import Prefixes
from layerskip_core.decoding.target import target_of
from layerskip_core.model import NativeBackend, TorchBackend, TransformersBackend

PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, "int8"),
}


def backend_of(kind, precision):
    dtype, quantize = PRECISIONS[precision]
    model = tiny_model("llama", dtype, **WIDE)
    return (
        TransformersBackend(model)
        if kind is TransformersBackend
        else kind.of(model, PackingConfig(quantize))
    )


def run(model, cache, rows, start, nan=()):
    """Logits of tokens (B, T) from position `start` on; rows in `nan` have hidden states of NaN."""
    ids = torch.tensor(rows)
    hidden = model.embed(ids)
    hidden[list(nan)] = math.nan
    positions = torch.arange(start, start + ids.shape[1]).expand(len(rows), -1)
    return model.unembed(model.run_layers(hidden, 0, model.num_layers, at(positions, cache)))


def joined(model, nan):
    """A long row of two leaves, a short one takes its slot; logits of the tokens that both then
    decode.
    """
    with torch.inference_mode():
        cache = model.new_cache(2)
        other = model.new_cache(1)
        run(model, cache, [[5] * 100, [7] * 100], 0, nan)
        cache.keep_rows([1])
        run(model, other, [[9] * 64], 0)
        cache.join(other)
        # The joined row goes on at 64, where the other cache ended, the other row at 100.
        outputs = []
        for step in range(6):
            positions = torch.tensor([[100 + step], [64 + step]])
            hidden = model.run_layers(
                model.embed(torch.tensor([[4], [6]])), 0, model.num_layers, at(positions, cache)
            )
            outputs.append(model.unembed(hidden))
        return torch.cat(outputs, dim=1)


def check(model):
    expected = joined(model, ())
    actual = joined(model, (0,))
    assert bool(expected.isfinite().all()) and torch.equal(actual, expected)


@pytest.mark.parametrize(
    "kind, precision",
    [(TransformersBackend, "fp32"), *((TorchBackend, precision) for precision in PRECISIONS)],
)
def test_the_next_row_of_a_slot_decodes_as_alone(kind, precision):
    check(backend_of(kind, precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_next_row_of_a_slot_decodes_as_alone_on_our_kernels(variant, precision):  # noqa: F811
    check(backend_of(NativeBackend, precision))


@pytest.mark.parametrize("kind", [TransformersBackend, TorchBackend])
def test_the_next_text_of_a_prefix_decodes_as_alone(kind):
    """The texts share two tokens; the first one's others are NaN."""
    model = backend_of(kind, "fp32")
    config = DecodingConfig(strategy="autoregressive", max_new_tokens=4)
    logits = []
    for nan in ((), (0,)):
        prefixes = Prefixes(inf, least=1)
        target = target_of(model, config)
        cache = model.new_cache()
        with torch.inference_mode():
            run(model, cache, [[5, 5]], 0)
            run(model, cache, [[5] * 39], 2, nan)
            prefixes.keep(model, target, [5] * 41, cache, 0)
            cache, count = prefixes.start_cache(model, target, [5, 5, 6, 7], 100)
            assert count == 2
            logits.append(run(model, cache, [[6, 7]], 2))
    assert bool(logits[0].isfinite().all()) and torch.equal(*logits)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rejected_draft_changes_no_bit_on_our_kernels(variant, precision):  # noqa: F811
    """Neither of tokens of its own pass nor later; only what sees it is NaN."""
    model = backend_of(NativeBackend, precision)
    outputs = []
    with torch.inference_mode():
        for nan in (False, True):
            cache = model.new_cache()
            run(model, cache, [[5] * 9], 0)
            hidden = model.embed(torch.tensor([[6, 6, 6]]))
            hidden[:, 1] = math.nan if nan else 0.5
            outputs.append(
                model.run_layers(hidden, 0, model.num_layers, at(torch.arange(9, 12)[None], cache))
            )
            outputs.append(run(model, cache, [[4]], 10))
    assert torch.equal(outputs[0][:, 0], outputs[2][:, 0]) and torch.equal(outputs[1], outputs[3])
    assert bool(outputs[1].isfinite().all()) and bool(outputs[2][:, 1:].isnan().all())
