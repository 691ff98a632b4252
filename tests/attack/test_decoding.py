"""Random architectures and shapes on every backend give the logits of transformers; random settings
change no row's tokens.
"""

import math
from functools import cache
from math import inf

import pytest
import torch
from attacking import examples
from conftest import MIXERS, at, run_texts, tiny_model
from decodings import COUNTS, answer_of, letters
from exit_block_models import random_blocks
from fp64 import compute_in_fp64
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import Prefixes, Scheduler, decode_batch, new_row, without_failure
from layerskip_core.model import (
    ModelSpec,
    NativeBackend,
    TorchBackend,
    TransformersBackend,
    can_run_native,
    missing_feature,
)
from layerskip_core.model.architectures import ARCHITECTURES
from layerskip_core.model.exit_blocks import NO_STORED_DRAFTERS, ExitBlock

LEARNED = {"original_max_position_embeddings": 32}
ROPES = (
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1.0},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, **LEARNED},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0, **LEARNED},
)  # fmt: skip
REDUCED = ((torch.bfloat16, None), (torch.float32, "int8"), (torch.bfloat16, "int4"))


@st.composite
def shapes(draw, architecture):
    """The fields of a config that differ from its type's defaults."""

    def of(*values):
        return draw(st.sampled_from(values))

    heads = of(4, 1, 2, 3, 6, 8)
    layers = draw(st.integers(1, 5))
    shape = {
        "vocab_size": of(67, 5, 31, 256, 513),
        "hidden_size": heads * of(8, 1, 2, 5, 16, 20),
        "intermediate_size": of(48, 1, 7, 16, 64, 100),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": of(*(kv for kv in range(1, heads + 1) if heads % kv == 0)),
        "head_dim": of(8, 2, 4, 16, 20, 64),
        "max_position_embeddings": of(128, 16, 2048),
        "rms_norm_eps": of(1e-6, 1e-2),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": None,
    }
    kind = ARCHITECTURES[architecture]
    shape[kind.norm_eps] = shape.pop("rms_norm_eps")
    shape |= {name: draw(st.booleans()) for name in kind.biases if isinstance(name, str)}
    if kind.partial_rope:
        shape["head_dim"] = of(16, 64)
    # Whose norms of queries are as wide as its states
    if "head_dim" in kind.values or architecture == "olmoe":
        shape["hidden_size"] = heads * shape["head_dim"]
    if kind.windows in ("all", "listed"):
        shape["sliding_window"] = of(5, 1, 2, 16, 4096)
    if architecture in ("gemma2", "gemma3_text", "olmo3", "exaone4", "cohere2"):
        shape["layer_types"] = [of("sliding_attention", "full_attention") for _ in range(layers)]
    if architecture == "gemma4_text":
        own = [
            *(
                of("sliding_attention", "full_attention")
                for _ in range(draw(st.integers(0, layers - 1)))
            ),
            "full_attention",
        ]
        sharing = layers - len(own)
        shape["layer_types"] = [
            *own,
            *(of(*own) for _ in range(sharing - 1)),
            *own[-1:] * (sharing > 0),
        ]
        shape |= {
            "num_kv_shared_layers": sharing,
            "use_double_wide_mlp": draw(st.booleans()),
            "global_head_dim": of(16, 64, 512),
        }
        # Else transformers needs some
        shape |= {"hidden_size_per_layer_input": of(8, 1, 16) if sharing else of(8, 0)}
        shape |= {
            "vocab_size_per_layer_input": shape["vocab_size"],
            "final_logit_softcapping": of(30.0, None),
        }
    if architecture == "qwen2":
        shape |= {
            "use_sliding_window": draw(st.booleans()),
            "sliding_window": 4,
            "max_window_layers": layers // 2,
        }
    if architecture == "smollm3":
        shape["no_rope_layers"] = [draw(st.integers(0, 1)) for _ in range(layers)]
    if architecture in ("gpt_neox", "stablelm"):
        shape["use_parallel_residual"] = draw(st.booleans())
    if architecture == "falcon":
        del shape["head_dim"]
        shape |= of({}, {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2})
        shape["num_kv_heads"] = shape.pop("num_key_value_heads")
    if kind.mixer is not None:
        kinds = "full_attention", kind.mixer.kind, *(("mlp",) if kind.one_sublayer else ())
        listed = [*(of(*kinds) for _ in range(layers - 1)), "full_attention"]
        if architecture == "bamba":
            shape["attn_layer_indices"] = [
                layer for layer, own in enumerate(listed) if own == "full_attention"
            ]
        else:
            shape["layers_block_type" if architecture == "nemotron_h" else "layer_types"] = listed
    if architecture in ("bamba", "granitemoehybrid"):
        shape |= {
            "mamba_n_groups": of(1, 2),
            "mamba_n_heads": 2,
            "mamba_d_state": of(8, 5, 64),
            "mamba_d_conv": of(4, 1, 2),
            "mamba_chunk_size": of(16, 4),
        }
        shape["mamba_proj_bias"] = draw(st.booleans())
    if architecture == "granitemoehybrid":
        shape |= {
            "num_local_experts": of(0, 4),
            "shared_intermediate_size": of(96, 48),
            "intermediate_size": of(48, 32),
        }
        shape["position_embedding_type"] = of("rope", "nope", None)
    if architecture == "nemotron_h":
        del shape["num_hidden_layers"]
        groups = of(1, 2, 3)
        shape |= {
            "n_groups": groups,
            "mamba_num_heads": groups * of(1, 2),
            "ssm_state_size": of(8, 5, 64),
        }
        shape |= {
            "mamba_head_dim": of(16, 7, 40),
            "conv_kernel": of(4, 1, 2),
            "chunk_size": of(16, 4),
            "time_step_min": 1e-9,
        }
    if architecture == "lfm2":
        shape |= {
            "conv_bias": draw(st.booleans()),
            "conv_L_cache": of(3, 1, 2, 8, 9),
            "block_multiple_of": of(16, 1),
        }
        # Of which it takes two thirds
        shape["intermediate_size"] = max(2, shape["intermediate_size"])
    if architecture in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"):
        key_heads = of(1, 2, 3)
        shape |= {
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": key_heads * of(1, 2, 3),
        }
        shape |= {"linear_key_head_dim": of(8, 5, 64), "linear_value_head_dim": of(16, 7, 40)}
        shape["linear_conv_kernel_dim"] = of(4, 1, 2)
    if kind.experts is not None:  # a type's usual ones take gigabytes
        count = of(4, 1, 3, 8)
        names = (
            ("num_local_experts",)
            if architecture in ("granitemoe", "mixtral")
            else ("num_experts",)
        )
        shape |= dict.fromkeys(names, count) | {
            "num_experts_per_tok": of(*range(1, count + 1)),
            kind.experts.inner: of(48, 1, 16),
            **({"shared_expert_intermediate_size": of(48, 96, 32)} if kind.experts.shared else {}),
        }
    if architecture == "granite":
        shape |= {
            "embedding_multiplier": of(0.5, 12.0),
            "residual_multiplier": of(0.22, 1.0),
            "logits_scaling": of(0.5, 8.0),
        }
    if architecture not in (
        "gemma3_text",
        "gemma4_text",
        "olmo3",
        "olmoe",
        "phi3",
        "gpt2",
        "falcon",
        "nemotron_h",
    ) and draw(st.booleans()):
        shape["rope_parameters"] = dict(of(*ROPES))
        # Transformers divides by head_dim - 2 where the type is dynamic
        shape["head_dim"] = max(4, shape["head_dim"])
    return shape


