"""Low-bit weights, low-bit and trimmed drafts, and exact decoding, on tiny random packed models."""

import json
import shutil
from functools import cache

import pytest
import torch
from command_line import fails, run
from conftest import logits_of, tiny_model
from decodings import ids_of, native_or_skip, prompt_of
from exit_block_models import random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode
from layerskip_core.errors import ConfigError
from layerskip_core.model import Submodel, TorchBackend, TransformersBackend
from layerskip_core.model.exit_blocks import ExitBlock
from layerskip_core.model.torch_linear import quantized

WIDE = {"intermediate_size": 64, "hidden_size": 64}


@cache
def packed(dtype=torch.float32, model_type="llama", **packing):
    return TorchBackend.of(tiny_model(model_type, dtype, **WIDE), PackingConfig(**packing))


# With norms after blocks, over projections, and with LayerNorm
KINDS = ("gemma3_text", "olmo2", "starcoder2")


def output(model, prompt, max_new_tokens=24, **config):
    decoding = decode(model, prompt, DecodingConfig(max_new_tokens=max_new_tokens, **config))
    return ids_of(decoding), decoding.stats


def plain(model, prompt, **config):
    return output(model, prompt, strategy="autoregressive", **config)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind, levels", [("int8", 255), ("int4", 16)])
def test_a_weight_becomes_the_nearest_level(kind, levels, bias):
    """Unit vectors read the weights back. Rounding moves a weight by half a level at most, and bf16
    by 2^-8.
    """
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    offset = torch.linspace(-1, 1, 70) if bias else None
    stored = quantized(weight, offset, kind)(torch.eye(64)).float().t() - (
        0 if offset is None else offset[:, None]
    )
    groups = weight.view(70, -1, 64 if kind == "int8" else 32)
    largest = groups.abs().amax(2, keepdim=True)
    spread = (
        2 * largest
        if kind == "int8"
        else groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)
    )
    allowed = (
        spread / (levels - 1) / 2 + 3 * largest * 2**-8 + (0 if offset is None else 2**-8)
    ).expand_as(groups)
    assert ((stored - weight).view_as(groups).abs() <= allowed).all()
    assert (stored - weight).abs().max() > allowed.min() / 8  # so it is not the weight itself


def test_unsupported_widths_devices_and_drafts_are_errors():
    for kind, columns, needed in (
        ("int4", 48, "layer widths that the group size 32 divides, got 48"),
        ("int8", 40, "layer widths that 16 divides, got 40"),
    ):
        with pytest.raises(ConfigError, match=f"{kind} weights need {needed}"):
            quantized(torch.zeros(32, columns), None, kind)
    with pytest.raises(ConfigError, match="int8 weights need `device` cpu, got meta"):
        quantized(torch.zeros(32, 48, device="meta"), None, "int8")
    model = packed(draft_weights=("int8",), draft_layers=2)
    assert model.draft_sides["int8"].num_layers == 2
    with pytest.raises(
        ConfigError, match="`exit_layer` must be at most the 2 layers kept for drafting, got 3"
    ):
        output(model, prompt_of(3), exit_layer=3, draft_weights="int8")
    with pytest.raises(
        ConfigError, match="`num_draft_tokens` must be below 64 with `exact`, got 64"
    ):
        output(packed(exact=True), prompt_of(3), exit_layer=3, num_draft_tokens=64)


@pytest.mark.parametrize("quantize, tolerance", [("int8", 0.1), ("int4", 0.7)])
@pytest.mark.parametrize("model_type", ["llama", *KINDS])
def test_quantized_logits_are_near_the_original_ones(model_type, quantize, tolerance):
    ids = torch.tensor([prompt_of(12)])
    model = packed(model_type=model_type, quantize=quantize)
    assert model.implementation == f"packed ({quantize})"
    expected = logits_of(TransformersBackend(tiny_model(model_type, torch.float32, **WIDE)), ids)
    actual = logits_of(model, ids)
    error = (actual - expected).std() / expected.std()
    assert 1e-4 < error < tolerance
    assert actual.dtype == torch.float32


