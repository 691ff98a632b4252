"""Files of further weights beside a model's. The header of each says which format it has, and for which weights it was made."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..model.spec import ModelSpec
from .stored import WeightFile


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


def header(made_for: str, form: Mapping[str, str]) -> dict[str, str]:
    """The metadata of such a file; `made_for`: the fingerprint of the model's weights."""
    return {**form, "fingerprint": made_for}


def open_beside(path: Path, form: Mapping[str, str], made_for: Callable[[], str]) -> WeightFile:
    """The open file. Raises ValueError if it has another format, or was made for other weights than `made_for` says."""
    from safetensors import safe_open

    file: WeightFile = safe_open(path, "pt", device="cpu")
    metadata = file.metadata() or {}
    if not form.items() <= metadata.items():
        needed, found = (" and ".join(f"{name} {values.get(name, 'missing')}" for name in form) for values in (form, metadata))
        raise ValueError(f"its header must have {needed}, found {found}")
    if metadata.get("fingerprint") != made_for():
        raise ValueError("it was made from other weights than those beside it")
    return file
