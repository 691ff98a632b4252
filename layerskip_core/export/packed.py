"""A model packed for the compiled kernels, in a folder that every command that decodes can load at once."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.folder import GENERATION_FILE, PACKED_FILE, quiet_transformers
from ..checkpoint.info import read_info
from ..checkpoint.locate import Location, downloaded
from ..checkpoint.open import Source, for_packing
from ..checkpoint.packed_file import Content, PackedWriter, norm_names
from ..checkpoint.save import refuse_overwrite, save_files
from ..checkpoint.transformers_read import open_model
from ..config.model import ExportConfig, PackingConfig
from ..errors import CheckpointError, ConfigError
from ..model import NativeBackend, can_run_native
from ..model.native.compiled import kernels, why_no_kernels
from ..model.spec import EMBEDDING
from ..model.vocabulary import ORDER_FILE
from ..model.weights import Weights, named_int4

_CPU = torch.device("cpu")


def export_packed(config: ExportConfig) -> tuple[str, int]:
    """Writes a model to `output`, whose lock the caller holds, with its weights as the compiled kernels read them.

    Returns the format in words (`int4`, or `bf16 with int8 for drafts`) and the bytes of the weights written. Each matrix is
    packed, written and freed before the next one is read. The folder is the model's own in all but the weights.

    Raises:
        CheckpointError: the model cannot be read, the kernels cannot run it here, or the folder cannot be written.
        ConfigError: the folder is the model's own or holds another model, or the model is no folder of safetensors.
    """
    source = downloaded(config.model)
    refuse_overwrite(config.output, config.overwrite)
    asked = PackingConfig(quantize=config.quantize, adaptive=True)
    if kernels() is None:
        raise ConfigError(f"`format` packed needs the compiled kernels: {why_no_kernels()}", "format")
    unpacked = for_packing(source, config.dtype, asked)
    if not can_run_native(unpacked.spec, unpacked.dtype, _CPU, unpacked.packing):
        raise CheckpointError(
            f"{config.model} cannot be packed: the compiled kernels do not run its architecture or its widths"
        )
    info = read_info(source)
    info = replace(info, details={**info.details, "packed_from": config.model})
    written: list[str] = []

    @quiet_transformers()
    def write(staging: Path) -> None:
        files, folder = open_model(Location(source)), Path(source)
        files.config.save_pretrained(staging)  # as transformers writes it, so that loading needs no transformers
        files.tokenizer().save_pretrained(staging)
        for name in (GENERATION_FILE, ORDER_FILE):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staging / name)
        written.append(_write_weights(unpacked, staging / PACKED_FILE))

    save_files(write, info, config.output)
    return written[0], (Path(config.output) / PACKED_FILE).stat().st_size


def _write_weights(source: Source, path: Path) -> str:
    """Packs the weights that `source` decodes with. Heads are packed whole: loading takes the rows of `draft_vocab`."""
    packing = replace(source.packing, draft_vocab=0)
    spec, blocks, calibrated = source.spec, source.exit_blocks, source.int4 is not None
    block_shapes = blocks.shapes(spec)
    content = Content(
        "bf16" if source.dtype == torch.bfloat16 else "fp32",
        packing.quantize,
        packing.draft_weights,
        (packing.draft_head or "int8") if packing.draft_weights else None,
        calibrated,
        {str(block.exit_layer): block.feature for block in blocks.blocks},
    )
    compiled = kernels()
    assert compiled is not None
    most = 3 * (1 + len(packing.draft_weights)) * (len(spec.shapes) + len(block_shapes) + 1)
    with path.open("wb") as file, torch.inference_mode():
        writer = PackedWriter(file, compiled, most)
        take = source.take()
        embedding = Weights(take, spec.shapes).of(EMBEDDING)
        writer.add(EMBEDDING, embedding)
        NativeBackend(spec, take, packing, None, source.int4, blocks, embedding, pack=writer.matrix)
        of_blocks = blocks.weights(spec, torch.empty(0, dtype=source.dtype))
        for weights, shapes in ((Weights(take, spec.shapes), spec.shapes), (of_blocks, block_shapes)):
            for name in norm_names(shapes):
                writer.add(name, weights.of(name))
        writer.finish(content)
    copies = f" with {' and '.join(packing.draft_weights)} for drafts" if packing.draft_weights else ""
    return named_int4(f"{packing.quantize or content.dtype}{copies}", calibrated)
