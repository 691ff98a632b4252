"""Changes to the files of a model: settings, safetensors headers, GGUF headers, the index of shards, the weights."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from .damage import spoil_bytes
from .forked import Child, Limits

Tensors = dict[str, Any]


def edit_json(file: Path, **changes: object) -> None:
    """Sets keys of a JSON object in a file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def spoil_header(file: Path, random: Random) -> str:
    """Changes the header of a safetensors file: names, shapes, types, offsets or its length."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name, key = random.choice(names), random.choice(("dtype", "shape", "data_offsets", "name", "gone", "length", "metadata"))
    said = f"{file.name}: {key} of {name}"
    if key == "dtype":
        header[name]["dtype"] = random.choice(("F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X", 5))
    elif key in ("shape", "data_offsets"):
        header[name][key] = random.choice(([], [0], [1, 1], [2**62, 4], [-1, 2], "x", None, header[random.choice(names)][key]))
    elif key == "name":
        header[random.choice(names) + random.choice(("", ".x"))] = header.pop(name)
    elif key == "gone":
        del header[name]
    elif key == "metadata":
        header["__metadata__"] = random.choice(({"format": "tf"}, {"format": 1}, [], "x", {"x": "y" * 10_000}))
    text = json.dumps(header).encode()
    written = random.choice((0, 1, 2**40, 2**63, len(text) + 9)) if key == "length" else len(text)
    file.write_bytes(struct.pack("<Q", written) + text + data[8 + length :])
    return said


def spoil_gguf(file: Path, random: Random) -> str:
    """Changes bytes in the first part of the file, where counts, names and types are."""
    data = bytearray(file.read_bytes())
    place = random.choice((4, 8, 12, 16, random.randrange(24, 900), random.randrange(24, len(data))))
    value = random.choice((b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**40), struct.pack("<I", 10**7), random.randbytes(4)))
    data[place : place + len(value)] = value
    file.write_bytes(bytes(data))
    return f"{file.name}: {value!r} at {place}"


def edit_gguf(file: Path, key: bytes, value: int) -> None:
    """Sets an unsigned 32-bit number, which follows its key and type."""
    data = bytearray(file.read_bytes())
    place = data.index(key) + len(key) + 4
    data[place : place + 4] = struct.pack("<I", value)
    file.write_bytes(bytes(data))


def redirect_shards(model: Path, target: str) -> None:
    """Makes the index name another file for every weight."""
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] = dict.fromkeys(document["weight_map"], target)
    index.write_text(json.dumps(document))


def cut(file: Path) -> None:
    file.write_bytes(spoil_bytes(file.read_bytes()[: file.stat().st_size // 2], Random(0)))


def change_weights(model: Path, change: Callable[[Tensors], object], name: str = "model.safetensors") -> None:
    """Reads, changes and writes a file of weights in a model's folder, in a child because it uses torch."""

    def work() -> int:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / name)
        with safe_open(model / name, "pt") as file:
            metadata = file.metadata()
        change(tensors)
        save_file(tensors, model / name, metadata)
        return 0

    outcome = Child(work, model.parent, Limits(), None, (-1, -1)).wait()
    assert outcome is not None and outcome.status == 0, outcome
