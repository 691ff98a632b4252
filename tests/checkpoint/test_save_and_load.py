"""Models are loaded as they were saved, as plain checkpoints, or refused; a save that fails or is
killed changes nothing.
"""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from command_line import fails
from conftest import tiny_model
from evaluating import tiny_loaded
from safetensors.torch import load_file, save_file

from layerskip_core import processor
from layerskip_core.checkpoint.info import CheckpointInfo, read_info
from layerskip_core.checkpoint.loaded import Decoder, decoder_of, end_ids, pick_device, pick_dtype
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.checkpoint.save import (
    READY,
    read_whole,
    save_checkpoint,
    save_files,
    settle,
    write_info,
)
from layerskip_core.checkpoint.transformers_read import blank
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.resolution import Recommended
from layerskip_core.errors import CheckpointError, ConfigError
from layerskip_core.model import NativeBackend, TransformersBackend
from layerskip_core.processor import memory_budget
from layerskip_core.prompting import PromptTemplate

INFO = CheckpointInfo("{prompt} ->", 3, 5, {"rows": 7, "note": "naïve"})
IDS = torch.tensor([[5, 9, 33, 7]])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_loaded().tokenizer


def model_of(vocab_size=300, **changes):
    return tiny_model(dtype=torch.float32, vocab_size=vocab_size, **changes)


@pytest.fixture
def folder(tmp_path, tokenizer):
    path = tmp_path / "model"
    save_checkpoint(model_of(), tokenizer, INFO, str(path), torch.float32)
    return path


def test_a_model_comes_back_as_it_was_saved(folder, tokenizer):
    loaded = for_training(str(folder), "cpu", "fp32")
    expected = model_of().state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(
        torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items()
    )
    assert loaded.info == INFO and loaded.backend.num_layers == 6 and not loaded.model.training
    decoder = decoder_of(loaded)
    assert decoder.encode_prompt("remind me") == tokenizer("remind me ->")["input_ids"]
    assert (
        decoder.with_template("raw", None).encode_prompt("remind me")
        == tokenizer("remind me")["input_ids"]
    )
    assert decoder.detokenize([*tokenizer("remind  me , 's")["input_ids"], 2]) == "remind  me , 's"
    assert decoder.recommended() == Recommended(3, 5, "self-speculative")


def test_tied_weights_stay_tied_and_capped_attention_eager(tmp_path, tokenizer):
    save_checkpoint(
        model_of(tie_word_embeddings=True), tokenizer, INFO, str(tmp_path), torch.float32
    )
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = for_training(str(tmp_path), "cpu", "fp32").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(IDS).logits, model_of(tie_word_embeddings=True)(IDS).logits)
    shape = {"vocab_size": 300, "attn_logit_softcapping": 2.0}
    save_checkpoint(
        tiny_model("gemma2", torch.float32, **shape), tokenizer, INFO, str(tmp_path), torch.float32
    )
    assert for_training(str(tmp_path), "cpu").model.config._attn_implementation == "eager"


def test_devices_and_precisions():
    with pytest.raises(
        ConfigError, match="`device` must be auto, cpu, cuda, cuda:N or mps, got gpu"
    ):
        pick_device("gpu")
    for absent in {"cuda", "mps"} - ({"cuda"} if torch.cuda.is_available() else set()):
        with pytest.raises(ConfigError, match=f"`device` {absent} was asked for, but"):
            pick_device(absent)
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert pick_dtype("auto", cpu, 1_000_000) == torch.float32
    assert pick_dtype("auto", torch.device("cuda"), 1) == torch.bfloat16
    assert (
        pick_dtype("bf16", cpu, 1) == torch.bfloat16
        and pick_dtype("fp32", torch.device("cuda"), 1) == torch.float32
    )


def test_eos_ids_come_from_both_configs_and_the_tokenizer(folder):
    loaded = for_training(str(folder))
    loaded.model.generation_config.eos_token_id = [4, 6]
    loaded.model.config.eos_token_id = 8
    assert decoder_of(loaded).eos_ids == {4, 6, 8, 2}  # generation config, config, tokenizer
    loaded.model.generation_config.eos_token_id = loaded.model.config.eos_token_id = None
    assert decoder_of(loaded).eos_ids == {2}
    assert end_ids(None, loaded.model.config) == frozenset()