def shaped_model(architecture, shape, seed, dtype):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[architecture](**shape), attn_implementation="eager"
    )
    if model.config.to_dict().get("num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the other one lacks fp64
    model = model.to(dtype).eval()
    with torch.no_grad():
        # Norms and biases too: their initial values would hide faults
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    return model


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@examples(2)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_every_backend_gives_the_logits_of_transformers(architecture, data, seed):
    shape = data.draw(shapes(architecture))
    batch = data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, min(24, shape["max_position_embeddings"])))
    ids = torch.randint(
        0, shape["vocab_size"], (batch, count), generator=torch.Generator().manual_seed(seed)
    )
    cpu = torch.device("cpu")
    precisions = ((torch.float64, 1e-5), (torch.float32, 2e-3))
    # Transformers computes recurrences in fp32
    for dtype, tolerance in precisions[architecture in MIXERS :]:
        model = shaped_model(architecture, shape, seed, dtype)
        with pytest.MonkeyPatch.context() as patch:
            if dtype == torch.float64:
                compute_in_fp64(model, patch)
            with torch.inference_mode():
                reference = model(ids).logits.double()
            require_same(TransformersBackend(model), ids, reference, tolerance, data)
            if not missing_feature(ModelSpec.of(model.config)):
                require_same(TorchBackend.of(model), ids, reference, tolerance, data)
        if can_run_native(ModelSpec.of(model.config), dtype, cpu, None):
            native = NativeBackend.of(shaped_model(architecture, shape, seed, dtype))
            require_same(native, ids, reference, tolerance, data, same_bits=True)
    dtype, quantize = data.draw(st.sampled_from(REDUCED))
    packing = PackingConfig(quantize)
    if can_run_native(ModelSpec.of(model.config), dtype, cpu, packing):
        native = NativeBackend.of(shaped_model(architecture, shape, seed, dtype), packing)
        require_same(native, ids, reference, math.inf, data, same_bits=True)


