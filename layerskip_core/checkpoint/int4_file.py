"""int4.safetensors: the calibrated int4 weights of a folder's model, which `layerskip calibrate` writes.

For each weight of a layer's projections and of the head it holds rows of bytes (see model/int4.py) under the weight's name. A
fingerprint of the weights that it was made from tells whether it belongs to the model beside it.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, first_line
from ..model.int4 import GROUP_SIZE, int4_of, stored_shape
from ..model.spec import ModelSpec
from ..model.weights import Take
from .stored import INT4_FILE, WeightFile

_FORMAT = {"format": "1", "group_size": str(GROUP_SIZE)}
_REMEDY = "remove it, or run `layerskip calibrate` again"


def int4_names(spec: ModelSpec) -> list[str]:
    """The weights that int4 replaces, in the order of the layers: every projection, and the head."""
    return [name for name, shape in spec.shapes.items() if name.startswith("model.layers.") and len(shape) == 2] + [
        spec.head_name
    ]


def fingerprint(names: list[str], weight_of: Callable[[str], Tensor]) -> str:
    """Of three rows of each weight, in bf16: training changes some of them, a change of precision none."""
    digest = hashlib.sha256()
    for name in names:
        weight = weight_of(name).detach()
        rows = weight[[0, len(weight) // 2, -1]].to("cpu", torch.bfloat16).contiguous()
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_int4(folder: str | Path, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> Take | None:
    """The calibrated weights of a folder as rows of bytes, each read when it is taken; None if the folder has none.

    `weight_of` gives the model's own weights, in any precision. Raises CheckpointError for a file that is damaged, or that was
    not made from these weights.
    """
    path = Path(folder) / INT4_FILE
    if not path.is_file():
        return None
    names = int4_names(spec)
    try:
        from safetensors import safe_open

        file: WeightFile = safe_open(path, "pt", device="cpu")
        metadata = file.metadata() or {}
        if not _FORMAT.items() <= metadata.items():
            needed, found = (_named(values) for values in (_FORMAT, metadata))
            raise ValueError(f"its header must have {needed}, found {found}")
        if metadata.get("fingerprint") != fingerprint(names, weight_of):
            raise ValueError("it was made from other weights than those beside it")
        if missing := sorted(set(names) - set(file.keys())):
            raise ValueError(f"{len(missing)} weights are missing, {missing[0]} the first")
        for name in names:
            part = file.get_slice(name)
            _check(name, spec, part.get_dtype(), part.get_shape())
    except Exception as error:
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}; {_REMEDY}") from error

    def take(name: str) -> Tensor | None:
        if name not in names:
            return None
        rows = file.get_tensor(name)
        if not bool(int4_of(rows).scale.isfinite().all() and int4_of(rows).low.isfinite().all()):
            raise CheckpointError(f"{path} cannot be used: {name} is not finite; {_REMEDY}")
        return rows

    return take


def int4_content(rows: Mapping[str, Tensor], made_from: str, details: Mapping[str, str]) -> bytes:
    """The file, of rows of bytes by name. `made_from`: the fingerprint of the model's weights. `details` go into its header."""
    from safetensors.torch import save

    content: bytes = save(dict(rows), metadata={**details, **_FORMAT, "fingerprint": made_from})
    return content


def _named(metadata: Mapping[str, str]) -> str:
    """The values that `_FORMAT` fixes: `format 1 and group_size 32`."""
    return " and ".join(f"{name} {metadata.get(name, 'missing')}" for name in _FORMAT)


def _check(name: str, spec: ModelSpec, dtype: str, shape: list[int]) -> None:
    outputs, inputs = spec.shapes[name]
    needed = stored_shape(outputs, inputs)
    if dtype != "U8" or tuple(shape) != needed:
        raise ValueError(f"{name} must be U8 {list(needed)}, found {dtype} {shape}")
