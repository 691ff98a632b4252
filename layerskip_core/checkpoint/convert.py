"""`layerskip import`: any model as a plain transformers checkpoint with its sidecars."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..model.vocabulary import ORDER_FILE
from .folder import EXIT_BLOCKS_FILE, INT4_FILE
from .info import EXIT_BLOCKS, CheckpointInfo
from .loaded import Trainable
from .locate import ModelRef, adapters_of, fetched_folder
from .open import for_training
from .save import save_checkpoint
from .shipped import drafter_files, files_of_shipped, is_assistant, read_stored_drafters, shipped_by
from .sidecars import EAGLE3_FOLDER, read_int4
from .transformers_read import written_dtype


def import_checkpoint(
    name: str, output: str, dtype: str, drafter: str | None = None
) -> tuple[torch.dtype, list[str]]:
    """Writes any model that can be loaded to `output`, with its sidecars. GGUF is dequantised,
    adapters are merged.

    `drafter`: folder or hub id of a drafter (EAGLE-3 layout, or Gemma 4's assistant) that replaces
    the model's own. `dtype`: as for `written_dtype`. Returns the precision, and the reasons for
    left-out files.
    """
    loaded = for_training(name, "cpu", "fp32")
    precision = written_dtype(loaded, dtype)
    spec = loaded.backend.spec
    base = ModelRef.of(adapters_of(name)[1]).fetched()
    files, left_out = _sidecars(base, loaded)
    files |= files_of_shipped(shipped_by(name, spec), spec, loaded.fingerprint)
    drafters = []
    given = None if drafter is None else fetched_folder(drafter)
    replaces_own = given is not None and not is_assistant(given)
    if base.sidecar_folder is not None and not replaces_own:
        drafters.append(f"{base.sidecar_folder}/{EAGLE3_FOLDER}")
    if given is not None:
        drafters.append(given)
    for folder in drafters:
        if Path(folder).is_dir():
            files |= drafter_files(folder, loaded, str(Path(output).resolve()))
    order = Path(ModelRef.of(name).fetched().path) / ORDER_FILE
    if order.is_file():
        files[ORDER_FILE] = order.read_bytes()
    info = loaded.info if base.gguf is None else loaded.info.dequantised()
    info = _described(info, name, EXIT_BLOCKS_FILE in files, not replaces_own)
    save_checkpoint(loaded.model, loaded.tokenizer, info, output, precision, files)
    return precision, left_out


def _sidecars(base: ModelRef, loaded: Trainable) -> tuple[dict[str, bytes], list[str]]:
    """int4 weights and exit blocks of a folder, byte for byte, and the reasons for those of other
    weights, which are left out.
    """
    files: dict[str, bytes] = {}
    left_out: list[str] = []
    folder = base.sidecar_folder
    if folder is None:
        return files, left_out
    readers: dict[str, Callable[[], object]] = {
        INT4_FILE: lambda: read_int4(folder, loaded.backend.own_spec, loaded.fingerprint),
        EXIT_BLOCKS_FILE: lambda: read_stored_drafters(
            folder, loaded.backend.spec, loaded.fingerprint
        ),
    }
    for name, read in readers.items():
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            read()
        except CheckpointError as error:
            left_out.append(str(error))
        else:
            files[name] = path.read_bytes()
    return files, left_out


def _described(
    info: CheckpointInfo, name: str, has_blocks: bool, has_own_drafter: bool
) -> CheckpointInfo:
    """The settings of the written model: those of blocks and drafters that it has."""
    details = {**info.details, "imported_from": name}
    described = {}
    for trained, how in details.pop(EXIT_BLOCKS, {}).items():
        is_written = has_own_drafter if trained == EAGLE3_FOLDER else has_blocks
        if is_written:
            described[trained] = how
    if described:
        details[EXIT_BLOCKS] = described
    return replace(info, details=details)
