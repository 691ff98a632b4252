"""target.gguf and draft.gguf: a model and its draft for llama.cpp."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint.loaded import Trainable
from ..errors import CheckpointError, ConfigError
from ..files import new_staging, require_writable, synchronise
from ..model import ModelSpec
from ..model.exit_blocks import ExitBlocks
from .draft import cut_to_exit
from .gguf_file import write_gguf

TARGET, DRAFT = "target.gguf", "draft.gguf"


def refuse_gguf(output: str, overwrite: bool, readme: str) -> None:
    """Raises ConfigError if `output` holds such files that may not be replaced, or a readme without them."""
    folder = Path(output)
    ours = [name for name in (TARGET, DRAFT) if os.path.lexists(folder / name)]
    if ours and not overwrite:
        raise ConfigError(f"`output` {output} already holds {ours[0]}; give `overwrite` to replace it, or another folder")
    if not ours and os.path.lexists(folder / readme):
        raise ConfigError(f"`output` {output}: in the way is {readme}, which layerskip did not write; give another folder")
    for name in (TARGET, DRAFT, readme):
        require_writable(folder / name, CheckpointError)


def write_pair(
    loaded: Trainable, exit_layer: int, blocks: ExitBlocks, output: str, kind: str, files: Mapping[str, bytes]
) -> None:
    """Writes both models and `files` to `output`, whose lock the caller holds; the target alone if the exit is the last layer.

    `loaded`, in fp32, loses the layers that the draft does not have. Raises as `write_gguf` and `cut_to_exit` do, and
    CheckpointError if the files cannot be written. The folder is unchanged then, unless the last renames fail. The draft goes
    first and comes last: whenever this is killed, no draft lies beside a target that is not its own.
    """
    folder = Path(output)
    try:
        staging = new_staging(folder)
        try:
            write_gguf(loaded.model, loaded.tokenizer, loaded.backend.spec, staging / TARGET, kind)
            if exit_layer < loaded.backend.num_layers:
                draft = cut_to_exit(loaded, exit_layer, blocks)
                write_gguf(draft, loaded.tokenizer, ModelSpec.of(draft.config), staging / DRAFT, kind)
            for name, content in files.items():
                (staging / name).write_bytes(content)
            written = sorted(staging.iterdir(), key=lambda path: path.name == DRAFT)
            for path in written:
                synchronise(path)
            (folder / DRAFT).unlink(missing_ok=True)
            for path in written:
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {output}: {error}") from error
