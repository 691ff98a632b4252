"""int4.safetensors: the calibrated int4 weights of a folder's model, which `layerskip calibrate` writes.

For each weight of a layer's projections and of the head it holds rows of bytes (see model/int4.py) under the weight's name. A
fingerprint of the weights that it was made from tells whether it belongs to the model beside it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError, first_line
from ..model.int4 import GROUP_SIZE, int4_of, stored_shape
from ..model.spec import ModelSpec
from ..model.weights import Take
from .beside import content_beside, fingerprint, matrix_names, open_beside
from .stored import INT4_FILE

_FORMAT = {"format": "1", "group_size": str(GROUP_SIZE)}
_REMEDY = "remove it, or run `layerskip calibrate` again"


def read_int4(folder: str | Path, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> Take | None:
    """The calibrated weights of a folder as rows of bytes, each read when it is taken; None if the folder has none.

    `weight_of` gives the model's own weights, in any precision. Raises CheckpointError for a file that is damaged, or that was
    not made from these weights.
    """
    path = Path(folder) / INT4_FILE
    if not path.is_file():
        return None
    names = matrix_names(spec)
    try:
        file = open_beside(path, _FORMAT, lambda: fingerprint(names, weight_of))
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
        rows = file.read(name)
        if not bool(int4_of(rows).scale.isfinite().all() and int4_of(rows).low.isfinite().all()):
            raise CheckpointError(f"{path} cannot be used: {name} is not finite; {_REMEDY}")
        return rows

    return take


def check_int4(folder: str | Path, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> None:
    """Reads all of a folder's file. Raises CheckpointError as `read_int4` does, and for numbers that are not finite."""
    take = read_int4(folder, spec, weight_of)
    if take is not None:
        for name in matrix_names(spec):
            take(name)


def int4_content(rows: Mapping[str, Tensor], made_from: str, details: Mapping[str, str]) -> bytes:
    """The file, of rows of bytes by name. `made_from`: the fingerprint of the model's weights. `details` go into its header."""
    return content_beside(rows, made_from, {**details, **_FORMAT})


def _check(name: str, spec: ModelSpec, dtype: str, shape: list[int]) -> None:
    outputs, inputs = spec.shapes[name]
    needed = stored_shape(outputs, inputs)
    if dtype != "U8" or tuple(shape) != needed:
        raise ValueError(f"{name} must be U8 {list(needed)}, found {dtype} {shape}")
