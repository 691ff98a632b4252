"""What only a GPU can show: its kernels, graphs, waits and memory. Skipped without one."""

import gc
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from decodings import ids_of
from training_runs import RECIPE, settings_on, train

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import DecodingLoop, decode, decode_batch
from layerskip_core.decoding.graphs import GraphRecorder
from layerskip_core.model import TorchBackend

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PROMPTS = ["wake me up at 7", "remind me to call mom at 5", "play some jazz"]
PLAIN = DecodingConfig("autoregressive", max_new_tokens=48)
DRAFTED = DecodingConfig("self-speculative", 4, 8, 48)


def answers(loaded, config):
    return [
        ids_of(decode(loaded.backend, loaded.encode_prompt(prompt), config, loaded.eos_ids))
        for prompt in PROMPTS
    ]


def test_greedy_answers_in_fp32_are_those_of_the_cpu():
    """But for near-ties, which these prompts of the embedded model do not have."""
    found, expected = (for_decoding("embedded", device, "fp32") for device in ("cuda", "cpu"))
    assert answers(found, PLAIN) == answers(found, DRAFTED) == answers(expected, PLAIN)
    prompts = [found.encode_prompt(prompt) for prompt in PROMPTS]
    batch = decode_batch(found.backend, prompts, DRAFTED, found.eos_ids)
    assert [list(row.ids) for row in batch] == answers(expected, PLAIN)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [PLAIN, DRAFTED], ids=["plain", "drafted"])
def test_replayed_passes_give_the_bits_of_those_that_ran_as_usual(monkeypatch, precision, config):
    """Every replay beside the same work on the same inputs, which writes the same keys and
    values.
    """
    usual = GraphRecorder.run
    compared = []

    def both(self, name, work, *inputs):
        replayed = usual(self, name, work, *inputs)
        if self._recordings:
            ran = work(*(tensor.to(self._device) for tensor in inputs))
            compared.extend(
                torch.equal(one, other) for one, other in zip(replayed, ran, strict=True)
            )
        return replayed

    monkeypatch.setattr(GraphRecorder, "run", both)
    loaded = for_decoding("embedded", "cuda", precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # passes that cannot be recorded
        answers(loaded, config)
    assert len(compared) > 10 and all(compared)


@pytest.mark.parametrize("graphs", ["on", "off"])
@pytest.mark.parametrize(
    "config",
    [PLAIN, DRAFTED, DecodingConfig("self-speculative", 4, 8, 48, temperature=0.7)],
    ids=["plain", "drafted", "sampled"],
)
def test_a_step_waits_once(monkeypatch, graphs, config):
    """By torch's own count of calls that wait."""
    monkeypatch.setenv("LAYERSKIP_CUDA_GRAPHS", graphs)
    loaded = for_decoding("embedded", "cuda", "bf16")
    config = replace(config, max_new_tokens=120)
    loop = DecodingLoop(loaded.backend, [loaded.encode_prompt(PROMPTS[0])], config)
    for _ in range(4):  # passes are recorded in the third step, which waits
        next(loop)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(2):
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                next(loop)
            assert len(waits) == 1, [str(wait.message) for wait in waits]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_from_answer_to_answer():
    loaded = for_decoding("embedded", "cuda", "bf16")

    def held():
        answers(loaded, DRAFTED)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    held()
    first = held()
    assert all(held() <= first for _ in range(4))


def test_a_model_that_is_gone_leaves_no_memory():

    def left():
        model = TorchBackend.of(tiny_model(dtype=torch.float32).to("cuda"))
        for _ in range(4):
            list(decode(model, [5, 11, 23], DecodingConfig(exit_layer=3, max_new_tokens=24)))
        del model
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = left()  # with what torch itself keeps
    assert left() <= first


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_takes_the_steps_of_the_cpu(base, tmp_path, precision):
    """Dropout draws the same rows on every device."""
    make = settings_on(base, tmp_path)
    runs = [
        train(
            make(
                device=device,
                dtype=precision,
                output=str(tmp_path / device),
                recipe=RECIPE,
                accumulation=2,
                batch_size=2,
            )
        )
        for device in ("cuda", "cpu")
    ]
    for one, other in zip(*runs, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3 if precision == "fp32" else 3e-2)
