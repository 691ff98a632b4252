"""The cache of loads: what it gives is what the model's files give, and nothing depends on it."""

import os
import shutil

import pytest
import torch
from command_line import run
from conftest import run_texts
from exit_block_models import add_blocks, add_int4
from test_gguf import written

from layerskip_core import load
from layerskip_core.checkpoint import load_cache, sidecars
from layerskip_core.checkpoint.folder import WeightFile
from layerskip_core.checkpoint.gguf_read import GgufFile
from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.load_cache import finish_writing
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import write_info
from layerskip_core.config.model import PackingConfig
from layerskip_core.model.exit_blocks import ExitBlock
from layerskip_core.model.native.compiled import kernels
from layerskip_core.model.native.matrix import NativeMatrix

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="no kernels were built here, or the CPU lacks what they need"
)
ADAPTIVE = PackingConfig(adaptive=True)
TEXT = "wake me up at 7, then </s> play jazz"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, which keeps models of any size."""
    monkeypatch.setenv(sidecars.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(load_cache, "_LEAST", 1)
    return tmp_path / "cache"


@pytest.fixture(params=["q4_0", "q8_0"])
def gguf_model(request, tmp_path):
    path = tmp_path / "model.gguf"
    written(path, "qwen2", request.param, hidden_size=64, head_dim=16, intermediate_size=96)
    return path


@pytest.fixture
def packed(monkeypatch):
    """The names of the matrices that were packed, not read from the cache."""
    names = []
    pack = NativeMatrix.packed.__func__

    def counting(cls, compiled, name, *arguments, **options):
        names.append(name)
        return pack(cls, compiled, name, *arguments, **options)

    monkeypatch.setattr(NativeMatrix, "packed", classmethod(counting))
    return names


def loaded(model, packing=ADAPTIVE, dtype="auto", cache=True):
    decoder = for_decoding(str(model), "cpu", dtype, packing, cache=cache)
    finish_writing()
    return decoder


def files(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


def outputs(decoder):
    """What a model makes of a text: its ids, and the logits of every copy and exit block."""
    ids = decoder.encode_prompt(TEXT)
    backend = decoder.backend
    found = [ids, decoder.detokenize(ids), decoder.eos_ids, decoder.template, decoder.notes]
    prompt = torch.tensor([ids[:20]])
    with torch.inference_mode():
        for side in backend.draft_sides.values():
            hidden = run_texts(side.layers, side.layers.embed(prompt), 0, 2)
            found += [side.whole.unembed(hidden).tolist(), side.at_exits.unembed(hidden).tolist()]
            for block in side.exit_blocks.values():
                found.append(
                    block.head(
                        run_texts(side.layers, hidden, block.layer, block.layer + 1)
                    ).tolist()
                )
        found.append(
            backend.unembed(
                run_texts(backend, backend.embed(prompt), 0, backend.num_layers)
            ).tolist()
        )
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gguf_file_from_the_cache_gives_the_same_bits_without_being_read(
    gguf_model, cache, packed, monkeypatch, dtype
):
    plain = outputs(loaded(gguf_model, dtype=dtype, cache=False))
    assert files(cache) == [] and packed
    assert outputs(loaded(gguf_model, dtype=dtype)) == plain
    assert len(files(cache)) == 1 and files(cache)[0].endswith(".packed.safetensors")
    packed.clear()
    monkeypatch.setattr(GgufFile, "__init__", lambda *_: pytest.fail("the file was read"))
    assert outputs(loaded(gguf_model, dtype=dtype)) == plain
    assert packed == []


def test_a_gguf_file_with_exit_blocks_is_not_dequantised_for_its_fingerprint(
    gguf_model, cache, monkeypatch
):
    folder = gguf_model.parent / "with-blocks"
    folder.mkdir()
    shutil.move(gguf_model, folder)
    write_info(str(folder), CheckpointInfo(files=(gguf_model.name,)))
    add_blocks(folder, ExitBlock(1))
    plain = outputs(loaded(folder, cache=False))
    assert outputs(loaded(folder)) == plain
    monkeypatch.setattr(GgufFile, "__init__", lambda *_: pytest.fail("the file was read"))
    assert outputs(loaded(folder)) == plain


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "prepare", [lambda _: None, lambda folder: add_blocks(folder, ExitBlock(2)), add_int4]
)
@pytest.mark.parametrize(
    "packing",
    [
        ADAPTIVE,
        PackingConfig("int8"),
        PackingConfig("int4"),
        PackingConfig(draft_weights=("int4",)),
    ],
)
def test_a_folder_from_the_cache_gives_the_same_bits(wide, cache, packed, dtype, prepare, packing):
    prepare(wide)
    plain = outputs(loaded(wide, packing, dtype, cache=False))
    assert outputs(loaded(wide, packing, dtype)) == plain
    packed.clear()
    assert outputs(loaded(wide, packing, dtype)) == plain
    assert packed == [] and len(files(cache)) == 1


def test_a_part_that_the_cache_lacks_is_made_and_kept(wide, cache, packed):
    loaded(wide, PackingConfig())
    packed.clear()
    [name] = files(cache)
    copied = loaded(wide, ADAPTIVE)  # also needs an int8 copy
    assert packed and files(cache) == [name]
    packed.clear()
    assert outputs(loaded(wide, ADAPTIVE)) == outputs(copied)
    assert packed == []


def test_another_model_in_the_file_s_place_is_not_taken_from_the_cache(gguf_model, cache, tmp_path):
    loaded(gguf_model)
    before = gguf_model.stat()
    other = tmp_path / "other" / "model.gguf"
    other.parent.mkdir()
    torch.manual_seed(7)
    written(
        other,
        "qwen2",
        "q8_0" if "q8_0" in str(gguf_model) else "f16",
        hidden_size=64,
        head_dim=16,
        intermediate_size=96,
    )
    content = bytearray(gguf_model.read_bytes())
    content[-1000:] = bytes(1000)  # of the same size, at the same time
    gguf_model.write_bytes(content)
    os.utime(gguf_model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert outputs(loaded(gguf_model)) == outputs(loaded(gguf_model, cache=False))
    assert len(files(cache)) == 2
    shutil.copy(other, gguf_model)
    assert outputs(loaded(gguf_model)) == outputs(loaded(gguf_model, cache=False))
    assert len(files(cache)) == 3


def test_a_retrained_folder_is_not_taken_from_the_cache(wide, cache):
    loaded(wide)
    add_blocks(wide, ExitBlock(4))
    assert 4 in loaded(wide).backend.exit_blocks
    assert len(files(cache)) == 2


@pytest.mark.parametrize("problem", ["read-only", "full", "a file", "cut"])
def test_a_cache_that_cannot_be_used_changes_nothing(gguf_model, cache, monkeypatch, problem):
    plain = outputs(loaded(gguf_model, cache=False))
    if problem == "read-only":
        monkeypatch.setattr(
            "pathlib.Path.mkdir",
            lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")),
        )
    elif problem == "full":
        monkeypatch.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    elif problem == "a file":
        cache.write_text("")
    else:
        loaded(gguf_model)
        [path] = cache.iterdir()
        path.write_bytes(path.read_bytes()[:-100])
    assert outputs(loaded(gguf_model)) == plain
    left = files(cache) if problem != "a file" else []
    assert len(left) == (problem == "cut") and not any(name.endswith(".part") for name in left)
    assert outputs(loaded(gguf_model)) == plain


def test_the_cache_is_bounded_and_drops_what_was_not_used_for_longest(
    wide, cache, monkeypatch, tmp_path
):
    folders = [wide, *(shutil.copytree(wide, tmp_path / name) for name in "bc")]
    names = []
    for folder in folders[:2]:
        loaded(folder)
        names += [name for name in files(cache) if name not in names]
    size = (cache / names[0]).stat().st_size
    for age, name in enumerate(names):  # long ago, the first before the second
        os.utime(cache / name, ns=(age, (cache / name).stat().st_mtime_ns))
    loaded(folders[0])  # used again
    monkeypatch.setattr(sidecars, "CACHED", int(2.5 * size))
    monkeypatch.setattr(load_cache, "_SHARE", 1)
    loaded(folders[2])
    kept = files(cache)
    assert len(kept) == 2 and names[0] in kept and names[1] not in kept
    monkeypatch.setattr(sidecars, "CACHED", size // 2)
    # Too large for the cache: it is not written, and nothing is dropped
    loaded(shutil.copytree(wide, tmp_path / "d"))
    assert files(cache) == kept


def test_commands_and_python_use_the_cache_unless_told_otherwise(gguf_model, cache):
    ask = ("generate", "wake me up", f"--model {gguf_model} --max-new-tokens 4")
    plain = run(*ask, "--no-cache")
    assert plain.code == 0 and files(cache) == []
    texts = [load(str(gguf_model), cache=False).generate("wake me up", max_new_tokens=4).text]
    finish_writing()
    assert files(cache) == []
    for _ in range(2):
        assert run(*ask) == plain
        texts.append(load(str(gguf_model)).generate("wake me up", max_new_tokens=4).text)
    finish_writing()
    assert len(files(cache)) == 1 and {*texts} == {plain.out.removesuffix("\n")}
    assert "removed 1 files" in run("calibrate --clear").err and files(cache) == []


def test_two_loads_at_once_leave_one_whole_file(gguf_model, cache):
    for _ in range(2):
        first, second = (
            for_decoding(str(gguf_model), "cpu", packing=ADAPTIVE, cache=True) for _ in range(2)
        )
        assert outputs(first) == outputs(second)
    finish_writing()
    assert len(files(cache)) == 1
    [path] = cache.iterdir()
    assert WeightFile(path).metadata["format"] == "layerskip cache 1"


def test_a_small_model_is_not_kept(wide, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv(sidecars.CACHE, str(cache))
    loaded(wide)
    loaded("embedded")
    assert files(cache) == []
