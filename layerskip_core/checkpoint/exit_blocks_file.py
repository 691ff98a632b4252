"""exit_blocks.safetensors: the exit blocks of a folder's model, which `layerskip finetune --frozen` trains.

Which exits have a block, and what each reads, follows from the names of the weights, see model/exit_blocks.py. A fingerprint of
the weights that they were trained for tells whether they belong to the model beside them.

layerskip.json says how they were trained: `exit_blocks` has an object for each exit, whose `agreement` is the share of first
drafts that were right on held-out rows.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError, first_line
from ..model.exit_blocks import NO_BLOCKS, ExitBlocks, blocks_named
from ..model.spec import ModelSpec, check_shape
from ..model.weights import check_finite
from .beside import content_beside, fingerprint, matrix_names, open_beside
from .stored import EXIT_BLOCKS_FILE, check_kinds

_FORMAT = {"format": "1"}


def model_fingerprint(spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> str:
    """Of the model that blocks are trained for, whatever its precision. `weight_of` gives its weights by name."""
    return fingerprint(matrix_names(spec), weight_of)


def read_exit_blocks(folder: str | Path, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> ExitBlocks:
    """The blocks of a folder, each weight read when it is taken, as it is stored; NO_BLOCKS if the folder has no such file.

    `weight_of` gives the model's own weights, in any precision. Raises CheckpointError for a file that is damaged, or that was
    not trained for these weights.
    """
    path = Path(folder) / EXIT_BLOCKS_FILE
    if not path.is_file():
        return NO_BLOCKS
    try:
        file = open_beside(path, _FORMAT, lambda: model_fingerprint(spec, weight_of))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  the file is no mapping
        blocks = blocks_named(slices, spec.layers)
        shapes = {name: shape for block in blocks for name, shape in block.shapes(spec).items()}
        for names, what in ((shapes.keys() - slices.keys(), "missing"), (slices.keys() - shapes.keys(), "unknown")):
            if names:
                raise ValueError(f"{len(names)} weights are {what}, {min(names)} the first")
        for name, part in slices.items():
            check_shape(name, shapes[name], tuple(part.get_shape()))
        check_kinds(slices)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}; remove it, and train the blocks again") from error

    def take(name: str) -> Tensor | None:
        if name not in shapes:
            return None
        weight = file.read(name)
        try:
            check_finite(name, weight)
        except CheckpointError as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from None
        return weight

    return ExitBlocks(blocks, take)


def check_exit_blocks(folder: str | Path, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> None:
    """Reads all of a folder's file. Raises CheckpointError as `read_exit_blocks` does, and for numbers that are not finite."""
    blocks = read_exit_blocks(folder, spec, weight_of)
    for name in blocks.shapes(spec):
        blocks.take(name)


def exit_blocks_content(
    spec: ModelSpec, weights: Mapping[str, Tensor], trained_for: str, kept: ExitBlocks = NO_BLOCKS
) -> bytes:
    """The file, of weights by the names of `ExitBlock.shapes`. `trained_for`: `model_fingerprint` of the model.

    The blocks of `kept` are added where `weights` has none for their exit. Save it with `save_beside`, or with the model.
    """
    content = dict(weights)
    trained = {block.exit_layer for block in blocks_named(weights, spec.layers)}
    for block in kept.blocks:
        if block.exit_layer not in trained:
            content |= {name: kept.weights(spec).of(name) for name in block.shapes(spec)}
    return content_beside(content, trained_for, _FORMAT)
