"""All that runs on a GPU, on a simulated one: no tensor is left on the CPU, results are the CPU's,
and waits are few.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from math import inf

import pytest
import torch
from conftest import run_texts, tiny_model
from decodings import ids_of
from evaluating import collect, own_answers
from exit_block_models import random_blocks, random_eagle3
from simulated_cuda import simulated_cuda
from training_runs import RECIPE, settings_on, train

from cli.commands.generate import stats_text
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import BenchConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.training import DrafterConfig, RecipeSettings
from layerskip_core.decoding import DecodingLoop, Prefixes, decode
from layerskip_core.decoding.dialogue import TextStream
from layerskip_core.decoding.prefixes import NO_PREFIXES
from layerskip_core.errors import ConfigError
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.harness.likelihood import likelihoods
from layerskip_core.model import ModelSpec, TorchBackend, TransformersBackend
from layerskip_core.model.exit_blocks import MTP, NO_STORED_DRAFTERS, ExitBlock
from layerskip_core.training import finetune_run as running

PROMPTS = [[30, 31, 32, 30, 31, 32, 30], [7, 9]]
SAMPLED = {"temperature": 0.8, "top_k": 20, "seed": 3}
DRAFTED = {"exit_layer": 3, "num_draft_tokens": 4}
SETTINGS = {
    "autoregressive": {"strategy": "autoregressive"},
    "self-speculative": DRAFTED,
    "adaptive": {"strategy": "adaptive", "exits": (2, 4), "num_draft_tokens": 4},
    "early exit": {"strategy": "early-exit", "exit_layer": 4},
    "exits by confidence": {"strategy": "early-exit", "exits": (2, 4), "exit_confidence": 0.1},
    "lookup": {"strategy": "lookup"},
    "mtp": {"strategy": "mtp", "num_draft_tokens": 4},
    "eagle3": {"strategy": "eagle3", "num_draft_tokens": 4},
    "draft-model": {"strategy": "draft-model", "num_draft_tokens": 4},
    "sampled by a draft model": {"strategy": "draft-model", "num_draft_tokens": 4, **SAMPLED},
    "layers left out": {"strategy": "draft-and-verify", "skip": (2, 5), "num_draft_tokens": 4},
    "penalties": {
        **DRAFTED,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
        "logit_bias": ((3, 2.0),),
        "min_tokens": 4,
    },
    "sampled": {**DRAFTED, **SAMPLED},
    "sampled by top-p": {**DRAFTED, "temperature": 0.8, "top_p": 0.9, "seed": 3},
    "sampled plainly": {"strategy": "autoregressive", **SAMPLED},
    "to an end": DRAFTED,
}
ENDS = {"to an end": frozenset(range(3, 67, 3)), "penalties": frozenset({2})}
ALONE = ("self-speculative", "exits by confidence", "eagle3", "to an end")
# Waits of the host in a step, if not one, in which it reads the verified tokens: it reads each draft
# where logits depend on the tokens before them.
WAITS = {"penalties": 6}
ORDER = torch.randperm(67, generator=torch.Generator().manual_seed(3)).tolist()
KINDS = {  # and what is decoded on them; blocks draft
    "generic": ("self-speculative", "sampled"),
    "packed": tuple(
        name
        for name in SETTINGS
        if name not in ("mtp", "eagle3", "draft-model", "sampled by a draft model")
    ),
    "drafter": ("mtp", "eagle3"),
    "generic drafter": ("mtp", "eagle3"),
    "draft model": ("draft-model", "sampled by a draft model"),
    "packed without graphs": ("self-speculative", "sampled", "layers left out"),
    "windows": ("autoregressive", "self-speculative"),
    "few tokens": ("self-speculative", "sampled", "exits by confidence"),
    "blocks": ("self-speculative", "adaptive", "early exit"),
}
# A pass leaves the last two states
WITHOUT_GRAPHS = "generic", "packed without graphs", "drafter", "generic drafter"


def backend_on(device, kind):
    """`kind`: the layers and what drafts. In fp64, so that the kernels of both devices give the
    same tokens.
    """
    model = tiny_model("gemma3_text", sliding_window=5) if kind == "windows" else tiny_model()
    blocks = random_blocks(model, ExitBlock(3), ExitBlock(4)) if kind == "blocks" else None
    if kind.endswith("drafter"):
        blocks = replace(
            NO_STORED_DRAFTERS,
            eagle3=random_eagle3(ModelSpec.of(model.config)),
            mtp=random_blocks(model, MTP),
        )
    model = model.to(device)
    keywords = {} if blocks is None else {"stored_drafters": blocks}
    if kind.startswith("generic"):
        return TransformersBackend(model, **keywords)
    packing = PackingConfig(draft_vocab=40) if kind == "few tokens" else None
    backend = TorchBackend.of(model, packing, ORDER, **keywords)
    if kind == "draft model":
        backend.draft_model = TorchBackend.of(tiny_model(num_hidden_layers=4).to(device))
    return backend


@contextmanager
def gpu_backend(kind, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CUDA_GRAPHS", "off" if kind == "packed without graphs" else "on")
    with simulated_cuda() as gpu:
        yield gpu, backend_on("cuda", kind)


def answers(model, name, gpu=None):
    """The tokens of two prompts in a batch, by the row; of some settings those of one alone too."""
    config = DecodingConfig(**{"max_new_tokens": 8, **SETTINGS[name]})
    found = {}
    groups = [PROMPTS[:1]] if name in ALONE else []
    if not config.exit_confidence:
        groups.append(PROMPTS)
    for prompts in groups:
        loop = DecodingLoop(model, prompts, config, ENDS.get(name, frozenset()))
        for number, steps in enumerate(loop):
            for step in steps:
                found.setdefault((len(prompts), loop.rows.index(step.row)), []).extend(step.ids)
            if gpu is not None:
                copied = any(step.finish_reason for step in steps)  # the rows of the others
                # With which each exit is asked
                if number > 0 and not copied and not config.exit_confidence:
                    assert 1 <= len(gpu.waits) <= WAITS.get(name, 1), (name, prompts, gpu.waits)
                gpu.waits.clear()
    return found


@cache
def on_cpu(kind, name):
    return answers(cpu_backend(kind), name)


@cache
def cpu_backend(kind):
    return backend_on("cpu", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_tokens_of_the_cpu_and_waits_once_a_step(kind, monkeypatch):
    with gpu_backend(kind, monkeypatch) as (gpu, model):
        assert model.device.type == "cuda"
        found = {name: answers(model, name, gpu) for name in KINDS[kind]}
    assert (gpu.replays > 0) == (kind not in WITHOUT_GRAPHS)
    for name, tokens in found.items():
        assert tokens == on_cpu(kind, name), name
    assert kind != "packed" or found["to an end"] != found["self-speculative"]


def test_norms_whose_weights_are_wider_than_the_states():
    """In fp32 where 1 is added to weights in bf16: a GPU has no kernel for two precisions."""
    ids = torch.tensor([PROMPTS[0]])

    def logits(device):
        model = TorchBackend.of(tiny_model("nemotron", torch.bfloat16).to(device))
        hidden = run_texts(model, model.embed(ids.to(device)), 0, model.num_layers)
        return model.unembed(hidden).cpu().float()

    with simulated_cuda():
        found = logits("cuda")
    torch.testing.assert_close(found, logits("cpu"), rtol=0.05, atol=0.5)


@pytest.mark.parametrize("device, measured", [("cpu", True), ("cuda", False)])
def test_adaptive_drafting_measures_no_work_that_the_host_only_starts(device, measured):
    with simulated_cuda():
        model = TorchBackend.of(tiny_model().to(device), PackingConfig(exact=True))
        loop = decode(model, PROMPTS[0], DecodingConfig("adaptive", exits=(2, 4)))
    assert loop.engine.drafter._by_clock == measured


def test_low_bit_weights_are_refused():
    with simulated_cuda():
        for packing in (PackingConfig(quantize="int8"), PackingConfig(draft_weights=("int4",))):
            with pytest.raises(ConfigError, match=r"int[48] weights need `device` cpu, got cuda"):
                TorchBackend.of(tiny_model().to("cuda"), packing)


def test_texts_that_begin_alike_share_keys_and_values():
    config = DecodingConfig(max_new_tokens=12, **DRAFTED)
    first = [5, 11, 23, 42, 8]
    second = [5, 11, 23, 42, 8, 9, 30]

    def texts(model):
        prefixes = Prefixes(inf, least=1)
        return [ids_of(decode(model, ids, config, prefixes=prefixes)) for ids in (first, second)]

    with simulated_cuda():
        found = texts(backend_on("cuda", "packed"))
    assert found == texts(cpu_backend("packed"))


@pytest.fixture
def on_gpu(checkpoint):
    with simulated_cuda():
        yield for_decoding(checkpoint, "cuda", "fp32")


def test_benchmarks(on_gpu, checkpoint):
    strategies = ("autoregressive", "self-speculative")
    baselines = ("transformers", "no-reuse")
    config = BenchConfig(
        checkpoint,
        own_answers(1).config,
        generation={"exit_layer": 2, "num_draft_tokens": 3},
        strategies=strategies,
        repeats=1,
        baselines=baselines,
    )
    _, record = collect(bench(on_gpu, own_answers(1), config))
    assert {result.strategy for result in record.results} >= {*strategies, "transformers"}
    assert (
        record.environment["device_name"] == "simulated"
        and record.environment["implementation"] == "packed, CUDA graphs"
    )


def test_stats_say_what_ran(on_gpu):
    """`generate` replays passes, and so does `chat`, whose texts share keys and values."""
    config = DecodingConfig("autoregressive", max_new_tokens=12, ignore_eos=True)
    for prefixes in (NO_PREFIXES, Prefixes(inf)):
        stats = TextStream(on_gpu, PROMPTS[0], config, prefixes=prefixes).finish().stats
        assert "; layers: packed, CUDA graphs, float32 on cuda:0; " in stats_text(
            stats, on_gpu, None
        )


def test_log_likelihoods(on_gpu):
    found = dict(likelihoods(on_gpu.backend, [([5, 6, 7], [8, 9]), ([4], [5, 6, 7])], [2, 6], 2))
    assert found[0][6].total < 0


@pytest.fixture
def run_on(base, tmp_path, monkeypatch):
    """Trains on a device, and returns the reports. Nothing is saved: transformers asks weights for
    their memory, which those of a simulated GPU do not have.
    """
    monkeypatch.setattr(running, "save_checkpoint", lambda *_: None)

    def run(device, **changes):
        config = settings_on(base, tmp_path)(
            device=device, output=str(tmp_path / device), overwrite=True, **changes
        )
        return train(config)

    return run


RUNS = {
    "the recipe": {
        "recipe": RECIPE, "replay": 0.5,
        "validation": "test", "validation_samples": 4, "eval_steps": 2, "batch_size": 2, "accumulation": 2,
    },
    "readers": {"recipe": RecipeSettings(exits=(2,)), "batch_size": 2},
    "an exit block": {
        "kind": DrafterConfig, "exits": (2,), "answer_tokens": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_training_takes_the_steps_of_the_cpu(run_on, name):
    expected = run_on("cpu", steps=2, **RUNS[name])
    with simulated_cuda():
        found = run_on("cuda", steps=2, **RUNS[name])
    assert [report.step for report in found] == [1, 2]
    for one, other in zip(found, expected, strict=True):
        # The original's own text may differ at near-ties
        assert one.loss == pytest.approx(other.loss, rel=0.02)
        assert one.validation_losses == pytest.approx(other.validation_losses, rel=0.02)
