"""Every decoder-only model type of transformers, cut at its layers: against the whole model, and
decoding on it.
"""

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
import torch
from conftest import at, run_texts
from decoder_types import LAYERS, tiny
from decodings import entries, ids_of, plainly, prompt_of
from training_runs import recipe_module
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.loaded import Trainable
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.training import RecipeSettings
from layerskip_core.decoding import (
    DecodingLoop,
    Prefixes,
    Scheduler,
    decode,
    new_row,
    without_failure,
)
from layerskip_core.errors import CheckpointError
from layerskip_core.export.run import cut_to_exit
from layerskip_core.model import TransformersBackend
from layerskip_core.model.exit_blocks import NO_STORED_DRAFTERS, ExitBlock, StoredDrafters
from layerskip_core.training.exit_blocks import FrozenExits
from layerskip_core.training.recipe import RunStep

CUT = (
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "biogpt", "bitnet", "bloom", "codegen", "cohere",
    "cohere2", "cohere2_moe", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "diffllama",
    "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "flex_olmo", "gemma", "gemma2",
    "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "jais2", "jetmoe",
    "kolibri1", "laguna", "llama", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3",
    "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder", "mpt", "nanochat",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm",
    "youtu",
)  # fmt: skip
RECURRENT = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "inkling_text", "jamba", "kimi_linear", "lfm2",
    "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_next", "qwen3_5_text",
    "qwen3_5_moe_text", "zamba2",
)  # fmt: skip
REFUSED = {
    # It puts tokens of its own before the prompt
    "cpmant": "its layers have hidden states of the shape .* for tokens",
    # Whose entries stand for several tokens
    "deepseek_v4": "it needs `store_compression_weights` of its cache",
    "openai-gpt": "it has no KV cache",
    "qwen4_exp_text": "(it needs `indexer_position_ids` of its cache|index out of range)",
    "recurrent_gemma": "(its logits differ by .* when it goes on from a cache|it needs `get_mask_sizes`)",  # in modules
    "rwkv": "it has no KV cache",  # and scales hidden states between layers
    # Its routers hand on states of their own
    "zaya": "its logits differ by .* when each layer runs alone",
}


# No attention; more than a norm before the head
WITHOUT_BLOCKS = ("falcon_mamba", "gemma3n_text", "mamba", "mamba2")
NO_EXPORT = {
    "minicpm3": "has other logits",  # its residual scale depends on the number of layers
    "olmo_hybrid": "expects at least one attention layer",
}


def known(model_types):
    return [
        model_type for model_type in model_types if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]


def test_no_type_is_left_out():
    """Types that are no decoder-only language models of text alone, or have a twin here, are not
    counted.
    """
    assert len({*CUT, *RECURRENT, *REFUSED}) == 118


@pytest.mark.parametrize("model_type", known(CUT + RECURRENT))
def test_a_cut_model_is_the_whole_one(model_type, tmp_path):
    model = tiny(model_type)
    ids = torch.tensor([prompt_of(13), prompt_of(13, 1)])
    with torch.inference_mode():
        start, whole = (model(input_ids=part, use_cache=False).logits for part in (ids[:, :4], ids))
        if not torch.allclose(start, whole[:, :4], atol=1e-3):
            # Doge in 5.17
            pytest.skip("in this version of transformers, its tokens see later ones")
    backend = TransformersBackend(model)
    check_logits(model, backend, ids)
    check_outputs(backend)
    check_propagation(backend, ids)
    if model_type in RECURRENT:
        check_rollback(backend)
        check_turns(backend)
    check_recipe(model, ids)
    check_exit_block(model, backend, ids)
    check_exit(model, backend, ids, tmp_path)  # the model is less afterwards


def check_logits(model, backend, ids):
    """7 tokens are prefilled, then one by one, three and two: each piece by the first layers, and
    the others from there.
    """
    cache = backend.new_cache(len(ids))
    pieces = []
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        for start, stop in pairwise([0, 7, 8, 11, 13]):
            positions = torch.arange(start, stop).expand(2, -1)
            hidden = backend.embed(ids[:, start:stop])
            for first, last in pairwise((0, 1, 2, LAYERS)):
                hidden = backend.run_layers(hidden, first, last, at(positions, cache))
            pieces.append(backend.unembed(hidden))
    assert expected.std() > 0.03
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-3, atol=1e-4)


def check_outputs(backend):
    """Drafts of the first layers and rows at different positions, one of which joins later, change
    no token.
    """
    prompts = [prompt_of(length) for length in (5, 14)]
    plain = [plainly(backend, prompt, 6) for prompt in prompts]
    drafting = DecodingConfig(exit_layer=2, num_draft_tokens=3, max_new_tokens=6)
    scheduler = Scheduler(backend)
    rows = [new_row(backend, prompt, drafting) for prompt in prompts]
    for row in rows:
        scheduler.add(row)
        without_failure(scheduler.step())
    while not scheduler.is_idle:
        without_failure(scheduler.step())
    assert [row.output for row in rows] == plain


