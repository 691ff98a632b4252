"""`layerskip export`: the folder of a draft model, and how engines use it."""

import json
import shutil
from dataclasses import replace
from typing import get_args

import pytest
import torch
from command_line import fails, run
from exit_block_models import add_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerskip_core.checkpoint.folder import EXIT_BLOCKS_FILE
from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.loaded import decoder_of
from layerskip_core.checkpoint.open import for_training
from layerskip_core.config.model import Engine
from layerskip_core.export.run import instructions, recommended_length
from layerskip_core.model.exit_blocks import ExitBlock


@pytest.fixture
def with_block(checkpoint, tmp_path):
    """The tiny model with a trained block at exit 2, and without a recommended exit."""
    folder = shutil.copytree(checkpoint, tmp_path / "with-block")
    add_blocks(folder, ExitBlock(2))
    return folder


def test_the_draft_is_a_plain_checkpoint(checkpoint, tmp_path):
    output = tmp_path / "draft"
    done = run("export", checkpoint, "--exit", "2", "--output", str(output))
    assert (done.code, done.out) == (0, "")
    assert done.err == (
        f"exit 2 was not trained, so most of its drafts will be wrong\nwrote exit 2 of {checkpoint}, 2 layers, to {output}\n"
    )
    whole, text = for_training(checkpoint, "cpu", "fp32"), "remind me to call mom at 5"
    ids = AutoTokenizer.from_pretrained(output)(text, return_tensors="pt").input_ids
    assert ids.tolist()[0] == whole.tokenizer(text)["input_ids"]
    with torch.no_grad():
        places = torch.arange(ids.shape[1])[None]
        expected = whole.backend.unembed(whole.backend.run_layers(whole.backend.embed(ids), 0, 2, places))
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(output)(ids).logits, expected)
    info = read_info(output)
    assert info.prompt_template == whole.info.prompt_template and info.exit_layer is None
    assert info.details == {"exported_from": checkpoint, "exported_exit": 2}
    assert run("generate", text, "--model", str(output), "--max-new-tokens", "4").code == 0
    fails(
        f"--output {output} already holds a model; give --overwrite to replace it, or another folder",
        *("export", checkpoint, "--output", str(output)),
    )


def test_the_exit_with_a_block_is_the_default_and_keeps_it(with_block, tmp_path):
    output = tmp_path / "draft"
    done = run("export", str(with_block), "--output", str(output), "--engine", "vllm")
    assert done.code == 0 and "was not trained" not in done.err
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 3
    assert not (output / EXIT_BLOCKS_FILE).exists()
    assert done.out == (output / "README.md").read_text() and "README.md" in read_info(output).files
    # vLLM would read the blocks as weights of the model: the target is exported too.
    target = tmp_path / "draft-target"
    assert f"layerskip export {with_block} --exit 6 --output {target}" in done.out
    assert f"vllm serve {target} " in done.out and f'"model": "{output}"' in done.out
    assert run("export", str(with_block), "--exit", "6", "--output", str(target)).code == 0
    assert not (target / EXIT_BLOCKS_FILE).exists()
    whole, written = (for_training(str(folder), "cpu", "fp32").model.state_dict() for folder in (with_block, target))
    assert whole.keys() == written.keys() and all(torch.equal(whole[name], written[name]) for name in whole)


def test_a_plain_folder_is_its_own_target(checkpoint, tmp_path):
    done = run("export", checkpoint, "--output", str(tmp_path / "draft"), "--engine", "vllm")
    assert f"vllm serve {checkpoint} " in done.out and "layerskip export" not in done.out
    assert '"num_speculative_tokens": 6' in done.out


def test_wrong_input_is_one_error(checkpoint, tmp_path):
    output = str(tmp_path / "draft")
    exits = ("export", checkpoint, "--output", output, "--exit")
    fails("--exit must be in 1..6, got 7 (model has 6 layers)", *exits, "7")
    fails("--exit must be in 1..5, got 6 (model has 6 layers)", *exits, "6", "--engine", "vllm")
    assert "--engine must be one of vllm, llama.cpp" in run(*exits, "1", "--engine", "onnx").err
    fails(f"--output must be another folder than the model's, got {checkpoint}", *exits[:2], "--output", checkpoint)
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "README.md").write_text("mine")
    assert "in the way is README.md, which layerskip did not write" in run(*exits, "1", "--engine", "vllm").err
    assert run(*exits, "1").code == 0
    assert (tmp_path / "draft" / "README.md").read_text() == "mine"


def test_the_number_of_draft_tokens(with_block):
    """A draft of acceptance a and cost c: 1 + a + ... + a^d tokens in the time 1 + d c, by Leviathan et al. (2023)."""
    loaded = decoder_of(for_training(str(with_block), "cpu", "fp32"))
    assert recommended_length(replace(loaded, info=replace(loaded.info, exit_layer=2, num_draft_tokens=9)), 2, 3)[0] == 9
    assert recommended_length(loaded, 4, 4)[0] == 6
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    cost = (3 * layer + 300 * 32) / (6 * layer + 300 * 32)
    rates = {drafts: (1 - 0.75 ** (drafts + 1)) / 0.25 / (1 + drafts * cost) for drafts in range(17)}
    assert recommended_length(loaded, 2, 3)[0] == max(rates, key=rates.get)


@pytest.mark.parametrize("engine", get_args(Engine))
def test_paths_are_quoted_for_the_language_of_the_instructions(engine):
    text = instructions(engine, "/it's target", "/a draft", 5)
    language, _, code = text.removeprefix("```").removesuffix("\n```\n").partition("\n")
    if language == "python":
        compile(code, engine, "exec")
        assert '"/it\'s target"' in code and "'/a draft'" in code
    else:
        import shlex

        words = shlex.split(code.replace("\\\n", ""))
        assert "/it's target" in words and any("/a draft" in word for word in words)


def test_transformers_drafts_with_it_as_told(checkpoint, tmp_path, capsys):
    """The program of the README runs and gives the text of the model alone."""
    done = run("export", checkpoint, "--exit", "1", "--output", str(tmp_path / "draft"), "--engine", "transformers")
    code = done.out.split("```python\n")[1].removesuffix("```\n").replace("max_new_tokens=128", "max_new_tokens=16")
    exec(code.replace('"PROMPT"', '"set an alarm"'), {})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    alone = model.generate(**tokenizer("set an alarm", return_tensors="pt"), do_sample=False, max_new_tokens=16)
    assert capsys.readouterr().out.strip() == tokenizer.decode(alone[0], skip_special_tokens=True).strip()
