"""`layerskip export --format gguf`: read back by transformers, and by llama.cpp where xllamacpp is
installed.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
import transformers
from command_line import fails, run
from conftest import CHANGES, tiny_model
from evaluating import tiny_loaded
from exit_block_models import add_eagle3, random_eagle3
from packaging.version import Version
from text_bpe import TEXTS, text_bpe
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from layerskip_core.checkpoint.open import for_training
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode
from layerskip_core.errors import CheckpointError
from layerskip_core.export.gguf import SPLITS, add_tokenizer, write_eagle3, write_gguf
from layerskip_core.model import TransformersBackend
from layerskip_core.model.exit_blocks import StoredDrafters
from layerskip_core.model.spec import ModelSpec

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 5},
}


def tiny(model_type, **changes):
    """With weights that f16 holds exactly."""
    model = tiny_model(
        model_type,
        torch.float32,
        vocab_size=300,
        **{**CHANGES.get(model_type, {}), **KINDS[model_type], **changes},
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model, ModelSpec.of(model.config)


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma3_text"])
def test_transformers_reads_the_model_back(model_type, tmp_path):
    if model_type == "gemma3_text" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("transformers before 5.24 reads no byte-level tokenizer of a Gemma")
    model, spec = tiny(model_type)
    write_gguf(model, tiny_loaded().tokenizer, spec, tmp_path / "model.gguf", "f16")
    read = for_training(str(tmp_path / "model.gguf"), "cpu", "fp32")
    assert ModelSpec.of(read.model.config).kinds == spec.kinds
    for name in spec.shapes:
        torch.testing.assert_close(
            read.model.get_parameter(name), model.get_parameter(name), rtol=0, atol=1e-6
        )
    for text in TEXTS:
        assert read.tokenizer(text)["input_ids"] == tiny_loaded().tokenizer(text)["input_ids"]


def test_a_model_and_its_drafter_in_the_eagle3_layout(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "drafting"))
    output = tmp_path / "pair"
    add_eagle3(folder)
    done = run(f"export {folder} --output {output} --engine llama.cpp")
    assert f"--spec-type draft-eagle3 -md {output}/draft.gguf --spec-draft-n-max 4" in done.out
    assert f"wrote {folder} and its drafter in the EAGLE-3 layout to {output}" in done.err
    read = gguf.GGUFReader(output / "draft.gguf")
    values = {
        name: read.get_field(f"eagle3.{name}").contents()
        for name in ("target_layers", "block_count", "vocab_size")
    }
    assert values == {"target_layers": [2, 3, 5], "block_count": 1, "vocab_size": 300}
    stored = {tensor.name: tensor.data for tensor in read.tensors}
    drafter = random_eagle3(ModelSpec.of(tiny("llama")[0].config))
    assert stored["d2t"].tolist() == drafter.tokens.tolist()
    for name, place in (
        ("fc.weight", "fc.weight"),
        ("layers.0.hidden_norm.weight", "blk.0.attn_norm_2.weight"),
    ):
        assert np.array_equal(stored[place], drafter.weights[name].numpy())
    assert len(stored) == len(drafter.weights) + 1
    assert run(f"export {folder} --exit 2 --output {output} --format gguf --overwrite").code == 0
    assert gguf.GGUFReader(output / "draft.gguf").get_field("llama.block_count").contents() == 2


@pytest.mark.parametrize(
    "model_type, form, why",
    [
        ("qwen2", {}, "a drafter of a llama, mistral or qwen3, found one of a qwen2"),
        ("llama", {"layers": (2, 5)}, r"must read the states after 3 layers, found \[2, 5\]"),
        ("llama", {"norm_output": True}, r"without the norms of EAGLE-3\.1"),
    ],
)
def test_drafters_that_llama_cpp_would_run_otherwise_are_refused(model_type, form, why, tmp_path):
    spec = ModelSpec.of(tiny(model_type)[0].config)
    drafter = random_eagle3(spec)
    drafter = replace(drafter, form=replace(drafter.form, **form))
    with pytest.raises(CheckpointError, match=why):
        write_eagle3(drafter, tiny_loaded().tokenizer, spec, tmp_path / "draft.gguf", "f16")


def test_a_model_and_its_draft_for_llama_cpp(checkpoint, tmp_path):
    output = tmp_path / "pair"
    done = run(f"export {checkpoint} --output {output} --engine llama.cpp")
    assert done.code == 0 and sorted(os.listdir(output)) == [
        "README.md",
        "draft.gguf",
        "target.gguf",
    ]
    assert (
        f"llama-server -m {output}/target.gguf" in done.out and "--spec-draft-n-max 6" in done.out
    )
    whole, draft = (
        for_training(str(output / name), "cpu", "fp32") for name in ("target.gguf", "draft.gguf")
    )
    original = for_training(checkpoint, "cpu", "fp32")
    assert (whole.backend.num_layers, draft.backend.num_layers) == (6, 1)
    for read in (whole, draft):
        for name in read.backend.spec.shapes:
            stored = original.model.get_parameter(name)
            expected = stored.half().float() if stored.dim() > 1 else stored
            torch.testing.assert_close(read.model.get_parameter(name), expected, rtol=0, atol=0)
    again = f"export {checkpoint} --output {output} --format gguf"
    fails(
        f"--output {output} already holds target.gguf; give --overwrite to replace it, or another folder",
        again,
    )
    assert run(again, "--exit 6 --overwrite --dtype q8_0").code == 0
    assert tensors(output / "target.gguf")["blk.5.ffn_up.weight"].tensor_type.name == "Q8_0"
    # The last layer needs no draft, and another's is gone
    assert sorted(os.listdir(output)) == ["README.md", "target.gguf"]


@pytest.mark.parametrize("kind, steps", [("q8_0", 127), ("q4_0", 7)])
def test_low_bit_weights_are_near_the_stored_ones(kind, steps, tmp_path):
    """A row of 32 has one scale; the MLP's rows of 48 back to the hidden states cannot, and stay
    f16.
    """
    model, spec = tiny("qwen3")
    write_gguf(model, tiny_loaded().tokenizer, spec, tmp_path / "model.gguf", kind)
    stored = tensors(tmp_path / "model.gguf")
    types = {name: tensor.tensor_type.name.lower() for name, tensor in stored.items()}
    assert (types["blk.0.attn_q.weight"], types["blk.0.ffn_down.weight"]) == (kind, "f16")
    assert (types["token_embd.weight"], types["output_norm.weight"]) == ("q8_0", "f32")
    tensor = stored["blk.0.attn_q.weight"]
    read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().numpy()
    assert 0 < np.abs(read - weight).max() <= 1.01 * np.abs(weight).max() / steps


@pytest.mark.parametrize(
    "model_type, changes, why",
    [
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 5},
            "it has sliding windows in other",
        ),
        (
            "gemma3_text",
            {"layer_types": ["sliding_attention", "full_attention"] * 3},
            "it has sliding windows in other",
        ),
        ("gemma3_text", {"query_pre_attn_scalar": 24}, "it has attention scores scaled otherwise"),
        ("llama", {"hidden_act": "gelu"}, "it has the activation gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "it has a rope of type yarn",
        ),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(model_type, changes, why, tmp_path):
    model, spec = tiny(model_type, **changes)
    with pytest.raises(CheckpointError, match=f"this {model_type} cannot be a GGUF file: {why}"):
        write_gguf(model, tiny_loaded().tokenizer, spec, tmp_path / "model.gguf", "f16")
    assert os.listdir(tmp_path) == []


def settings_of(xllamacpp, path):
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = 128
    settings.port = 0
    settings.warmup = settings.fit_params = False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = settings.n_parallel = 1
    return settings


@pytest.mark.parametrize("model_type", KINDS)
def test_llama_cpp_gives_the_same_tokens(model_type, tmp_path):
    """Both encode the text alike, and the best token is the same at every position."""
    xllamacpp = pytest.importorskip("xllamacpp")
    tokenizer = text_bpe() if model_type == "gemma3_text" else tiny_loaded().tokenizer
    model, spec = tiny(model_type)
    write_gguf(model, tokenizer, spec, tmp_path / "model.gguf", "f16")
    server = xllamacpp.Server(settings_of(xllamacpp, tmp_path / "model.gguf"))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        request = {
            "temperature": 0,
            "max_tokens": 12,
            "return_tokens": True,
            "verbose": True,
            "ignore_eos": True,
        }
        answers = [
            server.handle_completions({"prompt": prompt, **request}) for prompt in (ids, text)
        ]
        made = model.generate(
            torch.tensor([ids]), do_sample=False, min_new_tokens=12, max_new_tokens=12
        )
        mine = made[0, len(ids) :].tolist()
        for answer in answers:
            assert answer["__verbose"]["tokens_evaluated"] == len(ids)
            assert answer["__verbose"]["tokens"] == mine


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_llama_cpp_accepts_the_same_drafts(model_type, tmp_path):
    """Of a random drafter that scores only the tokens of the answer, so that some drafts are
    right.
    """
    xllamacpp = pytest.importorskip("xllamacpp")
    tokenizer, (model, spec) = tiny_loaded().tokenizer, tiny(model_type)
    ids = tokenizer(TEXTS[0])["input_ids"]
    plain = decode(
        TransformersBackend(model), ids, DecodingConfig("autoregressive", max_new_tokens=40)
    )
    mine = [token for [step] in plain for token in step.ids]
    drafter = random_eagle3(spec, torch.tensor(sorted(set(mine))))
    write_gguf(model, tokenizer, spec, tmp_path / "model.gguf", "f16")
    write_eagle3(drafter, tokenizer, spec, tmp_path / "draft.gguf", "f16")
    settings = settings_of(xllamacpp, tmp_path / "model.gguf")
    settings.speculative.types = [
        xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3
    ]
    settings.speculative.draft.mparams.path = str(tmp_path / "draft.gguf")
    settings.speculative.draft.n_max = 4
    request = {
        "temperature": 0,
        "max_tokens": 40,
        "return_tokens": True,
        "verbose": True,
        "ignore_eos": True,
    }
    found = xllamacpp.Server(settings).handle_completions({"prompt": ids, **request})["__verbose"]
    backend = TransformersBackend(model, StoredDrafters((), lambda name: None, drafter))
    drafted = decode(backend, ids, DecodingConfig("eagle3", num_draft_tokens=4, max_new_tokens=40))
    assert found["tokens"] == [token for [step] in drafted for token in step.ids] == mine
    assert found["timings"]["draft_n_accepted"] == drafted.stats.accepted > 1


def recorded(tokenizer, vocab=300):
    """What a GGUFWriter gets of a tokenizer."""
    writer = Mock()
    add_tokenizer(writer, tokenizer, vocab)
    return {name.removeprefix("add_"): value for name, (value,), _ in writer.method_calls}


def byte_level(*before):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(False, use_regex=not before)]
    )
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=40, special_tokens=["<s>", "</s>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_how_text_is_split_before_byte_level_bpe():
    for (pattern, *_), name in SPLITS.items():
        if name in ("llama-bpe", "qwen2"):
            assert (
                recorded(byte_level(pre_tokenizers.Split(Regex(pattern), "isolated")))[
                    "tokenizer_pre"
                ]
                == name
            )
    assert recorded(tiny_loaded().tokenizer)["tokenizer_pre"] == "gpt-2"
    with pytest.raises(
        CheckpointError, match="must split text as one of gpt-2, smollm, llama-bpe, qwen2 does"
    ):
        recorded(byte_level(pre_tokenizers.Whitespace()))
