"""The plugin for vLLM. In vLLM it is tested where that is installed; the engine runs in a process of its own."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from command_line import run

from layerskip_core import load
from layerskip_core.config.model import CheckConfig
from layerskip_core.export.check import check_drafter

PROMPTS = ["remind me to call mom at 5", "play some jazz", "set an alarm for 7 am"]
PROGRAM = """
import json, sys
from types import SimpleNamespace

from layerskip_core.export.vllm_plugin import exported_exit
from vllm import LLM, SamplingParams

target, draft, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": 6}
settings = dict(enforce_eager=True, max_model_len=256, max_num_seqs=4, kv_cache_memory_bytes=1 << 24, dtype="float32")
llm = LLM(target, load_format="layerskip", speculative_config=speculative, disable_log_stats=False, **settings)
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
layers = runner.compilation_config.static_forward_context
caches = {name: layer.kv_cache.data_ptr() for name, layer in layers.items() if hasattr(layer, "kv_cache")}
theirs = {id(weight) for weight in runner.model.parameters()}
sizes = runner.model.config.to_dict()


def refused(folder, **change):
    config = SimpleNamespace(**{**sizes, "num_hidden_layers": 5, **change})
    try:
        exported_exit(SimpleNamespace(model=folder, hf_config=config), runner.model)
    except ValueError as error:
        return str(error)


print("RESULT", json.dumps({
    "texts": [output.outputs[0].text for output in outputs],
    "counts": {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")},
    "own": [name for name, weight in runner.drafter.model.named_parameters() if id(weight) not in theirs],
    "mine": [caches[f"draft_model.model.layers.{layer}.self_attn.attn"] for layer in range(5)],
    "theirs": [caches[f"model.layers.{layer}.self_attn.attn"] for layer in range(24)],
    "refused": [refused(draft), refused(target), refused(draft, hidden_size=99), refused("/")],
}))
"""
ENVIRONMENT = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_a_drafter_in_the_eagle3_layout_accepts_as_often_as_here(tmp_path):
    """Draft for draft: vLLM as it is reads the folder, and accepts what we accept, round by round."""
    target = str(tmp_path / "target")
    flags = ("--model", "embedded-base", "--answers", "data", "--samples", "96", "--steps", "24", "--draft-vocab", "512")
    assert not run("train-drafter", "--layout", "eagle3", *flags, "--threads", "1", "--output", target).code
    done = check_drafter(CheckConfig(samples=3), target)
    assert done.vllm.answers == done.here.answers and sum(done.here.accepted) > 10
    shown = run("export", target, "--check", "--samples", "1")
    assert shown.code == 0 and shown.out.splitlines()[3].startswith("| vLLM 0.")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_the_draft_is_part_of_the_target(tmp_path):
    """The draft is exit 5 of `embedded`, taken for exit 4 with a block: four shared layers, one layer and norm of its own."""
    target, draft = str(tmp_path / "target"), tmp_path / "draft"
    run("export", "embedded", "--exit", "24", "--output", target, "--dtype", "fp32")
    run("export", "embedded", "--exit", "5", "--output", str(draft), "--dtype", "fp32")
    info = json.loads((draft / "layerskip.json").read_text())
    (draft / "layerskip.json").write_text(json.dumps({**info, "exported_exit": 4}))
    program = [sys.executable, "-c", PROGRAM, target, str(draft), json.dumps([f"{prompt}\n" for prompt in PROMPTS])]
    done = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))
    model = load("embedded", device="cpu")
    assert result["texts"] == [model.generate(prompt, strategy="autoregressive", max_new_tokens=64).text for prompt in PROMPTS]
    counts = result["counts"]
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0.7 * counts["vllm:spec_decode_num_draft_tokens"] > 0
    assert {name.split(".")[2] for name in result["own"] if ".layers." in name} == {"4"}
    assert [name for name in result["own"] if ".layers." not in name] == ["model.norm.weight"]
    assert result["mine"][:4] == result["theirs"][:4]
    assert result["mine"][4] not in result["theirs"]
    accepted, whole, other, nothing = result["refused"]
    assert accepted is None
    assert whole == f"load format layerskip needs a draft that `layerskip export` wrote, got {target}"
    assert other == "load format layerskip needs a draft of this target: hidden_size must be 160, got 99"
    assert nothing.endswith("got /")


class _Stub(ModuleType):
    """A module of vLLM: any name in it is a class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture
def plugin(monkeypatch):
    """The plugin, imported without vLLM."""
    name = "layerskip_core.export.vllm_plugin"
    wanted = re.findall(r"^from (vllm\S*) import", Path(find_spec(name).origin).read_text(), re.MULTILINE)
    for module in ("vllm", *wanted):
        monkeypatch.setitem(sys.modules, module, _Stub(module))
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield import_module(name)
    sys.modules.pop(name, None)


def test_a_draft_may_be_a_hub_id(plugin, monkeypatch, tmp_path):
    """As the target may: what `layerskip export` wrote, sent to the hub."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"), 8)
    target = SimpleNamespace(config=SimpleNamespace(**sizes))
    (tmp_path / "layerskip.json").write_text('{"exported_exit": 4}')

    def download(repo, name, revision=None):
        assert (repo, name, revision) == ("me/draft", "layerskip.json", "v1")
        return str(tmp_path / name)

    monkeypatch.setattr(plugin, "hf_hub_download", download)
    config = SimpleNamespace(num_hidden_layers=4, **sizes)
    for model in ("me/draft", str(tmp_path)):
        assert plugin.exported_exit(SimpleNamespace(model=model, revision="v1", hf_config=config), target) == 4
