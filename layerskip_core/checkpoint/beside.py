"""Files of further weights beside a model's: calibrated int4 weights, and exit blocks.

The header of each says which format it has, and has a fingerprint of the weights that it was made for, so that it is not used
with others.

int4.safetensors, which `layerskip calibrate` writes, holds rows of bytes (see model/low_bit.py) for each weight of a layer's
projections and of the head, by the weight's name.

exit_blocks.safetensors, which `layerskip finetune --frozen` trains, holds weights whose names say which exits have a block, and
what each reads (see model/exit_blocks.py). layerskip.json says how they were trained: `exit_blocks` has an object for each
exit, whose `agreement` is the share of first drafts that were right on held-out rows.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, first_line
from ..model.exit_blocks import NO_BLOCKS, ExitBlocks, blocks_named
from ..model.low_bit import GROUP_SIZE, int4_of, stored_shape
from ..model.spec import ModelSpec, check_shape
from ..model.weights import Take, check_finite
from .folder import EXIT_BLOCKS_FILE, INT4_FILE, WeightFile, check_kinds

_INT4 = {"format": "1", "group_size": str(GROUP_SIZE)}
_BLOCKS = {"format": "1"}
_METADATA = "__metadata__"  # safetensors' key of a header's further entries
_FINGERPRINT = "fingerprint"


def matrix_names(spec: ModelSpec) -> list[str]:
    """Every projection, in the order of the layers, and the head."""
    return [name for name, shape in spec.shapes.items() if name.startswith("model.layers.") and len(shape) == 2] + [
        spec.head_name
    ]


def fingerprint(spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> str:
    """Of three rows of each matrix, in bf16: training changes some of them, a change of precision none."""
    digest = hashlib.sha256()
    for name in matrix_names(spec):
        weight = weight_of(name).detach()
        rows = weight[[0, len(weight) // 2, -1]].to("cpu", torch.bfloat16).contiguous()
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_formed(path: Path, form: Mapping[str, str]) -> WeightFile:
    """The open file. Raises ValueError if its header does not have the entries of `form`."""
    file = WeightFile(path)
    metadata = file.metadata()
    if not form.items() <= metadata.items():
        needed, found = (" and ".join(f"{name} {values.get(name, 'missing')}" for name in form) for values in (form, metadata))
        raise ValueError(f"its header must have {needed}, found {found}")
    return file


def read_int4(folder: str | Path, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> Take | None:
    """The calibrated weights of a folder as rows of bytes, each read when it is taken; None if the folder has none.

    `weight_of` gives the model's own weights, in any precision. Raises CheckpointError for a file that is damaged, or that was
    not made from these weights.
    """
    path, names = Path(folder) / INT4_FILE, matrix_names(spec)
    if not path.is_file():
        return None
    try:
        file = _open_for(path, _INT4, spec, weight_of)
        _check_names(file, names)
        for name in names:
            part, needed = file.get_slice(name), stored_shape(*spec.shapes[name])
            if (part.get_dtype(), tuple(part.get_shape())) != ("U8", needed):
                raise ValueError(f"{name} must be U8 {list(needed)}, found {part.get_dtype()} {part.get_shape()}")
    except Exception as error:
        raise _unusable(path, error) from error

    def take(name: str) -> Tensor | None:
        if name not in names:
            return None
        rows = file.read(name)
        if not bool(int4_of(rows).scale.isfinite().all() and int4_of(rows).low.isfinite().all()):
            raise _unusable(path, f"{name} is not finite")
        return rows

    return take


def read_exit_blocks(folder: str | Path, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> ExitBlocks:
    """The blocks of a folder, each weight read when it is taken, as it is stored; NO_BLOCKS if the folder has no such file.

    `weight_of` gives the model's own weights, in any precision. Raises CheckpointError for a file that is damaged, or that was
    not trained for these weights.
    """
    path = Path(folder) / EXIT_BLOCKS_FILE
    if not path.is_file():
        return NO_BLOCKS
    try:
        file = _open_for(path, _BLOCKS, spec, weight_of)
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  the file is no mapping
        blocks = blocks_named(slices, spec.layers)
        shapes = {name: shape for block in blocks for name, shape in block.shapes(spec).items()}
        _check_names(file, shapes)
        for name, part in slices.items():
            check_shape(name, shapes[name], tuple(part.get_shape()))
        check_kinds(slices)
    except Exception as error:
        raise _unusable(path, error) from error

    def take(name: str) -> Tensor | None:
        if name not in shapes:
            return None
        weight = file.read(name)
        try:
            check_finite(name, weight)
        except CheckpointError as error:
            raise _unusable(path, error) from None
        return weight

    return ExitBlocks(blocks, take)


def check_beside(folder: str | Path, name: str, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> None:
    """Reads all of a folder's file INT4_FILE or EXIT_BLOCKS_FILE. Raises CheckpointError as reading it does."""
    if name == INT4_FILE:
        take = read_int4(folder, spec, weight_of)
        names: Iterable[str] = matrix_names(spec)
    else:
        blocks = read_exit_blocks(folder, spec, weight_of)
        take, names = blocks.take, blocks.shapes(spec)
    for weight in names:
        if take is not None:
            take(weight)


def int4_content(rows: Mapping[str, Tensor], made_for: str, details: Mapping[str, str]) -> bytes:
    """int4.safetensors, of rows of bytes by name. `made_for`: the model's `fingerprint`. `details` go into the header."""
    return _content(rows, made_for, {**details, **_INT4})


def exit_blocks_content(spec: ModelSpec, weights: Mapping[str, Tensor], made_for: str, kept: ExitBlocks = NO_BLOCKS) -> bytes:
    """exit_blocks.safetensors, of weights by the names of `ExitBlock.shapes`. `made_for`: the model's `fingerprint`.

    The blocks of `kept` are added where `weights` has none for their exit.
    """
    content = dict(weights)
    trained = {block.exit_layer for block in blocks_named(weights, spec.layers)}
    for block in kept.blocks:
        if block.exit_layer not in trained:
            content |= {name: kept.weights(spec).of(name) for name in block.shapes(spec)}
    return _content(content, made_for, _BLOCKS)


def _open_for(path: Path, form: Mapping[str, str], spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> WeightFile:
    file = open_formed(path, form)
    if file.metadata().get(_FINGERPRINT) != fingerprint(spec, weight_of):
        raise ValueError("it was made from other weights than this model's")
    return file


def _check_names(file: WeightFile, needed: Iterable[str]) -> None:
    for names, what in ((set(needed) - set(file.keys()), "missing"), (set(file.keys()) - set(needed), "unknown")):
        if names:
            raise ValueError(f"{len(names)} weights are {what}, {min(names)} the first")


def _unusable(path: Path, reason: Exception | str) -> CheckpointError:
    text = reason if isinstance(reason, str) else first_line(reason)
    return CheckpointError(f"{path} cannot be used: {text}; remove it, or make it again")


def _content(weights: Mapping[str, Tensor], made_for: str, form: Mapping[str, str]) -> bytes:
    """A file of safetensors. The same weights give the same bytes: the library writes the header in a random order."""
    from safetensors.torch import save

    written: bytes = save(dict(weights), metadata={**form, _FINGERPRINT: made_for})
    end = 8 + int.from_bytes(written[:8], "little")  # of the header, which JSON's white space fills up
    header = json.loads(written[8:end])
    header[_METADATA] = dict(sorted(header[_METADATA].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join((written[:8], text.ljust(end - 8), memoryview(written)[end:]))