def test_a_blank_model_has_weights_of_its_seed_and_the_size_of_a_new_tokenizer(
    folder, tokenizer, tmp_path
):
    first, again, other = (blank(str(folder), seed).model.lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, model_of().lm_head.weight)
    # A config alone: no weights, no tokenizer
    model_of(vocab_size=67, eos_token_id=5).config.save_pretrained(tmp_path)
    loaded = blank(str(tmp_path), 0, tokenizer)
    assert loaded.backend.spec.vocab == 300 and decoder_of(loaded).eos_ids == {2}
    assert loaded.model.config.pad_token_id == 0


@pytest.mark.parametrize("dtype, itemsize", [("fp32", 4), ("bf16", 2)])
def test_a_copy_for_adaptive_drafting_is_made_where_memory_is_free_for_it(
    dtype, itemsize, monkeypatch
):
    """Beside keys and values (a fifth of the memory by default) the weights have room, and a byte
    for each of the copy.
    """

    def sides(available, kv_megabytes=None):
        monkeypatch.setattr(processor, "available_memory", lambda: int(available))
        memory = None if kv_megabytes is None else memory_budget(kv_megabytes)[1]
        decoder = for_decoding(
            "embedded", "cpu", dtype, PackingConfig(adaptive=True), memory=memory
        )
        backend = decoder.backend
        told = " ".join(decoder.notes)
        if not isinstance(backend, NativeBackend):
            pytest.skip("no kernels were built here")
        assert ("int8" in backend.draft_sides) != (
            "drafting without an int8 copy of the weights: with it the model needs" in told
        )
        return list(backend.draft_sides), backend.spec.parameters

    _, parameters = sides(0)
    needed = parameters * (itemsize + 1)
    for taken in (None, 1, 2**20):
        all_free = needed / 0.8 if taken is None else needed + taken * 2**20
        assert sides(all_free - 9, taken) == ([None], parameters) and sides(
            all_free + 9, taken
        ) == ([None, "int8"], parameters)


# --- saving
# -----------------------------------------------------------------------------------------------------------


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def test_layerskip_json_is_documented_and_readable(folder):
    assert json.loads((folder / "layerskip.json").read_text(encoding="utf-8")) == {
        "format": 1,
        "prompt_template": "{prompt} ->",
        "recommended": {"exit_layer": 3, "num_draft_tokens": 5},
        "rows": 7,
        "note": "naïve",
        "files": [*sorted(contents(folder).keys() - {"layerskip.json"}), "layerskip.json"],
    }
    write_info(str(folder), CheckpointInfo("x {prompt}"))
    assert read_info(str(folder)) == CheckpointInfo("x {prompt}")
    (folder / "layerskip.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"layerskip\.json: not valid"):
        read_info(str(folder))


def test_a_full_disk_leaves_the_older_model(folder, tokenizer, monkeypatch):
    before = contents(folder)
    other = model_of(num_hidden_layers=2)

    def full(*_, **__):
        (next(folder.glob(".layerskip-staging-*")) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(other), "save_pretrained", full)
    with pytest.raises(
        CheckpointError, match=f"cannot write the model to {folder}: .*No space left on device"
    ):
        save_checkpoint(other, tokenizer, CheckpointInfo(), str(folder), torch.float32)
    assert contents(folder) == before
    assert not [path for path in folder.iterdir() if path.is_dir()]


OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir")


class Killed(BaseException):
    """Stands for kill -9: after it the process changes nothing on disk."""


@pytest.fixture
def quick_disk():
    """Without flushes, which take most of the time and which a kill does not need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def killed_at(monkeypatch, quick_disk):
    """Makes the k-th disk operation and all later ones fail before they do anything; counts the
    operations.
    """

    def arm(step):
        count = [0]

        def guarded(operation):
            def act(*arguments, **keywords):
                count[0] += 1
                if step is not None and count[0] >= step:
                    raise Killed
                return operation(*arguments, **keywords)

            return act

        for name in OPERATIONS:
            monkeypatch.setattr(os, name, guarded(getattr(os, name)))
        return count

    yield arm
    monkeypatch.undo()


OLD = {"config.json": "old", "a.safetensors": "old", "c.safetensors": "old", "templates/x": "old"}
NEW = {"config.json": "new", "b.safetensors": "new", "a.safetensors": "new", "other/y": "new"}


def replace_by(files, folder):
    def write(staging):
        for name, text in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)

    save_files(write, CheckpointInfo(), str(folder))


def old_model(folder):
    """A folder with an old model, one of whose files is in a sub-folder, and a user's notes."""
    replace_by(OLD, folder)
    (folder / "notes").write_text("a user's")
    return folder


def state(folder):
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and ".layerskip" not in str(path.relative_to(folder))
    ]
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in files}
    del found["layerskip.json"]
    assert found.pop("notes") == "a user's"
    return found


