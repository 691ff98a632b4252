"""llama.cpp as a baseline: what is asked of its server, what is made of its answers, and files of other models."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
from command_line import fails, run
from evaluating import own_answers, tiny_loaded

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import BenchConfig
from layerskip_core.errors import ConfigError, LayerSkipError
from layerskip_core.evaluation.measure.baselines import LlamaCpp
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.measure.measure import own_output
from layerskip_core.evaluation.report.tables import bench_table

SETTING = DecodingConfig("llama.cpp", max_new_tokens=12)


class Server:
    """Answers with the tiny model's own tokens, as llama.cpp's server does."""

    asked: ClassVar[list] = []

    def __init__(self, settings):
        self.settings = settings

    def handle_completions(self, request):
        self.asked.append(request)
        if len(request["prompt"]) + request["max_tokens"] > self.settings.n_ctx:
            return {"error": {"code": 400, "message": "too long"}}
        setting = DecodingConfig("autoregressive", max_new_tokens=request["max_tokens"])
        output = own_output(tiny_loaded(), request["prompt"], setting)
        return {"__verbose": {"tokens": list(output.ids), "timings": {"prompt_ms": 0.5}}}


@pytest.fixture
def package(monkeypatch):
    """A package xllamacpp with this server."""

    def params():
        return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

    info = "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | "
    fake = SimpleNamespace(CommonParams=params, Server=Server, get_system_info=lambda: info)
    monkeypatch.setitem(sys.modules, "xllamacpp", fake)
    monkeypatch.setattr("layerskip_core.evaluation.measure.baselines.version", lambda name: "1.2")
    Server.asked.clear()
    return fake


@pytest.fixture(scope="module")
def file(checkpoint, tmp_path_factory):
    """The tiny model as a GGUF file."""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    assert run("export", checkpoint, "--exit", "6", "--format", "gguf", "--output", str(folder)).code == 0
    return str(folder / "target.gguf")


def test_the_baseline_stands_beside_our_own_decoding(package, file):
    config = BenchConfig("tiny", baselines=("llama.cpp",), gguf=file, strategies=("autoregressive",), repeats=1)
    *_, record = bench(tiny_loaded(), own_answers(2), config)
    own, other = record.results
    assert (other.strategy, other.exit_layer, other.num_draft_tokens, other.acceptance_rate) == ("llama.cpp", None, None, None)
    assert other.identical_outputs == 1.0 and other.metrics == own.metrics
    assert other.tokens_per_second > 0 and other.ttft_ms == pytest.approx(0.5)
    note = " ".join(bench_table(record).note.split())
    assert f"llama.cpp: xllamacpp 1.2 (SSE3 AVX2), on {file}." in note
    assert all(request["temperature"] == 0 and not request["cache_prompt"] for request in Server.asked)


def test_answers_end_where_ours_do_or_do_not_fit(package, file):
    loaded, (example, *_) = tiny_loaded(), own_answers().examples
    prompt, server = loaded.encode_prompt(example.prompt), LlamaCpp(loaded, file)
    whole = server(loaded, prompt, SETTING)
    assert len(whole.ids) == 12 and [step.tokens for step in whole.steps] == [1, 11]
    third = loaded.detokenize(list(whole.ids[2:3])).strip()
    assert third
    stopped = server(loaded, prompt, replace(SETTING, stop=(third,)))
    assert len(stopped.ids) <= 3 and stopped.finish_reason == "stop"
    assert Server.asked[-1]["stop"] == [third]
    one = server(loaded, prompt, replace(SETTING, max_new_tokens=1))
    assert [step.tokens for step in one.steps] == [1]
    with pytest.raises(LayerSkipError, match=r"the prompt must be at most 127 tokens for llama.cpp, got 128"):
        server(loaded, [5] * 128, SETTING)
    server.server.settings.n_ctx = 20
    with pytest.raises(LayerSkipError, match=r"llama.cpp: too long"):
        server(loaded, [5] * 15, SETTING)


def test_files_of_other_models_are_refused(package, file, tmp_path):
    with pytest.raises(ConfigError, match=rf"`gguf` must be a file of tiny, with 5 layers and 300 tokens; {file} has 6 layers"):
        LlamaCpp(tiny_loaded(num_hidden_layers=5), file)
    with pytest.raises(ConfigError, match="`gguf` must be a file; there is none at"):
        LlamaCpp(tiny_loaded(), str(tmp_path / "none.gguf"))
    package.Server = lambda settings: 1 / 0
    with pytest.raises(ConfigError, match=r"must be a file that llama.cpp reads: division by zero"):
        LlamaCpp(tiny_loaded(), file)


def test_flags_and_the_package_are_asked_for(monkeypatch, file, checkpoint):
    command = ("bench", "--model", checkpoint, "--samples", "1", "--baselines")
    fails("--gguf must be given with the baseline llama.cpp, and only then, got none", *command, "llama.cpp")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    message = "--baselines llama.cpp needs the package xllamacpp: pip install 'layerskip[llama-cpp]'"
    fails(message, *command, "llama.cpp", "--gguf", file)


def test_llama_cpp_itself_gives_our_tokens(file, checkpoint):
    pytest.importorskip("xllamacpp", reason="needs layerskip[llama-cpp]")
    done = run(
        "bench", "--model", checkpoint, "--samples", "2", "--repeats", "1", "--max-new-tokens", "8", "--dtype", "fp32",
        "--strategies", "autoregressive", "--baselines", "llama.cpp", "--gguf", file,
    )  # fmt: skip
    assert done.code == 0 and "llama.cpp: xllamacpp" in done.out
