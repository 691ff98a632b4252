from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from training_runs import batch, recipe_module

from layerskip_core.config.training import RecipeSettings
from layerskip_core.training.data import collate
from layerskip_core.training.encoding import packed
from layerskip_core.training.module import use_fp32_attention
from layerskip_core.training.recipe import RunStep
from layerskip_core.training.run import prepare


def gradients(model, *, autocast, **inputs):
    module = recipe_module(model, RecipeSettings(p_max=0.3, curriculum="all")).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module(step=RunStep(2, 10), **inputs)["loss"].backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def inputs(kind):
    ids, labels = batch(4)
    if kind == "packed":
        collated = collate(list(packed([ids[0].tolist(), ids[1, :4].tolist(), ids[2].tolist()], 18)))
        return {name: collated[name] for name in ("input_ids", "labels", "documents")}
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", ["causal", "packed"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_attention_in_fp32_changes_nothing_but_rounding(kind, model_type):
    """In fp32 the same bits, whichever mask; under autocast no further from them than bf16 attention is."""
    changes = {"sliding_window": 4} if model_type == "mistral" else {}

    def found(in_fp32, autocast):
        model = tiny_model(model_type, dtype=torch.float32, **changes)
        if in_fp32:
            use_fp32_attention(model)
            assert model.config._attn_implementation == "sdpa_fp32"
        return gradients(model, autocast=autocast, **inputs(kind))

    exact = found(False, False)
    assert torch.equal(found(True, False), exact)
    ours, torchs = ((found(in_fp32, True) - exact).norm() / exact.norm() for in_fp32 in (True, False))
    assert 0 < ours < 1.1 * torchs < 0.2


def test_a_model_with_another_attention_keeps_it():
    model = tiny_model("gemma2", dtype=torch.float32)
    model.set_attn_implementation("eager")
    use_fp32_attention(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("multiplies_bf16", "dtype", "attention"), [(True, "bf16 autocast", "sdpa_fp32"), (False, "fp32", "sdpa")]
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(settings, monkeypatch, multiplies_bf16, dtype, attention):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies_bf16)
    config = settings(dtype="auto", steps=1)
    job = prepare(config)
    job.run(lambda report: None)
    assert (job.plan.dtype, job.trained.trainable.model.config._attn_implementation) == (dtype, attention)
    assert "sdpa" not in Path(config.output, "config.json").read_text()
