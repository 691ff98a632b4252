"""The drafter that a checkpoint ships (MTP), and the other blocks and drafters beside a model, when they are read.

It is found by its tensors, `mtp.*`, in any of the model's safetensors files; mtp.safetensors holds one that was copied or
trained on, in place of theirs. Its header has the fingerprint of the model that it was made for: with others it drafts too, but
the user is told.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..model.exit_blocks import MTP, NO_BLOCKS, ExitBlocks, blocks_named
from ..model.spec import AnySpec, ModelSpec
from .assistant import assistant_beside, assistant_content
from .folder import EXIT_BLOCKS_FILE, FLOATS, MTP_FILE, JoinedWeights, WeightFile, weight_files
from .loaded import Trainable
from .locate import adapters_of, present
from .sidecars import (
    BLOCKS,
    FINGERPRINT,
    check_entries,
    check_fingerprint,
    content_of,
    eagle3_sidecar,
    fingerprint,
    naming,
    open_formed,
)

_SHIPPED = {  # what our names of MTP's weights begin with, after its prefix, and those of Qwen3.5 and Qwen3-Next
    "layer.": "mtp.layers.0.",
    "norm.": "mtp.norm.",
    "input.": "mtp.fc.",
    "embedding_norm.": "mtp.pre_fc_norm_embedding.",
    "feature_norm.": "mtp.pre_fc_norm_hidden.",
}
OTHERS = "other weights"  # in the place of a fingerprint
STALE = "its drafter (mtp) was made for other weights; `layerskip train-drafter --start-from shipped` trains it for these"
STALE_ASSISTANT = "its assistant (mtp) was made for other weights: fewer of its drafts may be right"


def read_exit_blocks(folder: str | Path, spec: AnySpec, weight_of: Callable[[str], Tensor]) -> ExitBlocks:
    """A folder's blocks, read when taken, and its drafters. Raises CheckpointError if blocks are not this model's."""
    path, blocks = Path(folder) / EXIT_BLOCKS_FILE, NO_BLOCKS
    if path.is_file():
        with naming(path):
            file = open_formed(path, BLOCKS)
            found = blocks_named(file.entries, spec.layers)
            blocks = ExitBlocks(found, lambda name: file.read(name) if name in file.entries else None)
            check_fingerprint(file, spec, weight_of)
            check_entries(file.entries, blocks.shapes(spec), FLOATS)
    return with_drafters(blocks, folder, spec, weight_of)


def with_drafters(
    blocks: ExitBlocks, folder: str | Path, spec: AnySpec, weight_of: Callable[[str], Tensor] | None = None
) -> ExitBlocks:
    """With the drafters of a folder. `weight_of`: its model, None if that is packed."""

    def is_other(known: str | None) -> bool:
        return bool(known) and (known == OTHERS or (weight_of is not None and known != fingerprint(spec, weight_of)))

    eagle3, found = eagle3_sidecar(folder, spec), _shipped_beside(folder, spec, is_other)
    if found is NO_BLOCKS and not eagle3:
        return blocks
    return replace(blocks, eagle3=eagle3, mtp=found.mtp, assistant=found.assistant, notes=found.notes)


def _shipped_beside(folder: str | Path, spec: AnySpec, is_other: Callable[[str | None], bool]) -> ExitBlocks:
    """The drafters that a folder's model ships. `is_other`: whether one was made for other weights, by its fingerprint."""
    (mtp, notes), (assistant, why) = mtp_sidecar(folder, spec), assistant_beside(folder, spec)
    if mtp and is_other(mtp.model_fingerprint):
        mtp, notes = replace(mtp, model_fingerprint=OTHERS), (STALE,)
    if assistant and is_other(assistant.model_fingerprint):
        assistant, why = replace(assistant, model_fingerprint=OTHERS), (STALE_ASSISTANT,)
    notes = (*notes, *why)
    return replace(NO_BLOCKS, mtp=mtp, assistant=assistant, notes=notes) if mtp or assistant or notes else NO_BLOCKS


def mtp_sidecar(folder: str | Path, spec: AnySpec) -> tuple[ExitBlocks | None, tuple[str, ...]]:
    """The drafter that a folder's checkpoint ships, read when taken; a note if it has one that is not read here."""
    own, found, files = Path(folder) / MTP_FILE, dict[str, str](), dict[str, WeightFile]()
    for file in map(WeightFile, [*weight_files(folder), *([own] if own.is_file() else [])]):
        for name in file.entries:
            if (match := re.search(r"(?:^|\.)(mtp\..*)", name)) is not None:
                found[match[1]], files[name] = name, file
    if not found:
        return None, ()
    shapes, experts = {_shipped(name): shape for name, shape in MTP.shapes(spec).items()}, dict[str, list[list[str]]]()
    if isinstance(spec, ModelSpec) and spec.attending:  # stored in parts as those of the model's last such layer
        last, own_layer = spec.layer_prefix(spec.attending[-1]), _SHIPPED["layer."]
        for name, parts in spec.stored_parts.items():
            experts[name.replace(last, own_layer, 1)] = [[part.replace(last, own_layer, 1) for part in each] for each in parts]

    def stored(name: str) -> list[list[str]]:
        if name in found:
            return [[found[name]]]
        return [[found.get(part, part) for part in each] for each in experts.get(name, [[name]])]

    weights = JoinedWeights(files, {name: stored(name) for name in shapes}, shapes)
    others = {name: files[own].entries[own] for name, own in found.items() if own not in weights.joined}
    try:
        check_entries(others | weights.entries, shapes, FLOATS)
    except ValueError as error:
        return None, (f"its drafter is left aside, whose layout is not known here: {error}",)
    model_fingerprint = files[found[f"{_SHIPPED['input.']}weight"]].metadata.get(FINGERPRINT)
    return ExitBlocks((MTP,), lambda name: weights.read(_shipped(name)), model_fingerprint=model_fingerprint), ()


def mtp_content(spec: AnySpec, mtp: ExitBlocks, weight_of: Callable[[str], Tensor]) -> bytes:
    """mtp.safetensors. `weight_of`: the model that the drafter was made for, unless it says so."""
    weights, known = mtp.weights(spec), mtp.model_fingerprint or fingerprint(spec, weight_of)
    return content_of({_shipped(name): weights.of(name) for name in MTP.shapes(spec)}, known, {"format": "pt"})


def _shipped(name: str) -> str:
    """The name in a checkpoint of a weight of MTP."""
    part, dot, rest = name.removeprefix(MTP.prefix).partition(".")
    return _SHIPPED[part + dot] + rest


def shipped_files(name: str, loaded: Trainable) -> dict[str, bytes]:
    """The files of the drafters that a model ships, to be saved with its weights or what these become."""
    spec = loaded.backend.spec
    return files_of_shipped(shipped_by(name, spec), spec, loaded.model.get_parameter)


def files_of_shipped(blocks: ExitBlocks, spec: AnySpec, weight_of: Callable[[str], Tensor]) -> dict[str, bytes]:
    files = {} if blocks.mtp is None else {MTP_FILE: mtp_content(spec, blocks.mtp, weight_of)}
    if (assistant := blocks.assistant) is not None:
        files |= assistant_content(assistant, assistant.model_fingerprint or fingerprint(spec, weight_of))
    return files


def shipped_by(name: str, spec: AnySpec) -> ExitBlocks:
    """The drafter that a checkpoint ships, or the base of an adapter, whose weights are others."""
    adapters, base = adapters_of(name)
    folder = present(base).folder
    return NO_BLOCKS if folder is None else _shipped_beside(folder, spec, lambda known: bool(adapters))