def test_a_draft_vocabulary_has_the_most_frequent_tokens():
    """The order lists ids 50, 3 and 40; 0 and 1 follow, as all do without an order. Sampling works
    with such drafts too.
    """
    for order, first in ((None, [0, 1, 2, 3, 4]), ([50, 3, 40], [50, 3, 40, 0, 1])):
        model = TorchBackend.of(
            tiny_model(dtype=torch.float64, **WIDE), PackingConfig(draft_vocab=5), order
        )
        side = model.draft_sides[None]
        with torch.inference_mode():
            hidden = model.embed(torch.tensor([prompt_of(9)]))
            torch.testing.assert_close(
                side.whole.unembed(hidden), model.unembed(hidden)[..., first]
            )
        assert (
            side.shares_states
            and side.at_exits.vocabulary.tokens(torch.arange(5)).tolist() == first
        )
    settings = {"exit_layer": 5, "num_draft_tokens": 3, "max_new_tokens": 40}
    assert output(model, prompt_of(9), **settings)[0] == plain(
        model, prompt_of(9), max_new_tokens=40
    )
    often = sorted(set(plain(model, prompt_of(9), max_new_tokens=40)))
    known, unknown = (
        output(
            TorchBackend.of(
                tiny_model(dtype=torch.float64, **WIDE),
                PackingConfig(draft_vocab=len(often)),
                first,
            ),
            prompt_of(9),
            **settings,
        )
        for first in (often, [token for token in range(67) if token not in often])
    )
    assert known[1].accepted > unknown[1].accepted == 0
    sampled, stats = output(model, prompt_of(9), temperature=1.0, seed=1, **settings)
    assert len(sampled) == 40 and 0 < stats.accepted < stats.drafted


@pytest.mark.parametrize("kind", [TorchBackend.of, native_or_skip])
def test_exits_draft_among_the_most_frequent_tokens_of_a_large_vocabulary(kind, monkeypatch):
    """With and without a block, by own layers and by a copy. Drafts after all layers have all
    tokens.
    """
    monkeypatch.setattr(
        "layerskip_core.model.vocabulary._EXIT_VOCABULARY", 16
    )  # a quarter of 67 is more
    order = list(range(40, 60))

    def model(order, **packing):
        torch_model = tiny_model(**WIDE)
        blocks = random_blocks(torch_model, ExitBlock(2))
        return kind(
            torch_model, PackingConfig(**packing), token_order=order, stored_drafters=blocks
        )

    trimmed = model(order, draft_weights=("int8",))
    for side in trimmed.draft_sides.values():
        for exit_layer, kept in ((2, order[:16]), (3, order[:16]), (6, None)):
            block = side.exit_blocks.get(exit_layer)
            vocabulary = side.head(Submodel(exit_layer, block=block)).vocabulary
            assert (vocabulary and vocabulary.ids.tolist()) == kept
    block = trimmed.draft_sides[None].exit_blocks[2]
    hidden = trimmed.embed(torch.tensor([prompt_of(9)]))
    with torch.inference_mode():
        torch.testing.assert_close(
            block.head(hidden), trimmed.exit_blocks[2].head(hidden)[..., order[:16]]
        )
    settings = {"num_draft_tokens": 3, "max_new_tokens": 40}
    for exit_layer in (2, 3):
        drafted = output(trimmed, prompt_of(9), exit_layer=exit_layer, **settings)[0]
        assert drafted == plain(trimmed, prompt_of(9), max_new_tokens=40)
    for whole in (model(None), model(order, draft_vocab=67)):
        assert whole.draft_sides[None].at_exits.unembed(hidden).shape[-1] == 67


