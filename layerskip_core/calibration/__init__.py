"""Better int4 weights from texts that the model itself wrote, kept beside the model or in a cache.

A model's own text has the distribution that it decodes in, and needs no data (LLM-QAT, Liu et al., 2023). Every second text
begins with what the prompt template puts before a prompt, so that the model writes the prompt, too (Magpie, Xu et al., 2024),
the others with a random token.
"""

import os
from collections.abc import Callable
from functools import partial
from random import Random

import torch
from torch import Tensor

from ..checkpoint.folder import INT4_FILE, refuse_packed
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Decoder
from ..checkpoint.locate import own_folder, reading
from ..checkpoint.open import for_decoding, for_training
from ..checkpoint.save import refuse_sidecar, save_sidecar
from ..checkpoint.sidecars import cache_folder, cached_int4, fingerprint, int4_content, keep_in_cache, matrix_names
from ..config.decoding import DecodingConfig
from ..config.model import CalibrationConfig
from ..decoding import decode_batch
from ..errors import ConfigError, require
from ..model import ModelSpec, TransformersBackend, missing_feature
from ..model.weights import GROUP_SIZE, stored
from .model import quantize

_LENGTH = 256  # tokens of a text, or the model's context
_ROWS = 32  # texts that are written together
_HELD_OUT = 8  # texts that the agreement is measured on

Report = Callable[..., None]  # gets a stage, of how much, and how much is done


def output_folder(config: CalibrationConfig) -> str:
    """The model's folder if it can be written, else that of the cache. Raises CheckpointError for a model that is not there."""
    own = own_folder(config.model)
    return own if own is not None and os.access(own, os.W_OK) else str(cache_folder())


def calibrate(config: CalibrationConfig, report: Report = lambda *_: None) -> str:
    """Writes int4 weights to `output_folder`, whose lock the caller holds, and returns the file's path.

    Nothing is written before the end. The same settings give the same weights on one machine. The file has the acceptance of
    drafts by these weights: the share of tokens that they choose, too, of the model's greedy answers to parts of other texts.

    Raises:
        CheckpointError: the model cannot be read, or the folder not be written.
        ConfigError: the folder has a file of this name that is not the model's, or the model has no int4 kernels.
    """
    folder, own = output_folder(config), own_folder(config.model)
    if own is not None:
        reading(own, lambda: refuse_packed(own))  # before texts are written, which takes long
    if folder == own:
        refuse_sidecar(folder, INT4_FILE)
    texts, others, answers = _texts(config, report)
    backend = for_training(config.model, "cpu").backend
    made_from = fingerprint(backend.own_spec, backend.model.get_parameter)
    weights = quantize(backend, texts, partial(report, "layers", backend.num_layers + 1))
    chosen = choices(backend, torch.cat([others, answers[:, :-1]], dim=1))[:, others.shape[1] - 1 :]
    agreement = (chosen == answers).double().mean().item()
    details = {"texts": len(texts), "seed": config.seed, "agreement": agreement, "torch": torch.__version__}
    rows = {name: stored(weights[name]) for name in matrix_names(backend.own_spec)}
    content = int4_content(rows, made_from, {name: str(value) for name, value in details.items()})
    if folder == own:
        save_sidecar(folder, INT4_FILE, content, CheckpointInfo.without_int4)
        return f"{folder}/{INT4_FILE}"
    keep_in_cache(made_from, content)
    return str(cached_int4(made_from))


@torch.no_grad()
def choices(backend: TransformersBackend, texts: Tensor) -> Tensor:
    """(N, T) the most probable token after each token of the texts."""
    hidden = (backend.run_texts(backend.embed(text[None]), 0, backend.num_layers) for text in texts)
    return torch.cat([backend.unembed(states).argmax(-1) for states in hidden])


def _texts(config: CalibrationConfig, report: Report) -> tuple[Tensor, Tensor, Tensor]:
    """Texts (N, T), halves of others, and greedy answers to these. Raises ConfigError where no int4 kernel runs the model."""
    decoder = for_decoding(config.model, "cpu")
    spec = decoder.backend.spec
    if (missing := missing_feature(spec, recurrent=True)) or not isinstance(spec, ModelSpec):
        raise ConfigError(f"int4 weights need a `model` that can be repacked, got {spec.model_type} with {missing}")
    if spec.experts is not None:
        raise ConfigError(f"calibration needs a `model` without experts, got {spec.model_type}")
    if spec.sizes:
        raise ConfigError(f"calibration needs a `model` whose layers share no keys, got {spec.model_type}")
    if spec.architecture.transposed:
        raise ConfigError(f"calibration needs a `model` that stores weights by outputs, got {spec.model_type}")
    for name in matrix_names(spec):
        width = spec.shapes[name][1]
        require(width % GROUP_SIZE == 0, "model", f"one whose layer widths {GROUP_SIZE} divides", f"{width} in {name}")
    count = _HELD_OUT + config.samples
    texts = written_texts(decoder, count, min(_LENGTH, spec.context), config.seed, partial(report, "texts", count))
    others = texts[:_HELD_OUT, : texts.shape[1] // 2]
    greedy = DecodingConfig("autoregressive", max_new_tokens=texts.shape[1] - others.shape[1])
    return texts[_HELD_OUT:], others, torch.tensor(_answers(decoder, others.tolist(), greedy))


def _answers(
    decoder: Decoder, prompts: list[list[int]], config: DecodingConfig, seeds: list[int] | None = None
) -> list[list[int]]:
    answers = decode_batch(decoder.backend, prompts, config, seeds=seeds)
    return [answer.ids for answer in sorted(answers, key=lambda answer: answer.row)]


def written_texts(decoder: Decoder, count: int, length: int, seed: int, report: Callable[[int], None]) -> Tensor:
    """(count, at most `length`) tokens, sampled at temperature 1. A text goes on after the end of an answer."""
    draw, start = Random(seed), decoder.prompt_start()[: length - 1]
    config = DecodingConfig("autoregressive", max_new_tokens=length - max(len(start), 1), temperature=1.0)
    texts: list[list[int]] = []
    while len(texts) < count:
        places = range(len(texts), min(len(texts) + _ROWS, count))
        prompts = [start if start and place % 2 else [draw.randrange(decoder.backend.spec.vocab)] for place in places]
        seeds = [draw.randrange(2**32) for _ in prompts]
        answers = _answers(decoder, prompts, config, seeds)
        texts += [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        report(len(texts))
    return torch.tensor([text[: config.max_new_tokens + 1] for text in texts])
