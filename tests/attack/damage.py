"""Damages bytes, JSON documents and files."""

import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

DEEP = 100_000
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.5, 1e-50, 1e308),
    *("", "x", "1", "\u202e", "a" * 10_000, "../../etc", "/dev/zero", [], [1], [[]], ["x"], [None], {}, {"x": 1}, [1, 2, 3]),
)
RAW_VALUES = ("NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "[" * DEEP + "]" * DEEP, '{"a":' * 2000 + "1" + "}" * 2000)


def spoil_bytes(data: bytes, random: Random) -> bytes:
    """Cuts, flips, repeats, inserts or removes bytes."""
    if not data:
        return b"\0"
    place = random.randrange(len(data))
    way = random.randrange(7)
    if way == 0:
        return data[:place]
    if way == 1:
        return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]
    if way == 2:
        return data[:place] + random.randbytes(random.randrange(1, 40)) + data[place:]
    if way == 3:
        return data[:place] + data[min(len(data), place + random.randrange(1, 200)) :]
    if way == 4:
        return data[:place] + bytes(random.randrange(1, 64)) + data[place:]
    if way == 5:
        return data + data[place:]
    return b"" if random.random() < 0.3 else random.randbytes(len(data))


def spoil_json(text: str, random: Random) -> tuple[str, str]:
    """Changes one or two values of a JSON document; returns it with a description of the change."""
    document = json.loads(text)
    said, raws = [], {}
    for _ in range(random.choice((1, 1, 1, 2))):
        holder, key, where = _anywhere(document, random)
        if holder is None:
            continue
        way = random.random()
        if way < 0.15:
            del holder[key]
            said.append(f"without {where}")
        elif way < 0.9:
            holder[key] = random.choice(ODD_VALUES)
            said.append(f"{where} = {str(holder[key])[:60]!r}")
        else:
            raw = random.choice(RAW_VALUES)
            holder[key] = mark = f"raw value {len(raws)} {random.random()}"
            raws[json.dumps(mark)] = raw
            said.append(f"{where} = {raw[:30]} as it stands")
    spoiled = json.dumps(document)
    for mark, raw in raws.items():
        spoiled = spoiled.replace(mark, raw)
    return spoiled, "; ".join(said)


def spoil_file(path: Path, random: Random) -> str:
    """Damages a file in place, by its structure if it has one; returns what was done."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and random.random() < 0.75:
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode(errors="replace")]
        number = random.randrange(len(lines))
        with suppress(ValueError, RecursionError):  # it is damaged already
            lines[number], said = spoil_json(lines[number], random)
            path.write_text("\n".join(lines) + "\n")
            return f"{path.name}:{number + 1}: {said}"
    path.write_bytes(spoil_bytes(data, random))
    return f"{path.name}: bytes changed, {len(data)} became {path.stat().st_size}"


def _anywhere(document: Any, random: Random) -> tuple[Any, Any, str]:
    """A random place in a document: its container, its key and its path. All depths are equally likely."""
    holder, key, where = None, None, ""
    while isinstance(document, dict | list) and document and (holder is None or random.random() < 0.6):
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        holder, key = document, random.choice(keys)
        where = f"{where}.{key}" if where else str(key)
        document = document[key]
    return holder, key, where
