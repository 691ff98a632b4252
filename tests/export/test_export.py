"""`layerskip export`: the folder of a draft model, how engines use it, and the plugin for vLLM."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import get_args

import pytest
import torch
from command_line import fails, run
from conftest import ATTENTION, CHANGES, edit_json, run_texts, tiny_model
from decodings import UnroundedDrafter
from evaluating import tiny_loaded
from exit_block_models import add_blocks, add_eagle3, random_blocks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerskip_core import load
from layerskip_core.checkpoint.folder import EXIT_BLOCKS_FILE
from layerskip_core.checkpoint.info import CheckpointInfo, read_info
from layerskip_core.checkpoint.loaded import Trainable
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import Engine
from layerskip_core.decoding import decode
from layerskip_core.export.run import cut_config, cut_to_exit, instructions
from layerskip_core.model import TransformersBackend
from layerskip_core.model.architectures import SUPPORTED
from layerskip_core.model.exit_blocks import MTP, MTP_LAYOUTS, NO_STORED_DRAFTERS, ExitBlock


@pytest.fixture
def with_block(checkpoint, tmp_path):
    """The tiny model with a trained block at exit 2, and without a recommended exit."""
    folder = shutil.copytree(checkpoint, tmp_path / "with-block")
    add_blocks(folder, ExitBlock(2))
    return folder


def test_the_draft_is_a_plain_checkpoint(checkpoint, tmp_path):
    output = tmp_path / "draft"
    done = run(f"export {checkpoint} --exit 2 --output {output}")
    assert (done.code, done.out) == (0, "")
    assert done.err == (
        f"exit 2 was not trained, so most of its drafts will be wrong\nwrote exit 2 of {checkpoint}, 2 layers, to {output}\n"
    )
    whole = for_training(checkpoint, "cpu", "fp32")
    text = "remind me to call mom at 5"
    ids = AutoTokenizer.from_pretrained(output)(text, return_tensors="pt").input_ids
    assert ids.tolist()[0] == whole.tokenizer(text)["input_ids"]
    with torch.no_grad():
        expected = whole.backend.unembed(run_texts(whole.backend, whole.backend.embed(ids), 0, 2))
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(output)(ids).logits, expected
        )
    info = read_info(output)
    assert info.prompt_template == whole.info.prompt_template and info.exit_layer is None
    assert info.details == {"exported_from": checkpoint, "exported_exit": 2}
    assert run("generate", text, f"--model {output} --max-new-tokens 4").code == 0
    fails(
        f"--output {output} already holds a model; give --overwrite to replace it, or another folder",
        f"export {checkpoint} --output {output}",
    )


def test_the_exit_with_a_block_is_the_default_and_keeps_it(with_block, tmp_path):
    output = tmp_path / "draft"
    done = run(f"export {with_block} --output {output} --engine vllm")
    assert done.code == 0 and "was not trained" not in done.err
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 3
    assert not (output / EXIT_BLOCKS_FILE).exists()
    assert done.out == (output / "README.md").read_text() and "README.md" in read_info(output).files
    # vLLM would read the blocks as weights of the model: the target is exported too.
    target = tmp_path / "draft-target"
    assert f"layerskip export {with_block} --exit 6 --output {target}" in done.out
    assert f"vllm serve {target} " in done.out and f'"model": "{output}"' in done.out
    assert run(f"export {with_block} --exit 6 --output {target}").code == 0
    assert not (target / EXIT_BLOCKS_FILE).exists()
    whole, written = (
        for_training(str(folder), "cpu", "fp32").model.state_dict()
        for folder in (with_block, target)
    )
    assert whole.keys() == written.keys() and all(
        torch.equal(whole[name], written[name]) for name in whole
    )


def test_a_plain_folder_is_its_own_target_and_a_drafter_that_vllm_reads_needs_no_export(
    checkpoint, tmp_path
):
    done = run(f"export {checkpoint} --output {tmp_path}/draft --engine vllm")
    assert f"vllm serve {checkpoint} " in done.out and "layerskip export" not in done.out
    assert '"num_speculative_tokens": 6' in done.out
    folder = shutil.copytree(checkpoint, tmp_path / "drafting")
    output = str(tmp_path / "other")
    add_eagle3(folder)
    told = f"--exit must be given: this model has a drafter that vLLM reads as it is, by `vllm serve {folder}/eagle3`, got none"
    fails(told, f"export {folder} --output {output} --engine vllm")
    assert run(f"export {folder} --output {output} --engine vllm --exit 2").code == 0


def test_wrong_input_is_one_error(checkpoint, tmp_path):
    output = str(tmp_path / "draft")
    exits = f"export {checkpoint} --output {output} --exit"
    fails("--exit must be in 1..6, got 7 (model has 6 layers)", exits, "7")
    fails("--exit must be in 1..5, got 6 (model has 6 layers)", exits, "6", "--engine vllm")
    assert "--engine must be one of vllm, llama.cpp" in run(exits, "1", "--engine onnx").err
    fails(
        f"--output must be another folder than the model's, got {checkpoint}",
        f"export {checkpoint} --output {checkpoint}",
    )
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "README.md").write_text("mine")
    assert (
        "in the way is README.md, which layerskip did not write"
        in run(exits, "1", "--engine vllm").err
    )
    assert run(exits, "1").code == 0
    assert (tmp_path / "draft" / "README.md").read_text() == "mine"


def test_transformers_drafts_with_it_as_told(checkpoint, tmp_path, capsys):
    """The program of the README runs and gives the text of the model alone."""
    done = run(f"export {checkpoint} --exit 1 --output {tmp_path}/draft --engine transformers")
    code = (
        done.out.split("```python\n")[1]
        .removesuffix("```\n")
        .replace("max_new_tokens=128", "max_new_tokens=16")
    )
    exec(code.replace('"PROMPT"', '"set an alarm"'), {})
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    alone = model.generate(
        **tokenizer("set an alarm", return_tensors="pt"), do_sample=False, max_new_tokens=16
    )
    assert (
        capsys.readouterr().out.strip()
        == tokenizer.decode(alone[0], skip_special_tokens=True).strip()
    )


IDS = torch.randint(3, 67, (2, 11), generator=torch.Generator().manual_seed(4))
# From layer 2 on, counted from 0
WINDOWS = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 5}


def tiny(model_type, **changes):
    model = tiny_model(model_type, torch.float32, **CHANGES.get(model_type, {}), **changes)
    return Trainable("tiny", model, TransformersBackend(model), None, CheckpointInfo())


@torch.no_grad()
def written_logits(model, folder):
    model.save_pretrained(folder)
    kernels = ATTENTION.get(model.config.model_type)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=kernels
    )(IDS).logits


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_logits_are_those_of_the_exit_s_block(model_type, tmp_path):
    """Layers of the first kind, and a block of the kind of the last, which has another window or no
    positions.

    Exits without blocks: tests/model/test_any_decoder.py.
    """
    loaded = tiny(model_type, **(WINDOWS if model_type in ("qwen2", "qwen3", "smollm3") else {}))
    blocks = random_blocks(loaded.model, ExitBlock(2), ExitBlock(4))
    backend = TransformersBackend(loaded.model, blocks)
    with torch.no_grad():
        early = run_texts(backend, backend.embed(IDS), 0, 2)
        block = backend.exit_blocks[2]
        expected = block.head(run_texts(backend, early, block.layer, block.layer + 1))
        assert (backend.unembed(early) - expected).abs().max() > 0.1
    torch.testing.assert_close(written_logits(cut_to_exit(loaded, 2, blocks), tmp_path), expected)


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
DRAFTER = """
import json, sys
import vllm

