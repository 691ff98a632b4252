"""`layerskip import` of a GGUF file and of a folder."""

import torch
from command_line import fails, run
from gguf_file import write_gguf

from layerskip_core.checkpoint.load import for_training


def test_a_gguf_file_becomes_a_plain_checkpoint(checkpoint, tmp_path):
    file, output = tmp_path / "tiny.gguf", tmp_path / "imported"
    original = write_gguf(checkpoint, file)
    assert run("import", str(file), "--output", str(output)).code == 0
    imported = for_training(str(output), "cpu", "fp32")
    assert not hasattr(imported.model.config, "quantization_config")
    assert imported.info.details["imported_from"] == str(file)
    for name, weight in original.model.state_dict().items():
        assert torch.equal(imported.model.state_dict()[name], weight), name
    text = "remind me to call mom"
    assert imported.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]


def test_a_folder_is_written_in_the_precision_asked_for(checkpoint, tmp_path):
    output = str(tmp_path / "half")
    assert "in bfloat16" in run("import", checkpoint, "--output", output, "--dtype", "bf16").err
    original, imported = for_training(checkpoint, "cpu", "fp32"), for_training(output, "cpu", "fp32")
    assert imported.info.prompt_template == original.info.prompt_template
    for name, weight in original.model.state_dict().items():
        assert torch.equal(imported.model.state_dict()[name], weight.bfloat16().float()), name
    fails(
        f"--output {output} already holds a model; give --overwrite to replace it, or another folder",
        *("import", checkpoint, "--output", output),
    )
