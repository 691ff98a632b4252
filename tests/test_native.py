"""The C kernels: equal to the generic layers, exact whatever stands beside a token, and left out where they cannot be."""

import pytest
import torch
from conftest import tiny_model
from test_packed import CASES, assert_equal_spans, ids_of, pair  # noqa: F401  a fixture

from layerskip_core.config import DecodingConfig, PackingConfig
from layerskip_core.decoding import decode
from layerskip_core.decoding.drafting import drafter_for
from layerskip_core.decoding.loop import target_logits
from layerskip_core.decoding.sampling import Greedy
from layerskip_core.errors import LayerSkipError
from layerskip_core.model import NativeModel, PackedModel, can_run_native
from layerskip_core.model.native import compiled
from layerskip_core.model.native import model as native

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}
BUILT = [name for name in compiled.VARIANTS if compiled.kernels(name) is not None]
PRECISIONS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "int8": (torch.bfloat16, {"quantize": "int8"}),
    "int4": (torch.float32, {"quantize": "int4"}),
}

needs_kernels = pytest.mark.skipif(not BUILT, reason="no kernels were built here, or the CPU lacks what they need")


@pytest.fixture(params=BUILT)
def variant(request, monkeypatch):
    monkeypatch.setattr(native, "kernels", lambda: compiled.kernels(request.param))
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def model_of(precision, model_type="llama", **changes):
    dtype, packing = PRECISIONS[precision]
    return NativeModel.of(tiny_model(model_type, dtype, **{**WIDE, **changes}), PackingConfig(**packing))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_spans_equal_the_generic_ones(variant, pair, case, dtype, monkeypatch, threads):  # noqa: F811
    threads(2)
    monkeypatch.setattr("test_packed.PackedModel", NativeModel)
    generic, fast = pair(case, dtype)
    generic.model.float()  # the same weights; the kernels keep hidden states in fp32, and are nearer to this
    assert fast.implementation == f"native ({variant})"
    assert_equal_spans(generic, fast, ids_of(2, 17), [0, 9, 10, 17], dtype)


@needs_kernels
@pytest.mark.parametrize("size", [8, 24, 64, 128])
def test_heads_of_any_size(variant, pair, size, monkeypatch):  # noqa: F811
    monkeypatch.setattr("test_packed.PackedModel", NativeModel)
    assert_equal_spans(*pair("qwen3", torch.float32, head_dim=size), ids_of(1, 40), [0, 33, 34, 40], torch.float32)


@needs_kernels
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_token_has_the_same_bits_alone_and_among_others(variant, precision, threads):
    """Rows of a call, rows of a batch, a span in pieces, and any number of threads."""
    model = model_of(precision, "mistral", sliding_window=7)
    ids = ids_of(3, 20)
    found = []
    for count, rows, number in ((1, 1, 1), (4, 3, 2), (7, 1, 3), (20, 3, 1)):
        threads(number)
        with torch.inference_mode():
            outputs = []
            for first in range(0, 3, rows):
                part, cache = ids[first : first + rows], model.new_cache(rows)
                pieces = []
                for start in range(0, 20, count):
                    stop = min(20, start + count)
                    positions = torch.arange(start, stop).expand(rows, -1)
                    hidden = model.run_layers(model.embed(part[:, start:stop]), 0, 4, positions, cache)
                    hidden = model.run_layers(hidden, 4, 6, positions, cache)
                    pieces.append(model.unembed(hidden))
                outputs.append(torch.cat(pieces, dim=1))
            found.append(torch.cat(outputs))
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_kernels
@pytest.mark.parametrize("precision", PRECISIONS)
def test_speculation_gives_the_tokens_of_plain_decoding(variant, precision, threads):
    threads(2)
    model = model_of(precision)
    for seed in range(4):
        prompt = ids_of(1, 5 + seed)[0].tolist()
        plain, drafted = (
            [token.id for tokens in decode(model, prompt, config) for token in tokens]
            for config in (DecodingConfig("autoregressive", max_new_tokens=40), DecodingConfig("self-speculative", 3, 5, 40))
        )
        assert plain == drafted and len(plain) == 40


@needs_kernels
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_low_bit_layers_are_near_the_levels_they_store(variant, precision):
    """Against the packed model on torch's kernels over the same levels: what differs is the rounding of activations."""
    dtype, packing = PRECISIONS[precision]
    reference = PackedModel.of(tiny_model("llama", dtype, **WIDE), PackingConfig(**packing))
    model, ids = model_of(precision), ids_of(1, 12)
    with torch.inference_mode():
        expected, found = (
            each.unembed(each.run_layers(each.embed(ids), 0, 6, torch.arange(12)[None], each.new_cache())).float()
            for each in (reference, model)
        )
    assert (found - expected).std() < 0.1 * expected.std()