def require_same(model, ids, reference, tolerance, data, same_bits=False):
    """All tokens at once, and in pieces whose layers run in two spans. `tolerance`: of the largest
    logit.
    """
    batch, count = ids.shape
    positions = torch.arange(count).expand(batch, -1)
    with torch.inference_mode():
        whole = model.unembed(run_texts(model, model.embed(ids), 0, model.num_layers))
        cache = model.new_cache(batch)
        pieces = []
        start = 0
        while start < count:
            stop = data.draw(st.integers(start + 1, count))
            middle = data.draw(st.integers(0, model.num_layers))
            hidden = model.run_layers(
                model.embed(ids[:, start:stop]), 0, middle, at(positions[:, start:stop], cache)
            )
            hidden = model.run_layers(
                hidden, middle, model.num_layers, at(positions[:, start:stop], cache)
            )
            pieces.append(model.unembed(hidden))
            start = stop
        together = torch.cat(pieces, dim=1)
    scale = reference.abs().max().clamp_min(1e-9)
    for logits in (whole, together):
        assert torch.isfinite(logits).all()
        assert float((logits.double() - reference).abs().max() / scale) <= tolerance
    assert not same_bits or torch.equal(whole, together)


STRATEGIES = (
    "autoregressive",
    "early-exit",
    "self-speculative",
    "adaptive",
    "lookup",
    "draft-and-verify",
)
KINDS = (
    "generic",
    "generic gemma3_text",
    "packed",
    "packed mistral",
    "packed smollm3",
    "packed qwen2",
    "packed int8 drafts",
    "packed int4 few drafts",
    "native",
    "native bf16",
    "native int8",
    "native int4",
    "native int8 drafts",
    "native few drafts",
    "native gemma2",
    "native gemma3_text",
    "native granite",
    "native olmo3",
    "native phi3",
    "native starcoder2",
    "native qwen3",
    "native smollm3",
)
PACKING = {
    "int8": PackingConfig(quantize="int8"),
    "int4": PackingConfig(quantize="int4"),
    "int8 drafts": PackingConfig(draft_weights=("int8",)),
    "int4 few drafts": PackingConfig(draft_weights=("int4",), draft_vocab=40),
    "few drafts": PackingConfig(draft_vocab=30),
}


@cache
def model_of(kind, exits, scale):
    backend, _, rest = kind.partition(" ")
    architecture = rest if rest in ARCHITECTURES else "llama"
    changes = {"sliding_window": 5} if architecture in ("mistral", "gemma3_text") else {}
    dtype = {"bf16": torch.bfloat16, "int4": torch.bfloat16}.get(
        rest, torch.float32 if backend == "native" else torch.float64
    )
    if backend == "native" or rest in PACKING:
        changes = {"intermediate_size": 64, "hidden_size": 64}
    model = tiny_model(architecture, dtype, **changes)
    packing = PACKING.get(rest)
    blocks = (
        random_blocks(model, *map(ExitBlock, exits), scale=scale) if exits else NO_STORED_DRAFTERS
    )
    if backend == "generic":
        return TransformersBackend(model, blocks)
    if backend == "packed":
        return TorchBackend.of(model, packing, stored_drafters=blocks)
    if not can_run_native(ModelSpec.of(model.config), dtype, torch.device("cpu"), packing):
        pytest.skip("no compiled kernels here")
    return NativeBackend.of(model, packing, stored_drafters=blocks)


@st.composite
def models(draw, kind):
    exits = draw(st.sampled_from([(), (), (1,), (2, 4), (1, 3, 5)]))
    return model_of(kind, exits, draw(st.sampled_from([0.05, 0.3, 2.0])))


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
        draw(layers if drafts else st.integers(1, model.num_layers)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from([12, 30, 5, 2, 1, 500])),
        tuple(letters(known[place : place + 2]) for place in places),
        draw(st.sampled_from(list(model.draft_sides)))
        if strategy in ("self-speculative", "draft-and-verify")
        else None,
        lookup=draw(st.sampled_from([0, 0, 1, 2, 5])) if drafts else 0,
        temperature=draw(st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 40])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.1])),
        seed=draw(st.integers(0, 999)),
        exits=(tuple(model.exit_blocks) or any_exits) if strategy == "adaptive" else (),
        skip=tuple(draw(st.sets(layers, min_size=1, max_size=4)))
        if strategy == "draft-and-verify"
        else (),
    )