def check_propagation(backend, ids):
    """What layers write without the rest of them, for states of an exit at the positions of two
    rows.
    """
    caches = [backend.new_cache(2) for _ in range(2)]
    positions = torch.tensor([[9, 10], [7, 8]])
    with torch.inference_mode():
        for cache in caches:
            backend.run_layers(
                backend.embed(ids[:, :9]), 0, LAYERS, at(torch.arange(9).expand(2, -1), cache)
            )
            hidden = backend.run_layers(backend.embed(ids[:, 9:11]), 0, 1, at(positions, cache))
        backend.write_kv(hidden, 1, LAYERS, at(positions, caches[0]))
        for layer in range(1, LAYERS):
            backend.run_layers(hidden, layer, layer + 1, at(positions, caches[1]))
    for written, expected in zip(*(cache.parts.values() for cache in caches), strict=True):
        for row in range(written.capacity and 2):
            torch.testing.assert_close(entries(written, row), entries(expected, row))


def check_recipe(model, ids):
    """Dropped rows, and documents in a row, change nothing for the others; every layer gets a
    gradient, recomputed too.
    """
    module = recipe_module(model, RecipeSettings("finetune", p_max=0.5, curriculum="all"))
    gradients = []
    for recompute in (False, True):
        module.recompute = recompute
        torch.manual_seed(1)
        module.train()(ids, ids, RunStep(2, 10))["loss"].backward()
        gradients.append(
            {
                name: weight.grad
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
        )
        module.zero_grad()
    model.eval()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients[0].values())
    learning = {
        weight
        for name, weight in model.named_parameters()
        if name in gradients[0] and bool(gradients[0][name].any())
    }
    assert all(learning & set(layer.parameters()) for layer in module.backend.layers)
    documents = torch.tensor([[0] * 5 + [1] * 8, [0] * 13])
    with torch.no_grad():
        apart = module.texts.states(ids[:1, 5:], (LAYERS,))[LAYERS][0]
        dropped = module.texts.states(
            ids, (2, 3), documents, lambda layer: [1] if layer == 2 else range(2)
        )
        whole = module.texts.states(
            ids, (2, LAYERS), documents, lambda layer: range(2) if layer < 2 else [0]
        )
    torch.testing.assert_close(whole[LAYERS][0, 5:], apart, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dropped[2], whole[2])
    assert torch.equal(dropped[3][0], dropped[2][0]) and torch.equal(whole[LAYERS][1], whole[2][1])


def check_exit_block(model, backend, ids):
    """A block learns, gives in training what it gives in decoding, in pieces, and leaves the cache
    of the layers as it is.
    """
    if model.config.model_type in WITHOUT_BLOCKS:
        with pytest.raises(CheckpointError, match="can have no blocks"):
            FrozenExits(backend, [ExitBlock(2)])
        return
    module = FrozenExits(backend, [ExitBlock(2)])
    positions = torch.arange(13).expand(2, -1)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    decoding = TransformersBackend(model, StoredDrafters((ExitBlock(2),), module.weights().get))
    block = decoding.exit_blocks[2]
    cache = decoding.new_cache(2)
    with torch.no_grad():
        states = decoding.run_layers(decoding.embed(ids), 0, 2, at(positions, cache))
        finals = decoding.normed(decoding.run_layers(states, 2, LAYERS, at(positions, cache)))
        expected = module.exits["2"](states[..., : decoding.spec.hidden], ids)
        pieces = [
            (states[:, start:stop], cache.span(start, stop))
            for start, stop in pairwise([0, 7, 8, 11, 13])
        ]
        found = torch.cat(
            [
                decoding.run_layers(piece, block.layer, block.layer + 1, span)
                for piece, span in pieces
            ],
            dim=1,
        )
        last = decoding.run_layers(
            decoding.embed(ids[:, 12:]), 0, LAYERS, at(positions[:, 12:], cache)
        )
    torch.testing.assert_close(
        block.head(found), module.backend.head(expected), rtol=1e-4, atol=1e-4
    )  # a state counts for little in Falcon-H1
    torch.testing.assert_close(decoding.normed(last), finals[:, 12:], rtol=1e-4, atol=1e-4)
    module(ids, ids)["loss"].backward()
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    assert len(gradients) > 2 and all(bool(gradient.isfinite().all()) for gradient in gradients)


