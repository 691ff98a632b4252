"""Better int4 weights from text that the model itself wrote, in a file beside the model.

A model's own text has the distribution that it decodes in, and needs no data (LLM-QAT, Liu et al., 2023). Half of the texts
begin with a random token, half with what the prompt template puts before a prompt, so that the model writes the prompt, too
(Magpie, Xu et al., 2024).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from ..checkpoint.folder import INT4_FILE, refuse_packed
from ..checkpoint.loaded import Decoder
from ..checkpoint.locate import own_folder, reading
from ..checkpoint.open import for_decoding, for_training, import_checkpoint
from ..checkpoint.save import refuse_overwrite, refuse_sidecar, save_sidecar
from ..checkpoint.sidecars import fingerprint, int4_content, matrix_names
from ..config.decoding import DecodingConfig
from ..config.model import CalibrationConfig, DataConfig
from ..data import load_examples
from ..decoding import decode_batch
from ..errors import ConfigError, DataError, require
from ..model import ModelSpec, TransformersBackend, missing_feature
from ..model.weights import GROUP_SIZE, stored
from .model import quantize, tune

_COPY = "calibrated-model"  # the folder of the copy of a model that is no folder
_ROWS = 32  # texts that are written together
_HELD_OUT = 16  # texts that the model writes to measure the agreement on


Report = Callable[..., None]  # gets a stage, of how much, how much is done, and of tuning the divergence in nats per token


def output_folder(config: CalibrationConfig) -> str:
    """The folder that int4 weights are written to. Raises CheckpointError for a model that is not there."""
    return config.output or own_folder(config.model) or _COPY


def calibrate(config: CalibrationConfig, report: Report = lambda *_: None) -> str:
    """Writes int4.safetensors to `output_folder`, whose lock the caller holds, and returns the folder.

    Nothing is written before the end. The same settings give the same weights on one machine. layerskip.json gets the
    acceptance of drafts by these weights: the share of places in other texts where both models choose the same token.

    Raises:
        CheckpointError: the model cannot be read, or the folder not be written.
        ConfigError: the folder holds another model, or a file of this name that is not the model's, or the model has no int4
            kernels.
        DataError: the data is not there or too small.
    """
    folder, own = output_folder(config), own_folder(config.model)
    if own is not None:
        reading(own, lambda: refuse_packed(own))  # before texts are written, which takes long
    copied = own is None or Path(folder).resolve() != Path(own).resolve()
    if copied:
        refuse_overwrite(folder, config.overwrite, (INT4_FILE,))
    else:
        refuse_sidecar(folder, INT4_FILE)
    texts, others = _texts(config, report)
    trainable = for_training(config.model, "cpu")
    backend, steps = trainable.backend, config.tuning_steps
    expected = choices(backend, others)
    made_from = fingerprint(backend.own_spec, trainable.model.get_parameter)
    weights, original = quantize(backend, texts, partial(report, "layers", backend.num_layers + 1))
    if steps:
        weights = tune(backend, weights, original, texts, steps, config.seed, partial(report, "tuning", steps))
    agreement = (choices(backend, others) == expected).double().mean().item()
    details = {"texts": len(texts), "length": texts.shape[1], "tuning_steps": steps, "seed": config.seed}
    told = {name: str(value) for name, value in details.items()} | {"torch": torch.__version__}
    content = int4_content({name: stored(weights[name]) for name in matrix_names(backend.own_spec)}, made_from, told)
    if copied:
        import_checkpoint(config.model, folder, "auto", {INT4_FILE: content}, lambda info: info.with_int4(agreement))
    else:
        save_sidecar(folder, INT4_FILE, content, lambda info: info.with_int4(agreement))
    return folder


@torch.no_grad()
def choices(backend: TransformersBackend, texts: Tensor) -> Tensor:
    """(N, T) the most probable token after each token of the texts."""
    hidden = (backend.run_texts(backend.embed(text[None]), 0, backend.num_layers) for text in texts)
    return torch.cat([backend.unembed(states).argmax(-1) for states in hidden])


def _texts(config: CalibrationConfig, report: Report) -> tuple[Tensor, Tensor]:
    """The texts, and others to measure on. Raises ConfigError for a model that no int4 kernel runs."""
    decoder = for_decoding(config.model, "cpu")
    spec, most = decoder.backend.spec, decoder.backend.spec.context
    if (missing := missing_feature(spec, recurrent=True)) or not isinstance(spec, ModelSpec):
        raise ConfigError(f"int4 weights need a `model` that can be repacked, got {spec.model_type} with {missing}")
    if spec.experts is not None:
        raise ConfigError(f"calibration needs a `model` without experts, got {spec.model_type}")
    if spec.architecture.transposed:
        raise ConfigError(f"calibration needs a `model` that stores weights by outputs, got {spec.model_type}")
    for name in matrix_names(spec):
        width = spec.shapes[name][1]
        require(width % GROUP_SIZE == 0, "model", f"one whose layer widths {GROUP_SIZE} divides", f"{width} in {name}")
    require(config.length <= most, "length", f"at most {most}, the model's context", config.length)
    others = written_texts(decoder, _HELD_OUT, config.length, config.seed + 1, lambda _: None)
    if config.data is None:
        count = config.samples
        return written_texts(decoder, count, config.length, config.seed, partial(report, "texts", count)), others
    texts = data_texts(decoder, DataConfig(config.data, seed=config.seed), config.samples, config.length)
    report("texts", len(texts), len(texts))
    return texts, others


def written_texts(decoder: Decoder, count: int, length: int, seed: int, report: Callable[[int], None]) -> Tensor:
    """(count, length) tokens, sampled at temperature 1. A text goes on after the end of an answer."""
    draw, start = Random(seed), decoder.prompt_start()[: length - 1]
    texts: list[list[int]] = []
    while len(texts) < count:
        templated = bool(start) and len(texts) // _ROWS % 2 == 1
        prompts = [start if templated else [draw.randrange(decoder.backend.spec.vocab)] for _ in range(_ROWS)]
        prompts = prompts[: count - len(texts)]
        config = DecodingConfig("autoregressive", max_new_tokens=length - len(prompts[0]), temperature=1.0)
        seeds = [draw.randrange(2**32) for _ in prompts]
        answers = sorted(decode_batch(decoder.backend, prompts, config, seeds=seeds), key=lambda answer: answer.row)
        texts += [[*prompt, *answer.ids] for prompt, answer in zip(prompts, answers, strict=True)]
        report(len(texts))
    return torch.tensor(texts)


def data_texts(decoder: Decoder, data: DataConfig, count: int, length: int) -> Tensor:
    """At most (count, length) tokens of the rows of a data set, joined in random order.

    Raises DataError where there is not even one text.
    """
    ids: list[int] = []
    rows = load_examples(data)
    Random(data.seed).shuffle(rows)
    for row in rows:
        if len(ids) >= count * length:
            break
        ids += decoder.encode_prompt(row.prompt) if row.prompt else []
        ids += decoder.tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        ids += [] if decoder.tokenizer.eos_token_id is None else [decoder.tokenizer.eos_token_id]
    if len(ids) < length:
        raise DataError(f"`data` {data.name} must have at least {length} tokens, found {len(ids)}")
    texts = min(count, len(ids) // length)
    return torch.tensor(ids[: texts * length]).view(texts, length)
