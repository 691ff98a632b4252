"""Code that comes with a checkpoint never runs, and no library reads standard input, which holds
prompts.
"""

import json
import shutil
import sys

import pytest
from command_line import run
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from layerskip_core.checkpoint.open import for_training

CONSENT = "y\nremind me\n"  # what transformers would take as the answer to its question
COMMANDS = {
    "generate": ("generate --lines --model",),
    "import": ("import",),
    "scratch": ("finetune --recipe scratch --steps 1 --batch-size 1 --model",),
}
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Tokenizer(PreTrainedTokenizerFast): pass
def generate(model, **keywords): return model
"""
HOSTILE_PARTS = {
    "tokenizer": {
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        }
    },
    "unknown-tokenizer": {
        "tokenizer_config.json": {
            "tokenizer_class": "Tokenizer",
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        }
    },
    "config": {
        "config.json": {
            "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        }
    },
    "unknown-config": {
        "config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    },
    "generation": {},
    "pickle": {},
}


@pytest.fixture
def hostile(checkpoint, tmp_path):
    """Makes a checkpoint with code in one of its files; returns its folder and the file that the
    code would create.
    """

    def make(part):
        folder = tmp_path / "model"
        marker = tmp_path / "ran"
        shutil.copytree(checkpoint, folder)
        code = CODE.format(marker=str(marker))
        (folder / "evil.py").write_text(code)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
        for name, changes in HOSTILE_PARTS[part].items():
            file = folder / name
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        if part == "pickle":
            (folder / "model.safetensors").unlink()
            (folder / "pytorch_model.bin").write_bytes(
                f"cbuiltins\nexec\n(Vopen({str(marker)!r}, 'w')\ntR.".encode()
            )
        return folder, marker

    return make


@pytest.mark.parametrize("part", HOSTILE_PARTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_code_of_a_checkpoint_runs(hostile, tmp_path, monkeypatch, command, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = hostile(part)
    result = run(*COMMANDS[command], str(folder), stdin=CONSENT)
    assert not marker.exists()
    # The question that transformers asks before it runs code
    assert "[y/N]" not in result.out + result.err
    assert "Traceback" not in result.err
    assert result.code == 0 or result.err.rstrip().splitlines()[-1].startswith("error: ")


def test_the_code_runs_with_trust_remote_code(hostile, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = hostile("tokenizer")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_no_module_that_an_adapter_names_is_imported(checkpoint, tmp_path, monkeypatch):
    model = get_peft_model(
        for_training(checkpoint, "cpu", "fp32").model, LoraConfig(r=2, target_modules=["q_proj"])
    )
    folder = tmp_path / "adapter"
    marker = tmp_path / "ran"
    model.save_pretrained(folder, save_embedding_layers=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{checkpoint}/{name}", folder)
    file = folder / "adapter_config.json"
    named = {
        "megatron_config": {"sequence_parallel": False},
        "megatron_core": "evil",
        "base_model_name_or_path": checkpoint,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    (tmp_path / "evil.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    result = run(f"import {folder}")
    assert result.code == 1 and "megatron_config" in result.err
    assert not marker.exists()


def test_a_library_that_reads_standard_input_gets_nothing(monkeypatch):
    answers = []

    def ask(*_, **__):
        answers.append(sys.stdin.read())
        raise ValueError("asked")

    monkeypatch.setattr("layerskip_core.checkpoint.source.lean_spec", ask)
    result = run("generate --lines", stdin=CONSENT)
    assert (result.code, answers) == (1, [""])
