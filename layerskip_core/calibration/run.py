"""A calibration: its texts, and the file of int4 weights beside the model.

A model's own text has the distribution that it decodes in, and needs no data (LLM-QAT, Liu et al., 2023). Half of the texts
begin with a random token, half with what the prompt template puts before a prompt, so that the model writes the prompt, too
(Magpie, Xu et al., 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from ..checkpoint.beside import fingerprint, int4_content, matrix_names
from ..checkpoint.folder import INT4_FILE
from ..checkpoint.loaded import Decoder
from ..checkpoint.locate import is_adapter, own_folder
from ..checkpoint.open import for_decoding, for_training
from ..checkpoint.save import import_checkpoint, refuse_beside, refuse_overwrite, save_beside
from ..config.calibration import CalibrationConfig
from ..config.checks import require
from ..config.data import DataConfig
from ..data.examples import Conversation, load_rows
from ..errors import ConfigError, DataError
from ..model import Backend, ModelSpec, missing_feature
from ..model.low_bit import GROUP_SIZE, Int4, stored
from .model import quantize, tune

_COPY = "calibrated-model"  # the folder of the copy of a model that is no folder
_ROWS = 32  # texts that are written together


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


@torch.inference_mode()
def written_texts(decoder: Decoder, count: int, length: int, seed: int, report: Callable[[int], None]) -> Tensor:
    """(count, length) tokens, sampled at temperature 1. A text goes on after the end of an answer."""
    generator = torch.Generator().manual_seed(seed)
    start = decoder.prompt_start()[: length - 1]
    texts: list[Tensor] = []
    done = 0
    while done < count:
        rows = min(_ROWS, count - done)
        first = torch.randint(decoder.backend.vocab_size, (rows, 1), generator=generator)
        templated = bool(start) and len(texts) % 2 == 1
        texts.append(_continued(decoder.backend, torch.tensor([start] * rows) if templated else first, length, generator))
        done += rows
        report(done)
    return torch.cat(texts)


def data_texts(decoder: Decoder, data: DataConfig, count: int, length: int) -> Tensor:
    """At most (count, length) tokens of the rows of a data set, joined in random order.

    Raises DataError where there is not even one text.
    """
    ids: list[int] = []
    rows = load_rows(data)
    Random(data.seed).shuffle(rows)
    for row in rows:
        if len(ids) >= count * length:
            break
        if isinstance(row, Conversation):
            raise DataError(f"`data` {data.name} must have rows of text or of prompt and completion, found conversations")
        ids += decoder.encode_prompt(row.prompt) if row.prompt else []
        ids += decoder.tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        ids += [] if decoder.tokenizer.eos_token_id is None else [decoder.tokenizer.eos_token_id]
    if len(ids) < length:
        raise DataError(f"`data` {data.name} must have at least {length} tokens, found {len(ids)}")
    texts = min(count, len(ids) // length)
    return torch.tensor(ids[: texts * length]).view(texts, length)


def _continued(model: Backend, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    rows, cache = len(ids), model.new_cache(len(ids), length)
    positions = torch.arange(length)[None].expand(rows, -1)
    newest = ids
    while True:
        known = ids.shape[1]
        start = known - newest.shape[1]
        hidden = model.run_layers(model.embed(newest), 0, model.num_layers, positions[:, start:known], cache)
        logits = model.unembed(hidden[:, -1:])[:, 0].float()
        newest = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, newest], dim=1)
        if ids.shape[1] == length:
            return ids
