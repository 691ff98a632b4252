"""transformers' decoders as baselines: the same tokens, known counts, and the traps of each."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from command_line import fails, run
from conftest import tiny_model
from evaluating import NEW_TOKENS, collect, own_answers, tiny_loaded

from layerskip_core.checkpoint.loaded import Decoder
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import BenchConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.errors import ConfigError, LayerSkipError
from layerskip_core.evaluation.measure.baselines import (
    llama_cpp,
    load_baselines,
    transformers_generate,
)
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.measure.measuring import answer_prompts, measure_prompt, own_output

PLAIN = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)
SPECULATIVE = DecodingConfig("self-speculative", 5, 3, NEW_TOKENS)


def answer(name, prompt, stop=(), **changes):
    setting = replace(SPECULATIVE, stop=stop)
    baselines = load_baselines(
        tiny_loaded(), BenchConfig("tiny", baselines=(name,), **changes), setting
    )
    (output,) = answer_prompts(tiny_loaded(), [prompt], replace(setting, strategy=name), baselines)
    return output


@pytest.mark.parametrize(
    "name", ["transformers", "assistant-early-exit", "prompt-lookup", "no-reuse"]
)
def test_every_baseline_gives_the_autoregressive_tokens(name):
    for example in own_answers().examples:
        expected = measure_prompt(tiny_loaded(), example.prompt, PLAIN)
        output = answer(name, example.prompt)
        assert (output.ids, output.text, output.finish_reason) == (
            expected.ids,
            expected.text,
            expected.finish_reason,
        )
        assert (
            sum(step.tokens for step in output.steps)
            == output.stats.new_tokens
            == len(expected.ids)
        )
        assert output.stats.sequences == 1
        assert all(step.seconds > 0 for step in output.steps)


def test_the_early_exit_of_transformers_drafts_at_the_same_exit_and_length():
    """Its first round drafts after the prompt, as our early exit answers; each round adds its
    accepted drafts and one token.
    """
    loaded = tiny_loaded()
    early = DecodingConfig("early-exit", 5, max_new_tokens=3)
    for example in own_answers().examples:
        expected = measure_prompt(loaded, example.prompt, PLAIN).ids
        drafts = measure_prompt(loaded, example.prompt, early).ids
        output = answer("assistant-early-exit", example.prompt)
        assert output.steps[0].tokens == 1 + next(
            (place for place in range(3) if drafts[place] != expected[place]), 3
        )
        stats = output.stats
        assert (
            stats.accepted
            == stats.new_tokens - len(output.steps)
            <= stats.drafted
            <= 3 * stats.rounds
        )


def test_without_reuse_only_the_time_changes():
    loaded = tiny_loaded()
    prompt = own_answers().examples[1].prompt
    with_reuse = measure_prompt(loaded, prompt, SPECULATIVE).stats
    without = answer("no-reuse", prompt).stats
    assert (without.drafted, without.accepted, without.rounds) == (
        with_reuse.drafted,
        with_reuse.accepted,
        with_reuse.rounds,
    )
    with pytest.raises(
        ConfigError,
        match="`draft_model` must have the tokenizer of tiny; embedded-base has another",
    ):
        answer("assistant-model", "hi", packing=PackingConfig(draft_model="embedded-base"))


def test_a_draft_model_that_is_the_model_itself_is_always_right():
    loaded = tiny_loaded()
    copy = tiny_model(dtype=torch.float64, vocab_size=300)
    copy.load_state_dict(loaded.backend.model.state_dict())
    method = transformers_generate(loaded.backend.model, assistant=copy)
    output = method(loaded, loaded.encode_prompt(own_answers().examples[0].prompt), SPECULATIVE)
    assert output.stats.accepted == output.stats.drafted > 0
    # Rounds of 3 drafts and the target's own token; the draft stops one token before the limit.
    assert [step.tokens for step in output.steps] == [4, 4, 4]
    assert output.stats.tested_by_position == output.stats.accepted_by_position == (3, 3, 3)


def test_the_checkpoints_generation_config_does_not_reach_the_baselines():
    loaded = tiny_loaded()
    prompt = own_answers().examples[0].prompt
    expected = measure_prompt(loaded, prompt, PLAIN).ids
    before = loaded.backend.model.generation_config
    changed = type(before)(
        repetition_penalty=5.0, do_sample=True, temperature=9.0, eos_token_id=before.eos_token_id
    )
    loaded.backend.model.generation_config = changed
    try:
        assert answer("assistant-early-exit", prompt).ids == expected
        assert loaded.backend.model.generation_config is changed
    finally:
        loaded.backend.model.generation_config = before


def test_a_failing_prompt_is_recorded_and_leaves_the_model_whole(monkeypatch):
    loaded = tiny_loaded()
    exit_of = "assistant-early-exit"

    def fail(*_, **__):
        assert loaded.backend.model.config.num_hidden_layers == 5
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(loaded.backend.model.model.layers[2], "forward", fail)
        assert answer(exit_of, "hi").error == "transformers (assistant-early-exit): no luck"
    assert loaded.backend.model.config.num_hidden_layers == 6
    assert answer(exit_of, "hi").error is None


def test_the_weights_are_read_again_for_a_repacked_model(checkpoint):
    from layerskip_core.checkpoint.open import for_decoding

    packed = for_decoding(checkpoint)
    assert isinstance(packed, Decoder)
    strategies = ("autoregressive", "early-exit", "self-speculative")
    baselines = ("transformers", "no-reuse")
    generation = {"exit_layer": 5, "num_draft_tokens": 3}
    config = BenchConfig(
        checkpoint, generation=generation, strategies=strategies, baselines=baselines
    )
    _, record = collect(bench(packed, own_answers(2), replace(config, repeats=1)))
    plain, _, drafted, transformers, without = record.results
    assert [result.strategy for result in record.results[3:]] == ["transformers", "no-reuse"]
    assert transformers.identical_outputs == without.identical_outputs == 1.0
    assert transformers.speedup_over_transformers == 1.0
    assert transformers.acceptance_rate is None
    assert without.acceptance_rate == drafted.acceptance_rate
    assert plain.speedup_over_transformers == pytest.approx(1 / transformers.speedup)
    assert record.config["baselines"] == ("transformers", "no-reuse")


SETTING = DecodingConfig("llama.cpp", max_new_tokens=12)


class Server:
    """Answers with the tiny model's own tokens, as llama.cpp's server does."""

    asked: ClassVar[list] = []
    drafts: ClassVar[list] = []  # of each server
    context: ClassVar[int] = 1000

    def __init__(self, settings):
        self.settings = settings
        self.drafts.append(settings.speculative.types)

    def handle_completions(self, request):
        self.asked.append(request)
        if len(request["prompt"]) + request["max_tokens"] > min(self.context, self.settings.n_ctx):
            return {"error": {"code": 400, "message": "too long"}}
        setting = DecodingConfig("autoregressive", max_new_tokens=request["max_tokens"])
        output = own_output(tiny_loaded(), request["prompt"], setting)
        return {"__verbose": {"tokens": list(output.ids), "timings": {"prompt_ms": 0.5}}}


@pytest.fixture
def package(monkeypatch):
    def params():
        return SimpleNamespace(
            model=SimpleNamespace(),
            cpuparams=SimpleNamespace(),
            cpuparams_batch=SimpleNamespace(),
            speculative=SimpleNamespace(types=[]),
        )

    info = "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | "
    fake = SimpleNamespace(
        CommonParams=params,
        Server=Server,
        get_system_info=lambda: info,
        common_speculative_type=SimpleNamespace(COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE="lookups"),
    )
    monkeypatch.setitem(sys.modules, "xllamacpp", fake)
    monkeypatch.setattr("layerskip_core.evaluation.measure.baselines.version", lambda name: "1.2")
    Server.asked.clear()
    Server.drafts.clear()
    return fake


@pytest.fixture(scope="module")
def file(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "model"
    assert run(f"export {checkpoint} --exit 6 --format gguf --output {folder}").code == 0
    return str(folder / "target.gguf")


def test_answers_end_where_ours_do_or_do_not_fit(package, file, monkeypatch):
    loaded, (example, *_) = tiny_loaded(), own_answers().examples
    prompt = loaded.encode_prompt(example.prompt)
    server = llama_cpp(loaded, file)
    whole = server(loaded, prompt, SETTING)
    assert len(whole.ids) == 12 and [step.tokens for step in whole.steps] == [1, 11]
    third = loaded.detokenize(list(whole.ids[2:3])).strip()
    assert third
    stopped = server(loaded, prompt, replace(SETTING, stop=(third,)))
    assert len(stopped.ids) <= 3 and stopped.finish_reason == "stop"
    assert Server.asked[-1]["stop"] == [third]
    one = server(loaded, prompt, replace(SETTING, max_new_tokens=1))
    assert [step.tokens for step in one.steps] == [1]
    with pytest.raises(
        LayerSkipError, match=r"the prompt must be at most 127 tokens for llama.cpp, got 128"
    ):
        server(loaded, [5] * 128, SETTING)
    monkeypatch.setattr(Server, "context", 20)
    with pytest.raises(LayerSkipError, match=r"llama.cpp: too long"):
        server(loaded, [5] * 15, SETTING)


def test_lookups_are_asked_for(package, file):
    for lookups in (False, True):
        llama_cpp(tiny_loaded(), file, lookups)
    assert Server.drafts == [[], ["lookups"]]


def test_files_of_other_models_are_refused(package, file, tmp_path):
    with pytest.raises(
        ConfigError,
        match=rf"`gguf` must be a file of tiny, with 5 layers and 300 tokens; {file} has 6 layers",
    ):
        llama_cpp(tiny_loaded(num_hidden_layers=5), file)
    with pytest.raises(ConfigError, match="`gguf` must be a file; there is none at"):
        llama_cpp(tiny_loaded(), str(tmp_path / "none.gguf"))
    package.Server = lambda settings: 1 / 0
    with pytest.raises(ConfigError, match=r"must be a file that llama.cpp reads: division by zero"):
        llama_cpp(tiny_loaded(), file)


def test_llama_cpp_itself_gives_our_tokens(file, checkpoint):
    pytest.importorskip("xllamacpp", reason="needs layerskip[llama-cpp]")
    done = run(
        f"bench --model {checkpoint} --samples 2 --repeats 1 --max-new-tokens 8 --dtype fp32",
        f"--strategies autoregressive --baselines llama.cpp,llama.cpp-lookup --gguf {file}",
        "--format json",
    )
    assert done.code == 0
    record = json.loads(done.out)
    assert "xllamacpp" in record["environment"]["llama_cpp"]
    assert [result["identical_outputs"] for result in record["results"]][1:] == [1, 1]


def test_flags_and_the_package_are_asked_for(monkeypatch, file, checkpoint):
    command = f"bench --model {checkpoint} --samples 1 --baselines"
    fails(
        "--gguf must be given with baselines of llama.cpp, and only then, got none",
        command,
        "llama.cpp",
    )
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    message = (
        "--baselines llama.cpp needs the package xllamacpp: pip install 'layerskip[llama-cpp]'"
    )
    fails(message, command, "llama.cpp", f"--gguf {file}")
