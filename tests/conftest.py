"""Tiny random models on the CPU. No network, ever, and no test in the folder that pytest was
started in.
"""

import gc
import json
import os
import re
import sys
import time
from contextlib import chdir
from dataclasses import replace
from itertools import accumulate, count, pairwise, repeat, starmap
from pathlib import Path
from random import Random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings as hypothesis_settings
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerskip_core.model.blocks import FORMS, block_rows
from layerskip_core.model.cache import Places

# Not 0: rounding and times of another one, see machines.md
OTHER_CPU = int(os.environ.get("LAYERSKIP_TEST_CPU", 0))
if OTHER_CPU:
    # Of 1 ms
    _clock = time.perf_counter
    _delays = accumulate(starmap(Random(OTHER_CPU).expovariate, repeat((1e3,))))
    time.perf_counter = lambda: _clock() + next(_delays)

# Of no run before, and no clock
hypothesis_settings.register_profile("layerskip", database=None, deadline=None)
hypothesis_settings.load_profile("layerskip")

_FOLDERS = [str(folder) for folder in Path(__file__).parents[:2]]
# Processes that tests start find what pytest finds, wherever they start.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*_FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])]
)

_SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.5, 2.0, 2.5],
    "long_factor": [4.0, 5.0, 6.0],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
}
CHANGES = {  # what makes each architecture differ from Llama in every way that it can
    **{
        model_type: {"sliding_window": 5}
        for model_type in ("mistral", "ministral", "gemma3_text", "olmo3", "starcoder2")
    },
    **{
        model_type: {"sliding_window": 5, "sliding_window_pattern": 2}
        for model_type in ("exaone4", "cohere2")
    },
    "seed_oss": {"attention_out_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 24},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.7,
    },
    "granitemoe": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.7,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
    },
    "mixtral": {"sliding_window": 5, "num_local_experts": 4},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "phi3": {
        "sliding_window": 5,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            **LONGROPE,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
        },
    },
}
_MAMBA2 = {
    "layer_types": "linear_attention",
    "mamba_chunk_size": 16,  # transformers computes whole chunks
    "mamba_n_groups": 2,
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
}
_DELTA = {
    "layer_types": "linear_attention",
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
_SHARED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXERS = {  # types that TorchBackend lacks, whose layers are not all of full attention, and what the others are
    "lfm2": {"layer_types": "conv"},
    "gpt_oss": {
        "layer_types": "sliding_attention",
        "sliding_window": 5,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_alpha": 1.4,
        "swiglu_limit": 2.0,
        "rope_parameters": {**YARN, "truncate": False},
        "intermediate_size": 64,
    },
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_SHARED, "shared_expert_intermediate_size": 32},
    "qwen3_next": {
        **_DELTA,
        **_SHARED,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [3],
    },
    "granitemoehybrid": {
        **{**_MAMBA2, **CHANGES["granite"], "num_local_experts": 0, "num_experts_per_tok": 0},
        "shared_intermediate_size": 96,
        "mamba_proj_bias": True,
        "tie_word_embeddings": True,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 4]},
    "nemotron_h": {
        "layer_types": "linear_attention",
        "chunk_size": 16,
        "n_groups": 2,
        "mamba_num_heads": 4,
        "ssm_state_size": 8,
        "mamba_head_dim": 16,
        "time_step_min": 1e-9,  # transformers has no limit where it runs one token
    },
}
DENSE_MIXERS = [name for name, changes in MIXERS.items() if "num_experts" not in changes]
OWN_LAYERS = [*MIXERS, "gemma4_text"]  # types whose layers PyTorch's kernels lack
ATTENTION = {"gemma2": "eager"}  # PyTorch's cannot cap scores


def at(positions, cache):
    """The places of tokens at positions (B, T) of the rows of a cache."""
    starts = positions[:, 0].tolist()
    count = positions.shape[1]
    assert torch.equal(positions, torch.tensor(starts)[:, None] + torch.arange(count))
    return Places(cache, starts, [count] * len(starts))


def ids_of(batch, length):
    """Ids (B, T) of the tiny model's tokens."""
    return torch.randint(3, 67, (batch, length), generator=torch.Generator().manual_seed(length))


def run_texts(model, hidden, start, stop):
    """Layers start..stop-1 over the states (B, T, D) of whole texts."""
    with torch.no_grad():
        return model.run_layers(
            hidden, start, stop, model.new_cache(*hidden.shape[:2]).span(0, hidden.shape[1])
        )