@pytest.mark.parametrize("kind", KINDS)
@examples(4)
@given(data=st.data())
def test_drafts_batches_and_joins_change_no_tokens(kind, data):
    model = data.draw(models(kind))
    prompts = data.draw(
        st.lists(st.lists(st.integers(3, 66), min_size=1, max_size=14), min_size=1, max_size=4)
    )
    known = answer_of(
        model, prompts[0], DecodingConfig("autoregressive", max_new_tokens=20), frozenset()
    )[0]
    config = data.draw(configs(model, known))
    ends = frozenset(data.draw(st.lists(st.sampled_from(known), max_size=2)))
    single = [answer_of(model, prompt, config, ends) for prompt in prompts]
    for prompt, (ids, reason, stats) in zip(prompts, single, strict=True):
        require_consistent(model, len(prompt), config, ids, reason, stats)
    drafts = config.strategy not in ("autoregressive", "early-exit")
    sampled = config.temperature > 0
    if drafts and not sampled:
        plain = DecodingConfig("autoregressive", None, 1, config.max_new_tokens, config.stop)
        for prompt, answer in zip(prompts, single, strict=True):
            assert answer[:2] == answer_of(model, prompt, plain, ends)[:2]
            assert answer[:2] == answer_of(model, prompt, config, ends, reuse_exit_states=False)[:2]
    require_prefixes_to_change_nothing(model, prompts, config, ends)
    if sampled and drafts:  # the other rows of a batch limit the number of drafts, and so the draws
        return
    assert joined(data, model, prompts, config, ends) == [ids for ids, _, _ in single]
    same_drafts = config.strategy != "adaptive" and (
        not config.lookup or config.strategy == "lookup"
    )
    # There, the longest row limits the drafts
    near_the_end = any(reason == "context" for _, reason, _ in single)
    outputs = decode_batch(model, prompts, config, ends, letters)
    for output, (ids, reason, stats) in zip(outputs, single, strict=True):
        assert (output.ids, output.finish_reason) == (ids, reason)
        for name in COUNTS if same_drafts and not near_the_end else ():
            assert getattr(output.stats, name) == getattr(stats, name), name


def require_consistent(model, prompt_tokens, config, ids, reason, stats):
    """The counts of one output do not contradict each other."""
    assert (stats.prompt_tokens, stats.new_tokens) == (prompt_tokens, len(ids))
    assert 0 <= stats.accepted <= stats.drafted and stats.accepted < max(1, len(ids))
    assert (
        sum(count for source, count in stats.steps_by_drafter.items() if source != "plain")
        == stats.rounds
    )
    assert sum(stats.accepted_by_position) == stats.accepted and stats.rounds <= stats.drafted
    room = min(config.max_new_tokens, model.spec.context - prompt_tokens)
    assert len(ids) <= room
    assert (reason in ("length", "context")) == (len(ids) == room and reason not in ("eos", "stop"))
    assert all(0 <= token < model.spec.vocab for token in ids)
    # A token of the prefill, and one of each step
    if config.strategy == "adaptive" and reason == "length":
        assert sum(stats.steps_by_drafter.values()) + stats.accepted == len(ids) - 1


def require_prefixes_to_change_nothing(model, prompts, config, ends):
    """Texts one after another, each beginning with a part of the one before, as the turns of a
    conversation do.
    """
    kept = Prefixes(inf, 2, 1)
    text = prompts[0]
    for more in (*prompts[1:], prompts[0]):
        expected = answer_of(model, text, config, ends)[0]
        ids = answer_of(model, text, config, ends, prefixes=kept)[0]
        assert ids == expected
        longer = [*text, *ids, *more]
        text = longer if len(longer) < model.spec.context // 2 else text[: len(more)]


def joined(data, model, prompts, config, ends):
    """The outputs of prompts of which each joins the others after some of their steps."""
    scheduler = Scheduler(model)
    rows = [new_row(model, prompt, config, ends, letters) for prompt in prompts]
    for row in rows:
        scheduler.add(row)
        for _ in range(data.draw(st.integers(0, 3))):
            without_failure(scheduler.step())
    while not scheduler.is_idle:
        without_failure(scheduler.step())
    return [row.output for row in rows]
