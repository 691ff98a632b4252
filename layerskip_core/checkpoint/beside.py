"""Files of further weights beside a model's. The header of each says which format it has, and for which weights it was made."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..model.spec import ModelSpec
from .stored import WeightFile

_METADATA = "__metadata__"  # safetensors' key of a header's further entries
_FINGERPRINT = "fingerprint"


def matrix_names(spec: ModelSpec) -> list[str]:
    """Every projection, in the order of the layers, and the head."""
    return [name for name, shape in spec.shapes.items() if name.startswith("model.layers.") and len(shape) == 2] + [
        spec.head_name
    ]


def fingerprint(names: Iterable[str], weight_of: Callable[[str], Tensor]) -> str:
    """Of three rows of each weight, in bf16: training changes some of them, a change of precision none."""
    digest = hashlib.sha256()
    for name in names:
        weight = weight_of(name).detach()
        rows = weight[[0, len(weight) // 2, -1]].to("cpu", torch.bfloat16).contiguous()
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def content_beside(weights: Mapping[str, Tensor], made_for: str, form: Mapping[str, str]) -> bytes:
    """Such a file, with `form` in its header; `made_for`: the fingerprint of the model's weights. The same weights give the
    same bytes, while safetensors writes the entries of a header in a random order.
    """
    from safetensors.torch import save

    written: bytes = save(dict(weights), metadata={**form, _FINGERPRINT: made_for})
    end = 8 + int.from_bytes(written[:8], "little")  # of the header, which JSON's white space fills up
    header = json.loads(written[8:end])
    header[_METADATA] = dict(sorted(header[_METADATA].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(text) <= end - 8
    return b"".join((written[:8], text.ljust(end - 8), memoryview(written)[end:]))


def open_beside(path: Path, form: Mapping[str, str], made_for: Callable[[], str]) -> WeightFile:
    """The open file. Raises ValueError if it has another format, or was made for other weights than `made_for` says."""
    file = open_formed(path, form)
    if file.metadata().get(_FINGERPRINT) != made_for():
        raise ValueError("it was made from other weights than this model's")
    return file


def open_formed(path: Path, form: Mapping[str, str]) -> WeightFile:
    """The open file. Raises ValueError if its header does not have the entries of `form`."""
    file = WeightFile(path)
    metadata = file.metadata()
    if not form.items() <= metadata.items():
        needed, found = (" and ".join(f"{name} {values.get(name, 'missing')}" for name in form) for values in (form, metadata))
        raise ValueError(f"its header must have {needed}, found {found}")
    return file
