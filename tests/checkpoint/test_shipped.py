"""The drafter that a checkpoint ships: found by its tensors, carried along, trained on, and told of
where it no longer fits.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import run
from conftest import older, tiny_model
from decodings import WIDE, ids_of
from evaluating import tiny_loaded
from exit_block_models import random_blocks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from layerskip_core.checkpoint.folder import MTP_FILE
from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.checkpoint.shipped import STALE
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode
from layerskip_core.model import TransformersBackend
from layerskip_core.model.exit_blocks import MTP, MTP_LAYOUTS, NO_STORED_DRAFTERS, StoredDrafters

NAMES = {  # those of Qwen/Qwen3.5-0.8B
    *(
        f"mtp.{name}.weight"
        for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    ),
    *(f"mtp.layers.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
    *(f"mtp.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(
        f"mtp.layers.0.self_attn.{name}.weight"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    ),
}
PROMPT = list(range(20, 40))


def stored(name):
    return MTP_LAYOUTS[0].stored(name, 6)


@pytest.fixture
def shipped(tmp_path):
    """A folder as on the hub: the text part of a model with images, in two shards with an index,
    and its drafter.
    """
    folder = tmp_path / "hub"
    tokenizer = tiny_loaded(torch.float32).tokenizer
    model = tiny_model("qwen3_5_text", torch.float32, vocab_size=len(tokenizer), **WIDE)
    made = random_blocks(model, MTP)
    drafter = {
        stored(name): made.take(name) for name in made.shapes(TransformersBackend(model).spec)
    }
    assert drafter.keys() == NAMES
    save_checkpoint(model, tokenizer, CheckpointInfo("{prompt}\n"), str(folder), torch.float32)
    (folder / "layerskip.json").unlink()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights = {
        name.replace("model.", "model.language_model.", 1): weight
        for name, weight in weights.items()
    }
    weights |= {"model.visual.blocks.0.attn.qkv.bias": torch.zeros(3), **drafter}
    place = {
        name: f"model-0000{1 + index % 2}-of-00002.safetensors"
        for index, name in enumerate(sorted(weights))
    }
    for file in set(place.values()):
        save_file(
            {name: weights[name] for name in weights if place[name] == file},
            folder / file,
            {"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": place})
    )
    config = json.loads((folder / "config.json").read_text())
    hub = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "transformers_version": "4.57.0.dev0",
    }
    hub |= {
        "text_config": config | {"mtp_num_hidden_layers": 1},
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    (folder / "config.json").write_text(json.dumps(hub))
    return folder


def drafted(folder):
    """A decoding with the drafter of a folder: its ids, what was accepted of how many drafts, and
    the notes.
    """
    loaded = for_decoding(str(folder), "cpu", "fp32")
    decoding = decode(
        loaded.backend, PROMPT, DecodingConfig("mtp", num_draft_tokens=3, max_new_tokens=20)
    )
    return ids_of(decoding), (decoding.stats.accepted, decoding.stats.drafted), loaded.notes


def whole(folder, output):
    """The same model alone, as transformers writes it: `mtp.*` is lost."""
    assert not run(f"import {folder} --output {output}").code
    (output / MTP_FILE).unlink()
    return output


def test_it_is_found_in_a_folder_as_on_the_hub(shipped, tmp_path):
    ids, (_, count), notes = drafted(shipped)
    assert count > 0 and not notes
    plain = for_decoding(str(shipped), "cpu", "fp32")
    assert ids == ids_of(
        decode(plain.backend, PROMPT, DecodingConfig("autoregressive", max_new_tokens=20))
    )
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    ours = TransformersBackend(
        model.eval(), replace(NO_STORED_DRAFTERS, mtp=StoredDrafters((MTP,), taken(shipped).get))
    )
    decoding = decode(ours, PROMPT, DecodingConfig("mtp", num_draft_tokens=3, max_new_tokens=20))
    assert ids_of(decoding) == ids
    assert "mtp" not in for_decoding(str(whole(shipped, tmp_path / "whole"))).backend.drafters


def taken(folder):
    weights = {}
    for path in Path(folder).glob("*.safetensors"):
        weights |= load_file(path)
    return {
        name: weights[stored(name)]
        for name in MTP.shapes(TransformersBackend(tiny_model("qwen3_5_text", **WIDE)).spec)
    }


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model."])
def test_with_any_prefix_and_without_transformers(shipped, tmp_path, prefix):
    """The lean reader takes it too, from the only file of a model."""
    folder = whole(shipped, tmp_path / "lean")
    expected = drafted(shipped)
    drafter = {f"{prefix}{stored(name)}": weight for name, weight in taken(shipped).items()}
    save_file(
        {**load_file(folder / "model.safetensors"), **drafter},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    assert drafted(folder) == expected
    older(folder)
    assert drafted(folder) == expected


def test_another_layout_is_left_aside_and_told(shipped):
    """A model loads as without it."""
    path = next(
        path for path in shipped.glob("*.safetensors") if "mtp.fc.weight" in load_file(path)
    )
    save_file(
        load_file(path) | {"mtp.layers.1.input_layernorm.weight": torch.ones(64)},
        path,
        {"format": "pt"},
    )
    loaded = for_decoding(str(shipped), "cpu", "fp32")
    assert not loaded.backend.drafters
    told = "mtp.layers.1.input_layernorm.weight must be left out, found F32 [64]"
    assert loaded.notes == (
        f"its drafter (mtp) is not used, because its layout is unknown: {told}",
    )


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "qwen3_next"])
def test_its_experts_are_stored_one_by_one_or_together(tmp_path, model_type):
    tokenizer = tiny_loaded(torch.float32).tokenizer
    found = []
    model = tiny_model(model_type, torch.float32, vocab_size=len(tokenizer), **WIDE)
    save_checkpoint(model, tokenizer, CheckpointInfo("{prompt}\n"), str(tmp_path), torch.float32)
    made = random_blocks(model, MTP)
    weights = load_file(tmp_path / "model.safetensors")
    drafter = {
        stored(name): made.take(name) for name in made.shapes(TransformersBackend(model).spec)
    }
    apart = dict(drafter)
    inward, back = (
        apart.pop(f"mtp.layers.0.mlp.experts.{name}_proj") for name in ("gate_up", "down")
    )
    for number, (both, own) in enumerate(zip(inward, back, strict=True)):
        gate, up = both.chunk(2)
        for name, part in (("gate", gate), ("up", up), ("down", own)):
            apart[f"mtp.layers.0.mlp.experts.{number}.{name}_proj.weight"] = part.contiguous()
    for held in (drafter, apart):
        save_file({**weights, **held}, tmp_path / "model.safetensors", {"format": "pt"})
        found.append(drafted(tmp_path))
    assert found[0] == found[1] and found[0][1][1] > 0


def test_what_is_made_of_the_model_keeps_it(shipped, tmp_path):
    expected = drafted(shipped)
    for name, arguments in {
        "imported": (f"import {shipped}",),
        "exported": (f"export {shipped} --exit 6",),
        "packed": (f"export {shipped} --format packed --dtype fp32",),
    }.items():
        done = run(*arguments, "--output", str(tmp_path / name))
        assert not done.code, done.err
        assert drafted(tmp_path / name) == expected, name
    first = drafted(tmp_path / "imported")
    again = run(f"import {tmp_path}/imported --output {tmp_path}/again --dtype bf16")
    assert not again.code and drafted(tmp_path / "again")[2] == first[2] == ()


def test_a_finetune_keeps_it_and_training_it_on_ends_the_note(shipped, tmp_path):
    tuned = str(tmp_path / "tuned")
    rows = "--data commands --samples 16 --batch-size 4 --steps 2"
    small = (rows, "--max-length 48 --threads 1")
    done = run(f"finetune --model {shipped} --output {tuned} --recipe none --lr 0.01", *small)
    assert not done.code, done.err
    assert "the drafter of its checkpoint (mtp) is saved as it is" in done.err
    assert drafted(tuned)[2] == (STALE,)
    assert not run(f"export {tuned} --output {tmp_path}/packed --format packed").code
    assert drafted(tmp_path / "packed")[2] == (STALE,)
    before = load_file(Path(tuned) / MTP_FILE)
    assert before.keys() == NAMES
    done = run(
        f"train-drafter --model {tuned} --output {tuned} --start-from shipped",
        "--answer-tokens 8",
        *small,
    )
    assert not done.code, done.err
    assert "the drafter that the checkpoint ships" in done.err
    after = load_file(Path(tuned) / MTP_FILE)
    assert before.keys() == after.keys() and not torch.equal(
        before["mtp.fc.weight"], after["mtp.fc.weight"]
    )
    assert (
        torch.equal(before["mtp.norm.weight"], after["mtp.norm.weight"]) and drafted(tuned)[2] == ()
    )


def test_adapters_draft_with_what_their_base_ships(shipped, tmp_path):
    adapter = str(tmp_path / "adapter")
    small = "--samples 8 --batch-size 4 --steps 1 --threads 1"
    lora = "--lora-rank 2 --lora-keep --recipe none --replay 0 --max-length 48"
    done = run(f"finetune --model {shipped} --output {adapter}", lora, small)
    assert not done.code, done.err
    assert drafted(adapter)[2] == (STALE,) and not (Path(adapter) / MTP_FILE).exists()
    assert not run(f"import {adapter} --output {tmp_path}/merged").code
    assert drafted(tmp_path / "merged")[2] == (STALE,)


def test_without_kernels_it_drafts_too(shipped, monkeypatch):
    expected = drafted(shipped)
    monkeypatch.setenv("LAYERSKIP_KERNELS", "torch")
    assert isinstance(for_decoding(str(shipped), "cpu", "fp32").backend, TransformersBackend)
    assert drafted(shipped)[0] == expected[0] and drafted(shipped)[1][1] > 0
