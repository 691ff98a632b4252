"""Recorded passes, on a simulated GPU: what is recorded, for how long, and what happens where it cannot be."""

import warnings
from itertools import zip_longest

import pytest
import torch
from conftest import tiny_model
from decodings import ids_of
from simulated_cuda import simulated_cuda

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode, graphs
from layerskip_core.decoding.graphs import Recorder
from layerskip_core.errors import ConfigError
from layerskip_core.model import TorchBackend

PROMPT, OTHER = [5, 11, 23, 42, 8], [7, 9, 30, 31]
DRAFTED = DecodingConfig(exit_layer=2, num_draft_tokens=4, max_new_tokens=24)
PLAIN = DecodingConfig("autoregressive", max_new_tokens=24)


@pytest.fixture
def gpu():
    with simulated_cuda() as simulated:
        yield simulated


@pytest.fixture
def model(gpu):
    return on_gpu()


@pytest.fixture
def recordings(monkeypatch):
    """Names and shapes of the passes that were recorded."""
    made, usual = [], Recorder._recorded

    def noted(self, work, inputs):
        recording = usual(self, work, inputs)
        made.append(tuple(tuple(tensor.shape) for tensor in inputs))
        return recording

    monkeypatch.setattr(Recorder, "_recorded", noted)
    return made


def on_gpu(**packing):
    return TorchBackend.of(tiny_model(num_hidden_layers=3).to("cuda"), PackingConfig(**packing))


def on_cpu(prompt, config=PLAIN):
    return ids_of(decode(TorchBackend.of(tiny_model(num_hidden_layers=3)), prompt, config))


def test_a_pass_is_recorded_once_and_replayed_for_later_texts(gpu, model, recordings):
    assert ids_of(decode(model, PROMPT, DRAFTED)) == on_cpu(PROMPT)
    first = len(recordings)
    draft, verification = ((1, 1), (1, 4)), ((1, 5), (1, 5), (1, 4, 32))
    assert {draft, verification} <= {*recordings} and len({*recordings}) == first
    gpu.replays = 0
    assert ids_of(decode(model, OTHER, DRAFTED)) == on_cpu(OTHER)
    assert gpu.replays >= 8
    assert recordings.count(draft) == recordings.count(verification) == 1
    assert ids_of(decode(model, OTHER, PLAIN)) == on_cpu(OTHER)
    assert ((1, 1), (1, 1)) in recordings


def test_two_decodings_at_once_keep_apart(model):
    ids_of(decode(model, PROMPT, DRAFTED))
    both = decode(model, PROMPT, DRAFTED), decode(model, OTHER, DRAFTED)
    found = [[], []]
    for steps in zip_longest(*both, fillvalue=[]):
        for ids, step in zip(found, steps, strict=True):
            ids += [token for row in step for token in row.ids]
    assert found == [on_cpu(PROMPT), on_cpu(OTHER)]


def test_a_text_that_needs_more_room_gets_a_larger_cache(model, monkeypatch):
    monkeypatch.setattr(graphs, "_LEAST_PLACES", 8)
    made, usual = [], Recorder.__init__

    def noted(self, *arguments):
        usual(self, *arguments)
        made.append(self.places)

    monkeypatch.setattr(Recorder, "__init__", noted)
    for count, places in ((3, [8]), (9, [8, 16]), (8, [8, 16]), (20, [8, 16, 32])):
        config = DecodingConfig(exit_layer=2, num_draft_tokens=4, max_new_tokens=count)
        assert ids_of(decode(model, PROMPT, config)) == on_cpu(PROMPT, DecodingConfig("autoregressive", max_new_tokens=count))
        assert made == places


def test_where_recording_fails_decoding_goes_on(gpu, model, monkeypatch):
    """A pass that waits for the device cannot be recorded."""
    usual = TorchBackend.unembed

    def waiting(self, hidden):
        logits = usual(self, hidden)
        float(logits.sum())
        return logits

    monkeypatch.setattr(TorchBackend, "unembed", waiting)
    with pytest.warns(RuntimeWarning, match="decoding goes on without CUDA graphs: operation not permitted"):
        found = ids_of(decode(model, PROMPT, DRAFTED))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found == ids_of(decode(model, PROMPT, DRAFTED)) == on_cpu(PROMPT)


def test_what_the_environment_asks_for(gpu, monkeypatch):
    assert on_gpu().recordable and on_gpu().implementation == "packed, CUDA graphs"
    assert not on_gpu(exact=True).recordable and not TorchBackend.of(tiny_model(num_hidden_layers=3)).recordable
    monkeypatch.setenv("LAYERSKIP_CUDA_GRAPHS", "off")
    assert not on_gpu().recordable and on_gpu().implementation == "packed"
    monkeypatch.setenv("LAYERSKIP_CUDA_GRAPHS", "yes")
    with pytest.raises(ConfigError, match="LAYERSKIP_CUDA_GRAPHS"):
        on_gpu()


def test_recorded_passes_see_no_key_that_the_mask_hides(model):
    """Whatever the places after a text hold, such as an older text."""
    recorder = Recorder(model, 64)
    tokens, places = torch.tensor([PROMPT]), torch.arange(9)[None]
    with torch.inference_mode():
        model.run_layers(model.embed(tokens.to("cuda")), 0, 3, places[:, :5], recorder.cache)
        newest = torch.tensor([[8, 9, 10, 11]]).to("cuda")

        def run():
            hidden = model.run_layers(model.embed(newest), 0, 3, places[:, 5:].to("cuda"), recorder.whole)
            return model.unembed(hidden).cpu()

        expected = run()
        recorder.cache._storage[..., 9:, :] = 1e3
        assert torch.equal(run(), expected)
        usual = model.run_layers(model.embed(newest), 0, 3, places[:, 5:], recorder.cache)
        torch.testing.assert_close(model.unembed(usual).cpu(), expected)
