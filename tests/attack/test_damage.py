"""Damaged and hostile files of a model: an answer or one line of error, no change to a file, and no
code of the model runs.
"""

import json
import shutil
import struct

import pytest
from attacking import ODD, contents, examples, require_sound
from command_line import run
from hypothesis import given
from hypothesis import strategies as st

GENERATE = ("generate --max-new-tokens 4", "call mom")
COMMANDS = (
    (*GENERATE, "--model {model}"),
    (*GENERATE, "--strategy autoregressive --model {model}"),
    (*GENERATE, "--exit 2 --model {model}"),
    (*GENERATE, "--quantize int4 --model {model}"),
    ("import {model} --output {home}/imported",),
)
# No huge sizes: a model may waste its user's memory
VALUES = (*ODD, 2, 7, 300, "1", "a" * 5000, "../../etc", [1, 2, 3])


@pytest.fixture(scope="module")
def models(tmp_path_factory, forks, wide_base):
    home = tmp_path_factory.mktemp("models") / "home"
    home.mkdir()
    few = "--samples 2 --steps 1"
    for command in (
        (
            "train-drafter --exits 2 --batch-size 2 --answer-tokens 4 --output blocks",
            few,
            "--model",
            wide_base,
        ),
        ("import", wide_base, "--output int4"),
        ("calibrate --samples 2 --model int4",),
        ("export", wide_base, "--exit 4 --format gguf --output gguf"),
    ):
        assert (ended := forks.run(home, *command)).code == 0, ended.err
    return home


def damaged_bytes(draw, file):
    data = file.read_bytes()
    place = draw(st.integers(0, len(data)))
    damages = [
        data[:place],
        b"",
        data + data[place:],
        data[:place] + b"\xff" * 8 + data[place + 8 :],
        data[:place] + bytes(64) + data[place:],
        data[:place] + data[place + 100 :],
    ]
    file.write_bytes(draw(st.sampled_from(damages)))


def damaged_json(draw, file):
    """One value of the document, at any depth, becomes an odd one or is left out."""
    document = json.loads(file.read_text())
    holder = document
    while True:
        key = draw(
            st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        )
        if not isinstance(holder[key], dict | list) or not holder[key] or draw(st.booleans()):
            break
        holder = holder[key]
    holder[key] = draw(st.sampled_from(VALUES))
    file.write_text(json.dumps(document))


def damaged_header(draw, file):
    """The header of a safetensors file: a tensor's type, shape, place or name."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = sorted(name for name in header if name != "__metadata__")
    name = draw(st.sampled_from(names))
    way = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "gone"]))
    if way == "dtype":
        header[name][way] = draw(
            st.sampled_from(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "X", 5])
        )
    elif way in ("shape", "data_offsets"):
        header[name][way] = draw(
            st.sampled_from(
                [[], [0], [1, 1], [2**62, 4], [-1, 2], "x", None, header[names[0]][way]]
            )
        )
    elif way == "name":
        header[f"{name}.x"] = header.pop(name)
    else:
        del header[name]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def damage(draw, model):
    file = (
        model
        if model.is_file()
        else draw(st.sampled_from(sorted(one for one in model.iterdir() if one.is_file())))
    )
    way = draw(st.sampled_from(["structure", "structure", "structure", "bytes", "gone", "folder"]))
    if way == "structure" and file.suffix == ".json":
        damaged_json(draw, file)
    elif way == "structure" and file.suffix == ".safetensors":
        damaged_header(draw, file)
    elif way in ("gone", "folder"):
        file.unlink()
        file.mkdir() if way == "folder" else None
    else:
        damaged_bytes(draw, file)


@pytest.mark.parametrize("name", ["blocks", "int4", "gguf"])
@examples(12)
@given(data=st.data())
def test_a_damaged_model_is_an_answer_or_one_clear_error(name, data, models, tmp_path_factory):
    home = tmp_path_factory.mktemp("damaged")
    model = home / "model"
    shutil.copytree(models / name, model)
    files = sorted(model.glob("*.gguf"))
    damage(data.draw, files[0] if files else model)
    before = contents(model)
    target = str(files[0] if files else model)
    command = [
        part.format(model=target, home=home) for part in data.draw(st.sampled_from(COMMANDS))
    ]
    require_sound(run(*command))
    assert contents(model) == before
