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
from ..model.exit_blocks import ExitBlocks, blocks_named
from ..model.spec import ModelSpec, check_shape
from ..model.weights import check_finite
from .int4_file import fingerprint, int4_names
from .stored import EXIT_BLOCKS_FILE, WeightFile, check_kinds

_FORMAT = {"format": "1"}


def model_fingerprint(spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> str:
    """Of the model that blocks are trained for, whatever its precision. `weight_of` gives its weights by name."""
    return fingerprint(int4_names(spec), weight_of)


def read_exit_blocks(folder: str | Path, spec: ModelSpec, weight_of: Callable[[str], Tensor]) -> ExitBlocks | None:
    """The blocks of a folder, each weight read when it is taken, as it is stored; None if the folder has none.

    `weight_of` gives the model's own weights, in any precision. Raises CheckpointError for a file that is damaged, or that was
    not trained for these weights.
    """
    path = Path(folder) / EXIT_BLOCKS_FILE
    if not path.is_file():
        return None
    try:
        from safetensors import safe_open

        file: WeightFile = safe_open(path, "pt", device="cpu")
        metadata = file.metadata() or {}
        if not _FORMAT.items() <= metadata.items():
            raise ValueError(f"needed {_FORMAT} in its header, found {metadata!r:.200}")
        if metadata.get("fingerprint") != model_fingerprint(spec, weight_of):
            raise ValueError("its blocks were trained for other weights than those beside it")
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
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}; remove it, or train the blocks again") from error

    def take(name: str) -> Tensor | None:
        if name not in shapes:
            return None
        weight = file.get_tensor(name)
        try:
            check_finite(name, weight)
        except CheckpointError as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from None
        return weight

    return ExitBlocks(blocks, take)


def exit_blocks_content(
    spec: ModelSpec, weights: Mapping[str, Tensor], trained_for: str, kept: ExitBlocks | None = None
) -> bytes:
    """The file, of weights by the names of `ExitBlock.shapes`. `trained_for`: `model_fingerprint` of the model.

    The blocks of `kept` are added where `weights` has none for their exit. Save it with `save_beside`, or with the model.
    """
    from safetensors.torch import save

    content = dict(weights)
    trained = {block.exit_layer for block in blocks_named(weights, spec.layers)}
    for block in () if kept is None else kept.blocks:
        if kept is not None and block.exit_layer not in trained:
            content |= {name: kept.weights(spec).of(name) for name in block.shapes(spec)}
    written: bytes = save(content, metadata={**_FORMAT, "fingerprint": trained_for})
    return written
