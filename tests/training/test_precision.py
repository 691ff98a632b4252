"""`auto` computes in bf16 where a product is clearly faster in it, says so, and a resumed run
computes as before.
"""

import json
from pathlib import Path

import pytest
from conftest import tiny_model
from training_runs import Interrupted, stop_at

from layerskip_core.config.training import DrafterConfig
from layerskip_core.model import TransformersBackend
from layerskip_core.training import precision
from layerskip_core.training.run import execute, prepare


def timed(monkeypatch, fp32, bf16):
    monkeypatch.setattr(precision, "SMALL_MODEL", 0)
    monkeypatch.setattr(precision, "product_seconds", lambda outputs, inputs: (fp32, bf16))


@pytest.mark.parametrize(
    "bf16, name, attention", [(0.25, "bf16 autocast", "sdpa_fp32"), (0.80, "fp32", "sdpa")]
)
def test_auto_is_bf16_where_a_product_is_clearly_faster_in_it(
    settings, monkeypatch, bf16, name, attention
):
    timed(monkeypatch, 1.0, bf16)
    config = settings(dtype="auto", steps=1)
    job = prepare(config)
    execute(job)
    assert (job.plan.precision.name, job.trainable.model.config._attn_implementation) == (
        name,
        attention,
    )
    assert "sdpa" not in Path(config.output, "config.json").read_text()
    assert json.loads(Path(config.output, "layerskip.json").read_text())["precision"] == name


@pytest.mark.parametrize("dtype, name", [("fp32", "fp32"), ("bf16", "bf16 autocast")])
@pytest.mark.parametrize("kind", [None, DrafterConfig])
def test_a_requested_precision_is_taken_untimed(settings, monkeypatch, dtype, name, kind):
    monkeypatch.setattr(precision, "product_seconds", lambda *_: pytest.fail("timed"))
    config = settings(dtype=dtype) if kind is None else settings(kind, dtype=dtype, exits=(2,))
    job = prepare(config)
    assert job.plan.precision == precision.Precision(name == "bf16 autocast")


def test_a_resumed_run_keeps_its_precision_whatever_is_faster_now(settings, monkeypatch):
    timed(monkeypatch, 1.0, 0.25)
    with pytest.raises(Interrupted):
        execute(prepare(settings(dtype="auto", save_steps=2)), stop_at(3))
    timed(monkeypatch, 1.0, 2.0)
    job = prepare(settings(dtype="auto", save_steps=2, resume=True))
    assert job.plan.checkpoint is not None and job.plan.precision.autocast
    execute(job)


def test_the_timed_product_is_the_widest_of_the_layers():
    """Not the embedding, which is larger; all models have times, also such without a matrix of two
    dimensions.
    """
    assert precision.widest_projection(TransformersBackend(tiny_model(vocab_size=500)).layers) == (
        48,
        32,
    )
    assert min(precision.product_seconds(48, 32)) > 0


def test_a_small_model_trains_in_fp32_untimed(settings, monkeypatch):
    """`embedded-base` has products twice as fast in bf16, and steps that take 1.5 times as long."""
    monkeypatch.setattr(precision, "product_seconds", lambda *_: pytest.fail("timed"))
    plan = prepare(settings(dtype="auto")).plan
    assert not plan.precision.autocast and "below 50M parameters" in plan.precision.reason


def test_processes_do_not_choose_differently(settings, monkeypatch):
    timed(monkeypatch, 1.0, 0.25)
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = prepare(settings(dtype="auto")).plan
    assert not plan.precision.autocast and "several processes" in plan.precision.reason