def test_killed_at_any_operation_the_folder_holds_the_old_model_or_the_new_one(
    tmp_path, killed_at, monkeypatch
):
    folder = old_model(tmp_path / "whole")
    count = killed_at(None)
    replace_by(NEW, folder)
    monkeypatch.undo()
    assert state(folder) == NEW and len(os.listdir(folder)) == 6
    outcomes = []
    for step in range(1, count[0] + 1, 2):
        folder = old_model(tmp_path / str(step))
        killed_at(step)
        with pytest.raises(Killed):
            replace_by(NEW, folder)
        monkeypatch.undo()
        settle(folder)  # what every reader does first
        assert state(folder) in (OLD, NEW), step
        outcomes.append(state(folder) == NEW)
        replace_by(OLD, folder)
        assert state(folder) == OLD and not (folder / "other").exists()
    # Old up to some step, new from then on
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}


def test_every_command_finishes_an_interrupted_save(tmp_path, killed_at, monkeypatch):
    tokenizer = tiny_loaded().tokenizer
    model = tiny_model(dtype=torch.float32, vocab_size=300, num_hidden_layers=2)
    for step in range(1, 99):
        folder = tmp_path / str(step)
        killed_at(step)
        with pytest.raises(Killed):
            save_checkpoint(model, tokenizer, CheckpointInfo(), str(folder), torch.float32)
        monkeypatch.undo()
        if (folder / READY).exists():
            break
    assert not (folder / "config.json").exists()
    fails(
        f"--output {folder} already holds a model; give --overwrite to replace it, or another folder",
        f"import no/model --output {folder}",
    )  # fmt: skip
    assert (
        for_decoding(str(folder), "cpu", "fp32").backend.num_layers == 2
        and not (folder / READY).exists()
    )


def test_a_reader_sees_one_model_whatever_happens_meanwhile(tmp_path):
    folder = old_model(tmp_path / "model")
    seen = []

    def slow_read():
        seen.append(state(folder))
        if len(seen) == 1:
            replace_by(NEW, folder)
        return state(folder)

    assert read_whole(folder, slow_read) == NEW and seen == [OLD, NEW]


def test_recommendations():
    backend = TransformersBackend(model_of(num_hidden_layers=8))

    def recommended(name, **info):
        return Decoder(
            name, backend, None, CheckpointInfo(**info), frozenset(), PromptTemplate()
        ).recommended()

    assert recommended("facebook/layerskip-llama2-7B") == Recommended(8, 12, exits=(8,))
    assert recommended("some/model") == Recommended(2, 6)  # a quarter of 8 layers
    assert recommended("some/model", exit_layer=5) == Recommended(5, 6, "self-speculative")
    assert (
        recommended(
            "facebook/layerskip-llama2-7B", exit_layer=5, strategy="autoregressive"
        ).strategy
        == "autoregressive"
    )


def test_nothing_is_written_to_the_terminal(folder, tokenizer, capfd):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "unexpected": torch.zeros(1)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded = for_training(str(folder))
    save_checkpoint(loaded.model, tokenizer, INFO, str(folder), torch.float32)
    assert capfd.readouterr() == ("", "")


def test_the_template_of_layerskip_json_takes_precedence_over_the_chat_template(folder, tokenizer):
    chat = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    (folder / "chat_template.jinja").write_text(chat)

    def ids(prompt, **info):
        write_info(str(folder), CheckpointInfo(**info))
        assert read_info(str(folder)) == CheckpointInfo(**info)
        return decoder_of(for_training(str(folder), "cpu")).encode_prompt(prompt)

    assert ids("go", prompt_template="a {prompt}") == tokenizer("a go")["input_ids"]
    assert ids("go") == ids("go", prompt_template="chat") == tokenizer("<go>!")["input_ids"]
    assert (
        ids("go", prompt_template="chat", system="be brief")
        == tokenizer("<be brief><go>!")["input_ids"]
    )
    assert ids("go", prompt_template="raw") == tokenizer("go")["input_ids"]
    # No str.format
    assert ids("{prompt}", prompt_template="{x} {prompt}") == tokenizer("{x} {prompt}")["input_ids"]
    (folder / "chat_template.jinja").unlink()
    assert ids("go") == tokenizer("go")["input_ids"]
