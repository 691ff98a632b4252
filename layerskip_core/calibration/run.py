"""A calibration: texts, GPTQ, tuning, and the file beside the model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.beside import fingerprint, int4_content, matrix_names
from ..checkpoint.folder import INT4_FILE
from ..checkpoint.locate import is_adapter, own_folder
from ..checkpoint.open import for_decoding, for_training
from ..checkpoint.save import import_checkpoint, refuse_beside, refuse_overwrite, save_beside
from ..config.calibration import CalibrationConfig
from ..config.checks import require
from ..config.data import DataConfig
from ..errors import ConfigError
from ..model import ModelSpec, missing_feature
from ..model.low_bit import GROUP_SIZE, Int4, stored
from .layers import quantize
from .texts import data_texts, written_texts
from .tuning import tune

_COPY = "calibrated-model"  # the folder of the copy of a model that is no folder


@dataclass(frozen=True)
class Progress:
    """What is done: texts, layers or steps of tuning. `divergence`: of the predictions at that step, in nats per token."""

    stage: str
    done: int
    total: int
    divergence: float | None = None


Report = Callable[[Progress], None]


def output_folder(config: CalibrationConfig) -> str:
    """The folder that int4 weights are written to. Raises CheckpointError for a model that is not there."""
    if config.output is not None:
        return config.output
    return _own_folder(config.model) or _COPY


def _own_folder(model: str) -> str | None:
    return None if is_adapter(model) else own_folder(model)


def calibrate(config: CalibrationConfig, report: Report = lambda _: None) -> str:
    """Writes int4.safetensors to `output_folder`, whose lock the caller holds, and returns the folder.

    Nothing is written before the end. The same settings give the same weights on one machine.

    Raises:
        CheckpointError: the model cannot be read, or the folder not be written.
        ConfigError: the folder holds another model, or a file of this name that is not the model's, or the model has no int4
            kernels.
        DataError: the data is not there or too small.
    """
    folder = output_folder(config)
    own = _own_folder(config.model)
    copied = own is None or Path(folder).resolve() != Path(own).resolve()
    if copied:
        refuse_overwrite(folder, config.overwrite, (INT4_FILE,))
    else:
        refuse_beside(folder, INT4_FILE)
    texts = _texts(config, report)
    trainable = for_training(config.model, "cpu")
    backend, model = trainable.backend, trainable.model
    names = matrix_names(backend.spec)
    made_from = fingerprint(backend.spec, model.get_parameter)
    total = backend.num_layers + 1
    quantized = quantize(backend, texts, lambda done: report(Progress("layers", done, total)))
    weights = quantized.weights
    if config.tuning_steps:
        weights = tune(
            backend, quantized, texts, config.tuning_steps, config.seed,
            lambda done, divergence: report(Progress("tuning", done, config.tuning_steps, divergence)),
        )  # fmt: skip
    content = _content(weights, names, made_from, config, texts)
    if copied:
        import_checkpoint(config.model, folder, "auto", {INT4_FILE: content})
    else:
        save_beside(folder, INT4_FILE, content)
    return folder


def _texts(config: CalibrationConfig, report: Report) -> Tensor:
    decoder = for_decoding(config.model, "cpu")
    _require_kernels(decoder.backend.spec)
    most = decoder.backend.max_positions
    require(config.length <= most, "length", f"at most {most}, the model's context", config.length)
    if config.data is None:
        return written_texts(
            decoder, config.samples, config.length, config.seed, lambda done: report(Progress("texts", done, config.samples))
        )
    texts = data_texts(decoder, DataConfig(config.data, seed=config.seed), config.samples, config.length)
    report(Progress("texts", len(texts), len(texts)))
    return texts


def _require_kernels(spec: ModelSpec) -> None:
    """Raises ConfigError for a model that no int4 kernel runs."""
    if missing := missing_feature(spec):
        raise ConfigError(f"int4 weights need a `model` that can be repacked, got {spec.model_type} with {missing}")
    for name in matrix_names(spec):
        width = spec.shapes[name][1]
        require(width % GROUP_SIZE == 0, "model", f"one whose layer widths {GROUP_SIZE} divides", f"{width} in {name}")


def _content(weights: dict[str, Int4], names: list[str], made_from: str, config: CalibrationConfig, texts: Tensor) -> bytes:
    details = {
        "texts": str(len(texts)), "length": str(texts.shape[1]), "tuning_steps": str(config.tuning_steps),
        "seed": str(config.seed), "torch": torch.__version__,
    }  # fmt: skip
    return int4_content({name: stored(weights[name]) for name in names}, made_from, details)