model, prompts, speculative = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
settings = dict(enforce_eager=True, max_model_len=256, max_num_seqs=1, kv_cache_memory_bytes=1 << 28, dtype="float32")
llm = vllm.LLM(model, speculative_config=speculative, **settings)
greedy, answers = vllm.SamplingParams(temperature=0, max_tokens=64), []
for number, prompt in enumerate(prompts):
    llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy)
    ids, steps = [], []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            known, ids = len(ids), list(output.outputs[0].token_ids)
            steps.append(ids[known:])
    answers.append(steps)
print("RESULT", json.dumps(answers))
"""
NEEDS_VISION = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="vLLM's Qwen3.5 imports torchvision"
)
ENVIRONMENT = {
    **os.environ,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def result_of(program, *arguments):
    """What a Python program of another process tells after `RESULT`."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    [told] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(told.removeprefix("RESULT "))


def qwen_with_mtp(folder):
    """A Qwen3.5 whose layers add little to the embedding, and its drafter. vLLM's recurrent layers
    take no fp32 on a CPU.
    """
    tokenizer = tiny_loaded().tokenizer
    shape = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = tiny_model(
        "qwen3_5_text", torch.float32, vocab_size=300, layer_types=["full_attention"] * 4, **shape
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(0.15 if ".layers." in name and weight.dim() > 1 else 1)
        model.model.norm.weight.copy_(torch.linspace(-0.5, 2, 128)[torch.randperm(128)])
    drafter = random_blocks(model, MTP, scale=0.15)
    save_checkpoint(model, tokenizer, CheckpointInfo("{prompt}\n"), str(folder), torch.float32)
    names = drafter.shapes(TransformersBackend(model).spec)
    weights = {MTP_LAYOUTS[0].stored(name, 4): drafter.take(name) for name in names}
    save_file(
        load_file(folder / "model.safetensors") | weights,
        folder / "model.safetensors",
        {"format": "pt"},
    )
    edit_json(folder / "config.json", mtp_num_hidden_layers=1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize("method", ["eagle3", pytest.param("mtp", marks=NEEDS_VISION)])
def test_a_drafter_accepts_as_often_as_here(method, tmp_path):
    """Draft for draft: vLLM as it is reads the folder, and accepts what we accept, round by round,
    but for the last ones.
    """
    target = str(tmp_path / "target")
    speculative = {"method": method, "num_speculative_tokens": 4}
    if method == "eagle3":
        speculative["model"] = f"{target}/eagle3"
        flags = "--model embedded-base --answers data --samples 96 --steps 24 --draft-vocab 512"
        assert not run(
            "train-drafter --layout eagle3", flags, f"--threads 1 --output {target}"
        ).code
    else:
        qwen_with_mtp(tmp_path / "target")
    decoder = for_decoding(target, "cpu", "fp32", UnroundedDrafter())
    prompts = [decoder.encode_prompt(prompt) for prompt in PROMPTS]
    setting = DecodingConfig(method, num_draft_tokens=4, max_new_tokens=64)
    here = [
        [step.ids for [step] in decode(decoder.backend, prompt, setting, decoder.eos_ids)]
        for prompt in prompts
    ]
    theirs = result_of(DRAFTER, target, json.dumps(prompts), json.dumps(speculative))
    assert [[*map(list, answer[:-1])] for answer in here] == [answer[:-1] for answer in theirs]
    assert sum(len(step) - 1 for answer in here for step in answer[1:-1]) > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_the_draft_is_part_of_the_target(tmp_path):
    """The draft is exit 5 of `embedded`, taken for exit 4 with a block: four shared layers, one
    layer and norm of its own.
    """
    target = str(tmp_path / "target")
    draft = tmp_path / "draft"
    run(f"export embedded --exit 24 --output {target} --dtype fp32")
    run(f"export embedded --exit 5 --output {draft} --dtype fp32")
    info = json.loads((draft / "layerskip.json").read_text())
    (draft / "layerskip.json").write_text(json.dumps({**info, "exported_exit": 4}))
    result = result_of(PROGRAM, target, str(draft), json.dumps([f"{each}\n" for each in PROMPTS]))
    model = load("embedded", device="cpu")
    assert result["texts"] == [
        model.generate(prompt, strategy="autoregressive", max_new_tokens=64).text
        for prompt in PROMPTS
    ]
    counts = result["counts"]
    assert (
        counts["vllm:spec_decode_num_accepted_tokens"]
        > 0.7 * counts["vllm:spec_decode_num_draft_tokens"]
        > 0
    )
    assert {name.split(".")[2] for name in result["own"] if ".layers." in name} == {"4"}
    assert [name for name in result["own"] if ".layers." not in name] == ["model.norm.weight"]
    assert result["mine"][:4] == result["theirs"][:4]
    assert result["mine"][4] not in result["theirs"]
    accepted, whole, other, nothing = result["refused"]
    assert accepted is None
    assert (
        whole == f"load format layerskip needs a draft that `layerskip export` wrote, got {target}"
    )
    assert (
        other
        == "load format layerskip needs a draft of this target: hidden_size must be 160, got 99"
    )
    assert nothing.endswith("got /")


def test_a_tied_head_stays_tied(tmp_path):
    loaded = tiny("llama", tie_word_embeddings=True)
    written_logits(cut_to_exit(loaded, 1, NO_STORED_DRAFTERS), tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("engine", get_args(Engine))
def test_paths_are_quoted_for_the_language_of_the_instructions(engine):
    text = instructions(engine, "/it's target", "/a draft", 5)
    language, _, code = text.removeprefix("```").removesuffix("\n```\n").partition("\n")
    if language == "python":
        compile(code, engine, "exec")
        assert '"/it\'s target"' in code and "'/a draft'" in code
    else:
        words = shlex.split(code.replace("\\\n", ""), comments=True)
        told = set(re.findall(r"--[a-z][a-z-]*", code.replace("pip install --no-deps", "")))
        assert told <= set(words)  # a comment praises no flag that no command has
        assert "/it's target" in words and any("/a draft" in word for word in words)


def test_values_by_layer_follow_the_layers_that_are_kept():
    sliding = "sliding_attention"
    full = "full_attention"
    qwen = cut_config(tiny("qwen2", **WINDOWS).model.config, [0, 5])
    assert (qwen.num_hidden_layers, qwen.layer_types, qwen.max_window_layers) == (
        2,
        [full, sliding],
        1,
    )
    listed = {"no_rope_layers": [1, 0, 1, 1, 1, 0]}
    smollm = cut_config(tiny("smollm3", **listed).model.config, [0, 1, 2, 5])
    assert (smollm.no_rope_layers, len(smollm.layer_types)) == ([1, 0, 1, 0], 4)
    gemma = cut_config(tiny("gemma3_text", layer_types=[sliding, full] * 3).model.config, [0, 1, 2])
    assert gemma.layer_types == [sliding, full, sliding]
