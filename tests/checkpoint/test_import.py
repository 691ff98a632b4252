"""`layerskip import`: a GGUF file written here, and a folder."""

import json

import gguf
import torch
from command_line import fails, run

from layerskip_core.checkpoint.load import load_checkpoint


def write_gguf(folder, path):
    """A Llama checkpoint's folder as a GGUF file, with q and k rows in llama.cpp's order: halves of each head interleaved."""
    loaded = load_checkpoint(folder, "cpu", "fp32")
    config = loaded.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = loaded.tokenizer.get_vocab()
    merges = json.loads(loaded.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(loaded.tokenizer.bos_token_id)
    writer.add_eos_token_id(loaded.tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in loaded.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return loaded


def test_a_gguf_file_becomes_a_plain_checkpoint(checkpoint, tmp_path):
    file, output = tmp_path / "tiny.gguf", tmp_path / "imported"
    original = write_gguf(checkpoint, file)
    assert run("import", str(file), "--output", str(output)).code == 0
    imported = load_checkpoint(str(output), "cpu", "fp32")
    assert not hasattr(imported.model.config, "quantization_config")
    assert imported.info.details["imported_from"] == str(file)
    for name, weight in original.model.state_dict().items():
        assert torch.equal(imported.model.state_dict()[name], weight), name
    text = "remind me to call mom"
    assert imported.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]


def test_a_folder_is_written_in_the_precision_asked_for(checkpoint, tmp_path):
    output = str(tmp_path / "half")
    assert "in bfloat16" in run("import", checkpoint, "--output", output, "--dtype", "bf16").err
    original, imported = load_checkpoint(checkpoint, "cpu", "fp32"), load_checkpoint(output, "cpu", "fp32")
    assert imported.prompt_template == original.prompt_template
    for name, weight in original.model.state_dict().items():
        assert torch.equal(imported.model.state_dict()[name], weight.bfloat16().float()), name
    fails(
        f"--output {output} already holds a model; give --overwrite to replace it, or another folder",
        *("import", checkpoint, "--output", output),
    )