def tiny_model(model_type: str = "llama", dtype: torch.dtype = torch.float64, **changes: object):
    """A random model of six layers. Its weights are larger than usual, so that logits and exits
    differ clearly.
    """
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[model_type]
    shape = {
        name: size
        for name, size in _SHAPE.items()
        if not isinstance(getattr(kind, name, None), property)
    }
    if model_type in MIXERS:
        layers = range(changes.get("num_hidden_layers", _SHAPE["num_hidden_layers"]))
        shape |= MIXERS[model_type]
        other = shape.pop("layer_types")
        kinds = ["full_attention" if layer % 3 == 1 else other for layer in layers]
        if model_type == "nemotron_h":
            shape["layers_block_type"] = [
                "mlp" if layer % 3 == 2 else kind for layer, kind in enumerate(kinds)
            ]
        elif model_type != "bamba":
            shape["layer_types"] = kinds
    # In which later layers share keys, and not all heads have one size
    if model_type == "gemma4_text":
        layers = changes.get("num_hidden_layers", _SHAPE["num_hidden_layers"])
        kinds = [
            "sliding_attention" if layer % 2 and layer < layers - 1 else "full_attention"
            for layer in range(layers)
        ]
        shape |= {
            "layer_types": kinds,
            "sliding_window": 5,
            "num_kv_shared_layers": max(0, min(3, layers - 2)),
        }
        shape |= {
            "global_head_dim": 2 * changes.get("head_dim", shape["head_dim"]),
            "use_double_wide_mlp": True,
        }
        shape |= {
            "hidden_size_per_layer_input": changes.get("hidden_size", shape["hidden_size"]) // 2,
            "final_logit_softcapping": 30.0,
        }
        shape |= {"vocab_size_per_layer_input": changes.get("vocab_size", shape["vocab_size"])}
    config = kind(**{**shape, **changes})
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION.get(model_type))
        .to(dtype)
        .eval()
    )
    if config.to_dict().get("num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the other one lacks fp64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0 if "embed" not in name else 20.0)
        for layer, scale in enumerate(
            part for name, part in model.named_buffers() if name.endswith("layer_scalar")
        ):
            scale.fill_(1.5 - 0.25 * layer)
    return as_on_this_cpu(model)


def random_rows(name, outputs, inputs, seed=0, size=0.05):
    """Rows of blocks of a GGUF file: random levels and steps; scales such that weights are about
    `size`.
    """
    form = FORMS[name]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (outputs * inputs // form.inputs, form.bytes), np.uint8)
    if form.by_table:
        blocks[:, 0] = 122 + round(np.log2(size / 0.05)) + generator.integers(-2, 3, len(blocks))
        return block_rows(torch.from_numpy(blocks.reshape(outputs, -1)), name)
    scales = np.abs(generator.normal(1, 0.3, (len(blocks), form.factors)))
    scales *= size / 2 ** (form.bits - 2) / (32 if form.step_inputs else 1)
    # Minima of weights around 0
    scales[:, 1:] *= (1 if form.step_inputs else -1) * 2 ** (form.bits - 1)
    blocks[:, 2] = generator.integers(5, 12, len(blocks)) if form.offset < 0 else blocks[:, 2]
    blocks[:, form.scales_at : form.scales_at + 2 * form.factors] = scales.astype(np.float16).view(
        np.uint8
    )
    return block_rows(torch.from_numpy(blocks.reshape(outputs, -1)), name)


def as_on_this_cpu(model):
    """The model, with the rounding of another CPU in its weights if LAYERSKIP_TEST_CPU says so."""
    if OTHER_CPU:
        rounding = torch.Generator().manual_seed(OTHER_CPU)
        for parameter in model.parameters():
            parameter.data.mul_(
                1 + 1e-6 * torch.randn(parameter.shape, generator=rounding, dtype=torch.float64)
            )
    return model


def logits_of(model, ids, edges=(), side=None):
    """Logits (B, T, V) of tokens that run in pieces between the edges, through one cache. `side`:
    one that drafts.
    """
    unembed = model.unembed
    layers = model
    cache = model.new_cache(len(ids))
    pieces = []
    if side is not None:
        unembed = side.whole.unembed
        layers = side.layers
    with torch.inference_mode():
        for start, stop in pairwise([0, *edges, ids.shape[1]]):
            hidden = layers.embed(ids[:, start:stop])
            places = cache.span(start, stop)
            hidden = layers.run_layers(hidden, 0, 1, places)
            pieces.append(unembed(layers.run_layers(hidden, 1, (side or model).num_layers, places)))
    return torch.cat(pieces, dim=1)


def require_near(found, expected, share):
    """No number differs by more than this share of the expected ones' standard deviation."""
    torch.testing.assert_close(found, expected, atol=share * float(expected.std()), rtol=0)


def edit_json(file, **changes):
    """Changes entries of a JSON file; one that becomes "absent" goes."""
    document = {**json.loads(Path(file).read_text()), **changes}
    Path(file).write_text(
        json.dumps({key: value for key, value in document.items() if value != "absent"})
    )


def older(folder):
    """Makes the folder one that only transformers reads."""
    edit_json(Path(folder) / "config.json", transformers_version="4.0")


_frozen = 0  # modules


def pytest_runtest_setup():
    """Keeps the garbage collector from what libraries made when they were imported, which takes a
    tenth of all tests' time.
    """
    global _frozen
    if len(sys.modules) > _frozen + 200:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


class Progress:
    """Instead of a dot for each test: every ten seconds how many are done, and the newest one's
    name; and each failure.
    """

    def __init__(self, session, reporter):
        self.session = session
        self.reporter = reporter
        self.done = 0
        self.told = time.monotonic()

    def pytest_report_teststatus(self, report):
        if report.failed:
            self.reporter.write_line(f"FAILED {report.nodeid}")
        return "" if report.passed and report.when != "call" else report.outcome, "", ""

    def pytest_runtest_logfinish(self, nodeid):
        self.done += 1
        if time.monotonic() > self.told + 10 or self.done == self.session.testscollected:
            self.told = time.monotonic()
            self.reporter.write_line(
                f"{self.done} of {self.session.testscollected}: {nodeid}"[:130]
            )


def pytest_sessionstart(session):
    # The process that hands tests to others
    if getattr(session.config.option, "dist", "no") != "no":
        session.config.pluginmanager.register(
            Progress(session, session.config.pluginmanager.get_plugin("terminalreporter"))
        )


# What tests write need not outlive this machine, and each call takes 10 ms
os.fsync = lambda _: None


@pytest.fixture(scope="session", autouse=True)
def folders(tmp_path_factory):
    """Makes empty folders. pytest's own way looks through all earlier ones, so that thousands of
    tests take minutes.
    """
    root = tmp_path_factory.mktemp("session")
    number = count()
    os.environ["LAYERSKIP_CACHE"] = str(root / "cache")

    def make(name):
        made = root / f"{name}{next(number)}"
        made.mkdir()
        return made

    with chdir(make("session")):  # in which fixtures that outlive a test start
        yield make


@pytest.fixture(autouse=True)
def own_folder(folders):
    """Every test starts in an empty folder of its own: what lies in the checkout cannot matter, and
    nothing is left there.
    """
    with chdir(folders("here")):
        yield


@pytest.fixture
def tmp_path(folders, request):
    return folders(re.sub(r"\W", "_", request.node.name)[:30])


@pytest.fixture(scope="session", autouse=True)
def few_visits():
    from command_line import measure_little

    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch)
        yield


@pytest.fixture(scope="session")
def llama():
    return tiny_model()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with the tiny model of `evaluating`: six layers, a context of 128 tokens, a
    tokenizer of 300 entries.
    """
    from evaluating import tiny_loaded

    from layerskip_core.checkpoint.save import save_checkpoint

    loaded = tiny_loaded(torch.float32)
    folder = str(tmp_path_factory.mktemp("checkpoint") / "tiny")
    # So that it is decoded speculatively by default
    info = replace(loaded.info, exit_layer=1, num_draft_tokens=6)
    save_checkpoint(loaded.backend.model, loaded.tokenizer, info, folder, torch.float32)
    return folder


@pytest.fixture
def wide(tmp_path):
    """A folder with a model like that of `checkpoint`, of widths that int4 kernels run."""
    from evaluating import tiny_loaded

    from layerskip_core.checkpoint.save import save_checkpoint

    loaded = tiny_loaded(torch.float32, hidden_size=64, intermediate_size=96)
    save_checkpoint(
        loaded.backend.model, loaded.tokenizer, loaded.info, str(tmp_path / "wide"), torch.float32
    )
    return tmp_path / "wide"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a small untrained model of four layers, a context of 256 tokens, 300
    entries.
    """
    from training_runs import saved_base

    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory):
    from training_runs import saved_base

    return saved_base(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=64)


@pytest.fixture(scope="session")
def forks():
    from forks import Forks

    return Forks()


@pytest.fixture
def settings(base, tmp_path):
    """Makes the FinetuneConfig of a run of a few steps on `base`, into `out`."""
    from training_runs import settings_on

    return settings_on(base, tmp_path)