def check_exit(model, backend, ids, folder):
    """An exit is the model without its last layers, in memory and as it is exported."""
    with torch.inference_mode():
        early = backend.unembed(run_texts(backend, backend.embed(ids), 0, 2))
        loaded = Trainable("tiny", model, backend, None, CheckpointInfo())
        if why := NO_EXPORT.get(model.config.model_type):
            with pytest.raises(
                CheckpointError, match=f"exit 2 of tiny is no model of its own: .* {why}"
            ):
                cut_to_exit(loaded, 2, NO_STORED_DRAFTERS)
            return
        written = cut_to_exit(loaded, 2, NO_STORED_DRAFTERS)
        torch.testing.assert_close(
            early, model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-4
        )
        written.save_pretrained(folder)
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(
            early, read(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-4
        )


def check_rollback(backend):
    """Two rows go on from positions of their own, again and again, none further than `steps_back`
    before the end of a call.
    """
    ids = torch.tensor([prompt_of(24), prompt_of(24, 1)])
    cache = backend.new_cache(2)
    generator = torch.Generator().manual_seed(0)
    cache.steps_back = 3
    with torch.inference_mode():
        expected = backend.unembed(run_texts(backend, backend.embed(ids), 0, LAYERS))
        starts = torch.tensor([0, 0])
        count = 9
        for _ in range(12):
            positions = starts[:, None] + torch.arange(count)
            rows = torch.arange(2)[:, None]
            layer = int(torch.randint(1, LAYERS, (), generator=generator))
            hidden = backend.run_layers(
                backend.embed(ids[rows, positions]), 0, layer, at(positions, cache)
            )
            logits = backend.unembed(
                backend.run_layers(hidden, layer, LAYERS, at(positions, cache))
            )
            torch.testing.assert_close(logits, expected[rows, positions], rtol=1e-3, atol=1e-4)
            starts = starts + count - torch.randint(0, min(4, count), (2,), generator=generator)
            count = min(int(torch.randint(1, 5, (), generator=generator)), 24 - int(starts.max()))
            if count < 1:
                break
    assert starts.min() > 15


def check_turns(backend):
    """A prompt that goes on after all of the text before starts at its end, another at its own
    beginning.
    """
    prefixes = Prefixes(inf, 2, 1)
    text = prompt_of(9)
    adaptive = DecodingConfig(
        "adaptive", exits=(1, 2), num_draft_tokens=3, max_new_tokens=10, lookup=2
    )
    for config, reused in (
        (adaptive, 0),
        (adaptive, 18),
        (replace(adaptive, strategy="autoregressive"), 32),
    ):
        decoding = decode(backend, text, config, prefixes=prefixes)
        output = ids_of(decoding)
        assert output == plainly(backend, text, 10) and decoding.reused_tokens == reused
        text = [*text, *output, *prompt_of(4)]
    other = decode(backend, text[:-1], config, prefixes=prefixes)
    assert ids_of(other) == plainly(backend, text[:-1], 10) and other.reused_tokens == 46
    other = decode(backend, text[:20], config, prefixes=prefixes)
    assert ids_of(other) == plainly(backend, text[:20], 10) and other.reused_tokens == 0


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "kimi_linear", "qwen3_5_text"])
def test_an_exit_before_the_first_attention_is_a_model(model_type):
    """Transformers' own cache of such a model knows no length."""
    model = tiny.__wrapped__(model_type)
    backend = TransformersBackend(model)
    early = ids_of(
        decode(backend, prompt_of(9), DecodingConfig("early-exit", 1, max_new_tokens=12))
    )
    written = cut_to_exit(
        Trainable("tiny", model, backend, None, CheckpointInfo()), 1, NO_STORED_DRAFTERS
    )
    assert plainly(TransformersBackend(written), prompt_of(9), 12) == early


def test_shared_texts_with_recurrent_states():
    """A prompt that begins with all of another text starts at its end, one that differs before
    starts anew.
    """
    backend = TransformersBackend(tiny.__wrapped__("mamba2"))
    shared = Prefixes(2**24)
    text = prompt_of(80)
    config = DecodingConfig("self-speculative", 2, 3, 5)
    for prompt, reused in (
        (text, 0),
        ([*text, 5, 6], 80),
        ([*text, 7], 80),
        ([*text[:75], 8, 9], 0),
    ):
        loop = DecodingLoop(
            backend,
            [prompt],
            replace(config, num_draft_tokens=len(prompt) % 4 + 1),
            prefixes=shared,
        )
        assert ids_of(loop) == plainly(backend, prompt, 5) and loop.reused_tokens == reused


def test_layers_that_read_tokens_have_no_eagle3_drafter():
    with pytest.raises(
        CheckpointError, match="EAGLE-3 layout suits model_type gemma4_text: its layers read tokens"
    ):
        TransformersBackend(tiny("gemma4_text")).placed_eagle3(None, 0, PackingConfig())


@pytest.mark.parametrize("model_type", known(REFUSED))
def test_a_model_that_cannot_be_cut_says_why(model_type):
    with pytest.raises(
        CheckpointError,
        match=f"model_type {model_type} cannot be cut at its layers: {REFUSED[model_type]}",
    ):
        TransformersBackend(tiny(model_type))