@settings(max_examples=8, deadline=None)
@given(
    quantize=st.sampled_from([None, "int8", "int4"]),
    draft_vocab=st.sampled_from([0, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    exit_layer=st.integers(1, 5),
    num_draft_tokens=st.sampled_from([1, 3, 6, 12]),
    length=st.sampled_from([1, 5, 70]),
)
def test_exact_logits_do_not_depend_on_the_strategy(
    quantize, draft_vocab, dtype, exit_layer, num_draft_tokens, length
):
    """Each row of the target's logits has the bits that it has alone, however many rows a pass
    verifies.
    """
    model = packed(dtype, quantize=quantize, draft_vocab=draft_vocab, exact=True)
    prompt = prompt_of(length)
    expected = plain(model, prompt, max_new_tokens=14)
    drafted, _ = output(
        model, prompt, max_new_tokens=14, exit_layer=exit_layer, num_draft_tokens=num_draft_tokens
    )
    assert drafted == expected
    ids = torch.tensor([prompt + expected])
    one_by_one, rounds = (
        logits_of(model, ids, range(length, ids.shape[1], step))
        for step in (1, num_draft_tokens + 1)
    )
    assert torch.equal(one_by_one, rounds)


def test_exact_attention_respects_windows():
    models = [
        TorchBackend.of(
            tiny_model("mistral", torch.float64, sliding_window=5), PackingConfig(exact=exact)
        )
        for exact in (True, False)
    ]
    exact, masked = (plain(model, prompt_of(9)) for model in models)
    assert exact == masked == output(models[0], prompt_of(9), exit_layer=3, num_draft_tokens=4)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", KINDS)
def test_exact_decoding_of_other_kinds_of_layers(model_type, dtype):
    model = packed(dtype, model_type, exact=True)
    for length in (5, 9):
        expected = plain(model, prompt_of(length))
        drafted, stats = output(model, prompt_of(length), exit_layer=4, num_draft_tokens=5)
        assert drafted == expected and stats.drafted > 0


def test_draft_vocab_follows_the_token_order_of_the_checkpoint(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "ordered")
    (folder / "token_order.json").write_text("[299, 7, 30]")
    ids = torch.tensor([[1, 2]])
    config = json.loads((folder / "config.json").read_text())
    for version in ("5.0", "4.0"):  # read without transformers, and by transformers
        (folder / "config.json").write_text(json.dumps({**config, "transformers_version": version}))
        backend = for_decoding(str(folder), "cpu", "fp32", PackingConfig(draft_vocab=2)).backend
        with torch.inference_mode():
            hidden = backend.embed(ids)
            found = backend.draft_sides[None].at_exits.unembed(hidden)
            torch.testing.assert_close(found, backend.unembed(hidden)[..., [299, 7]])
    (folder / "token_order.json").write_text("[300]")
    refused = run("generate", "x", f"--model {folder}")
    assert (
        refused.code == 1
        and "token_order.json must be a list of distinct token ids below 300" in refused.err
    )


def test_weight_flags_on_the_command_line(tmp_path, checkpoint):
    fixed = f"--model {checkpoint} --max-new-tokens 12 --dtype fp32 --exit 4"
    expected = run("generate", "wake me up", fixed)
    drafted = run(
        "generate", "wake me up", fixed, "--draft-weights int8 --draft-vocab 200 --exact --stats"
    )
    assert (drafted.code, drafted.out) == (0, expected.out)
    eight = run("generate", "wake me up", fixed, "--quantize int8 --stats")
    assert eight.code == 0 and "layers: packed (int8), float32 on cpu" in eight.err
    fails(
        "int4 weights need layer widths that the group size 32 divides, got 48",
        "generate", "x", fixed, "--quantize int4",
    )  # fmt: skip
    fails(
        "--draft-weights must be a list, each one of int8, int4, got fp8",
        "generate",
        "x",
        fixed,
        "--draft-weights fp8",
    )
