"""Files of further weights beside a model's: calibrated int4 weights, and exit blocks.

The header of each says which format it has, and has a fingerprint of the weights that it was made for, so that it is not used
with others.

int4.safetensors, which `layerskip calibrate` writes, holds rows of bytes (see model/weights.py) for each weight of a layer's
projections and of the head, by the weight's name.

exit_blocks.safetensors, which `layerskip train-drafter` and `finetune` write, holds weights whose names say which exits have a
block, and what each reads (see model/exit_blocks.py). layerskip.json says how a drafter's training made them: `exit_blocks` has
an object for each exit, whose `agreement` is the share of first drafts that were right on held-out rows.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, first_line
from ..model.exit_blocks import NO_BLOCKS, ExitBlocks, blocks_named
from ..model.spec import AnySpec, ModelSpec, Shapes
from ..model.weights import GROUP_SIZE, Take, int4_of, stored_shape
from .folder import EXIT_BLOCKS_FILE, FLOATS, INT4_FILE, WeightFile
from .speculators import eagle3_beside

_INT4 = {"format": "1", "group_size": str(GROUP_SIZE)}
_BLOCKS = {"format": "1"}
_METADATA = "__metadata__"  # safetensors' key of a header's further entries
_FINGERPRINT = "fingerprint"


def matrix_names(spec: ModelSpec) -> list[str]:
    """Every projection, in the order of the layers, and the head."""
    return [name for name, shape in spec.shapes.items() if name.startswith(f"{spec.names.layers}.") and len(shape) == 2] + [
        spec.head_name
    ]


def fingerprint(spec: AnySpec, weight_of: Callable[[str], Tensor]) -> str:
    """Of three rows of each matrix, in bf16: training changes some of them, a change of precision none."""
    digest = hashlib.sha256()
    others = [name for name, shape in spec.shapes.items() if len(shape) > 1]
    for name in matrix_names(spec) if isinstance(spec, ModelSpec) else others:
        weight = weight_of(name).detach().flatten(0, -2)  # where it is more than a matrix
        rows = weight[[0, len(weight) // 2, -1]].to("cpu", torch.bfloat16).contiguous()
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_formed(path: Path, form: Mapping[str, str]) -> WeightFile:
    """The open file. Raises ValueError if its header does not have the entries of `form`."""
    file = WeightFile(path)
    for name, needed in form.items():
        if file.metadata.get(name) != needed:
            raise ValueError(f"its {name} must be {needed}, found {file.metadata.get(name)}")
    return file


def read_int4(folder: str | Path, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> Take | None:
    """The calibrated weights of a folder as rows of bytes, each read when it is taken; None if the folder has none.

    `weight_of` gives the model's own weights, in any precision. Raises CheckpointError for a file that is damaged, or that was
    not made from these weights.
    """
    path, shapes = Path(folder) / INT4_FILE, {name: stored_shape(*spec.shapes[name]) for name in matrix_names(spec)}
    if not path.is_file():
        return None
    with _naming(path):
        file = open_formed(path, _INT4)
        _check(file, spec, weight_of, shapes, ("U8",))

    def take(name: str) -> Tensor | None:
        if name not in shapes:
            return None
        with _naming(path):
            rows = file.read(name)
            if not bool(int4_of(rows).scale.isfinite().all() and int4_of(rows).low.isfinite().all()):
                raise ValueError(f"{name} is not finite")
        return rows

    return take


def read_exit_blocks(folder: str | Path, spec: AnySpec, weight_of: Callable[[str], Tensor]) -> ExitBlocks:
    """The blocks of a folder, each weight read when it is taken, as it is stored, and its drafter in the EAGLE-3 layout.

    NO_BLOCKS if the folder has neither.

    `weight_of` gives the model's own weights, in any precision. Raises CheckpointError for a file that is damaged, or that was
    not trained for these weights.
    """
    path, blocks = Path(folder) / EXIT_BLOCKS_FILE, NO_BLOCKS
    if path.is_file():
        with _naming(path):
            file = open_formed(path, _BLOCKS)
            found = blocks_named(file.entries, spec.layers)
            blocks = ExitBlocks(found, lambda name: file.read(name) if name in file.entries else None)
            _check(file, spec, weight_of, blocks.shapes(spec), FLOATS)
    drafter = eagle3_beside(folder, spec)
    return blocks if drafter is None else replace(blocks, eagle3=drafter)


def int4_content(rows: Mapping[str, Tensor], made_for: str, details: Mapping[str, str]) -> bytes:
    """int4.safetensors, of rows of bytes by name. `made_for`: the model's `fingerprint`. `details` go into the header."""
    return _content(rows, made_for, {**details, **_INT4})


def exit_blocks_content(spec: AnySpec, weights: Mapping[str, Tensor], made_for: str, kept: ExitBlocks = NO_BLOCKS) -> bytes:
    """exit_blocks.safetensors, of weights by the names of `ExitBlock.shapes`. `made_for`: the model's `fingerprint`.

    The blocks of `kept` are added where `weights` has none for their exit.
    """
    content = dict(weights)
    trained = {block.exit_layer for block in blocks_named(weights, spec.layers)}
    for block in kept.blocks:
        if block.exit_layer not in trained:
            content |= {name: kept.weights(spec).of(name) for name in block.shapes(spec)}
    return _content(content, made_for, _BLOCKS)


def _check(file: WeightFile, spec: AnySpec, weight_of: Callable[[str], Tensor], shapes: Shapes, kinds: Collection[str]) -> None:
    """Raises ValueError for a file of other weights, and for one that is missing or unknown, or of another shape or type."""
    if file.metadata.get(_FINGERPRINT) != fingerprint(spec, weight_of):
        raise ValueError("it was made from other weights than this model's")
    for name in sorted({*shapes, *file.entries}):
        kind, shape = file.entries.get(name, ("nothing", ()))
        if kind not in kinds or shape != shapes.get(name):
            needed = f"{' or '.join(kinds)} {list(shapes[name])}" if name in shapes else "left out"
            raise ValueError(f"{name} must be {needed}, found {kind} {list(shape)}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Any error becomes a CheckpointError that names the file."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}; remove it, or make it again") from error


def _content(weights: Mapping[str, Tensor], made_for: str, form: Mapping[str, str]) -> bytes:
    """A file of safetensors. The same weights give the same bytes: the library writes the header in a random order."""
    from safetensors.torch import save

    written: bytes = save(dict(weights), metadata={**form, _FINGERPRINT: made_for})
    end = 8 + int.from_bytes(written[:8], "little")  # of the header, which JSON's white space fills up
    header = json.loads(written[8:end])
    header[_METADATA] = dict(sorted(header[_METADATA].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join((written[:8], text.ljust(end - 8), memoryview(written)[end:]))