@needs_kernels
def test_a_low_bit_copy_drafts_and_the_model_verifies(variant):
    packing = PackingConfig(draft_weights="int4", draft_layers=3, draft_vocab=50)
    model = NativeModel.of(tiny_model("llama", torch.float32, **WIDE), packing)
    alone = NativeModel.of(tiny_model("llama", torch.float32, **WIDE))
    assert isinstance(model.draft, NativeModel) and model.draft.num_layers == 3
    assert model.implementation == f"native ({variant}), int4 drafts"
    prompt = ids_of(1, 9)[0].tolist()
    drafted = decode(model, prompt, DecodingConfig("self-speculative", 3, 4, 30))
    plain = decode(alone, prompt, DecodingConfig("autoregressive", max_new_tokens=30))
    assert [t.id for ts in drafted for t in ts] == [t.id for ts in plain for t in ts]
    assert drafted.stats.accepted > 0


@needs_kernels
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("packing", [{}, {"draft_vocab": 40}, {"draft_weights": "int8"}, {"quantize": "int4"}], ids=str)
def test_a_draft_in_one_call_is_that_of_single_steps(variant, packing, number, threads):
    """Tokens, states and the cache, bit for bit; all of it again behind an EOS, which ends the draft."""
    threads(number)
    order = torch.randperm(67, generator=torch.Generator().manual_seed(3)).tolist()
    model = NativeModel.of(tiny_model("llama", torch.bfloat16, **WIDE), PackingConfig(**packing), order)
    prompt, positions = ids_of(1, 30), torch.arange(29, 35)[None]

    def drafted(ends, one_call):
        drafter = drafter_for(model, Greedy(), DecodingConfig("self-speculative", 4, 6), frozenset(ends))
        if not one_call:
            drafter._in_one_call = None
        with torch.inference_mode():
            cache = model.new_cache()
            model.run_layers(model.embed(prompt[:, :29]), 0, 6, torch.arange(29)[None], cache)
            draft = drafter.draft(prompt[:, 29:], positions, cache)
            return draft, target_logits(model, draft, torch.arange(29, 30 + draft.num_drafts)[None], cache, 6)

    chosen = drafted((), False)[0].tokens[0].tolist()
    for ends in ((), (66, chosen[1]), (chosen[3],), (chosen[6],)):
        (expected, logits), (found, ours) = drafted(ends, False), drafted(ends, True)
        assert torch.equal(found.tokens, expected.tokens) and found.num_drafts == expected.num_drafts
        if expected.exit_states is not None:
            known = expected.exit_states.shape[1]
            assert torch.equal(found.exit_states[:, :known], expected.exit_states)
        assert torch.equal(ours, logits)


@needs_kernels
@pytest.mark.parametrize("best", [0, 1, 255, 256, 590, 599])
def test_of_equal_logits_the_first_is_drafted(variant, best):
    """In a vocabulary of 600: blocks of 256 are looked at, and 599 stands behind the last whole sixteen."""

    def drafted(change):
        tiny = tiny_model("llama", torch.float32, vocab_size=600, **WIDE)
        change(tiny.lm_head.weight.data)
        model = NativeModel.of(tiny)
        with torch.inference_mode():
            return model.draft_greedily(5, 3, torch.arange(1)[None], model.new_cache(), frozenset())[0].tolist()

    ((_, likely),) = drafted(lambda weight: None)

    def equal_from_best_on(weight):
        row = weight[likely].clone()
        weight[:best], weight[best:] = -row, row

    assert drafted(equal_from_best_on) == [[5, best]]


@needs_kernels
def test_where_there_are_kernels_and_where_not(variant):
    config, cpu = tiny_model("llama", torch.float32, **WIDE).config, torch.device("cpu")
    assert can_run_native(config, torch.float32, cpu, None)
    assert can_run_native(config, torch.bfloat16, cpu, PackingConfig(quantize="int4"))
    assert not can_run_native(config, torch.float64, cpu, None)
    assert not can_run_native(config, torch.float32, torch.device("cuda"), None)
    assert not can_run_native(tiny_model("gemma", torch.float32).config, torch.float32, cpu, None)
    narrow = tiny_model("llama", torch.float32, intermediate_size=48).config  # 48: no whole groups of 32
    assert can_run_native(narrow, torch.float32, cpu, None)
    assert not can_run_native(narrow, torch.float32, cpu, PackingConfig(draft_weights="int8"))


def test_without_kernels_decoding_runs_on_those_of_torch(monkeypatch):
    monkeypatch.setattr(native, "kernels", lambda: None)
    assert not can_run_native(tiny_model("llama", torch.float32).config, torch.float32, torch.device("cpu"), None)
    monkeypatch.setenv(compiled.SWITCH, "torch")
    assert compiled.kernels.__wrapped__() is None


@needs_kernels
def test_kernels_of_another_version_are_refused_by_name(monkeypatch):
    """As after a pull in a checkout: calling them would crash, or fill structures that they read otherwise."""
    monkeypatch.setattr(compiled, "INTERFACE", compiled.INTERFACE + 1)
    with pytest.raises(LayerSkipError, match=r"another version: install layerskip again .* LAYERSKIP_KERNELS=torch"):
        compiled.kernels.__wrapped__()
