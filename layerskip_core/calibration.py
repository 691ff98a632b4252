"""Better int4 weights from texts that the model itself wrote, kept beside the model or in a cache.

A model's own text has the distribution that it decodes in, and needs no data (LLM-QAT, Liu et al.,
2023). Every second text begins with what the prompt template puts before a prompt, so that the
model writes the prompt, too (Magpie, Xu et al., 2024), the others with a random token.

Layers are quantised in order, each on the outputs of the quantised layers before it. GPTQ (Frantar
et al., ICLR 2023) rounds a weight input by input, and corrects the weights of later inputs for each
error. The error of a weight W (out, in) is the sum over inputs x of |(W - W4) x|^2, which is the
trace of (W - W4) H (W - W4)^T with H = sum x x^T.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from random import Random

import torch
from torch import Tensor, nn

from .checkpoint.folder import INT4_FILE, refuse_packed
from .checkpoint.info import CheckpointInfo
from .checkpoint.loaded import Decoder
from .checkpoint.locate import ModelRef, reading
from .checkpoint.open import for_decoding, for_training
from .checkpoint.save import refuse_sidecar, save_sidecar
from .checkpoint.sidecars import (
    cache_folder,
    cached_int4,
    fingerprint,
    int4_content,
    keep_in_cache,
    matrix_names,
)
from .config.decoding import DecodingConfig
from .config.model import CalibrationConfig
from .decoding import decode_batch
from .errors import ConfigError, require
from .model import ModelSpec, TransformersBackend, missing_feature
from .model.weights import GROUP_SIZE, LEVELS, Int4, int4_bytes

_LENGTH = 256  # tokens of a text, or the model's context
_ROWS = 32  # texts decoded together
_HELD_OUT = 8  # texts to measure the agreement on
_TOKENS = 4096  # per forward pass
_FITS = 3  # times that a group is rounded, and its scale and lowest value fitted to the levels
_TINY = 1e-8  # the smallest scale

Report = Callable[..., None]  # gets (stage, total, done)


def output_folder(config: CalibrationConfig) -> str:
    """The model's folder if it can be written, else that of the cache. Raises CheckpointError for a
    model that is not there.
    """
    own = ModelRef.of(config.model).own_folder
    return own if own is not None and os.access(own, os.W_OK) else str(cache_folder())


def calibrate(config: CalibrationConfig, report: Report = lambda *_: None) -> str:
    """Writes int4 weights to `output_folder`, whose lock the caller holds, and returns the file's
    path.

    Nothing is written before the end. The same settings give the same weights on one machine. The
    file records the acceptance rate of drafts by these weights: how often they choose the tokens of
    the model's greedy answers to held-out texts.

    Raises:
        CheckpointError: the model cannot be read, or the folder not be written. ConfigError: the
        folder has a file of this name that is not the model's, or the model has no int4 kernels.
    """
    folder = output_folder(config)
    own = ModelRef.of(config.model).own_folder
    if own is not None:
        with reading(own):
            refuse_packed(own)  # before the slow part
    if folder == own:
        refuse_sidecar(folder, INT4_FILE)
    texts, others, answers = _texts(config, report)
    backend = for_training(config.model, "cpu").backend
    made_from = fingerprint(backend.own_spec, backend.model.get_parameter)
    weights = quantize(backend, texts, partial(report, "layers", backend.num_layers + 1))
    chosen = choices(backend, torch.cat([others, answers[:, :-1]], dim=1))[:, others.shape[1] - 1 :]
    agreement = (chosen == answers).double().mean().item()
    details = {
        "texts": len(texts),
        "seed": config.seed,
        "agreement": agreement,
        "torch": torch.__version__,
    }
    rows = {name: int4_bytes(weights[name]) for name in matrix_names(backend.own_spec)}
    content = int4_content(rows, made_from, {name: str(value) for name, value in details.items()})
    if folder == own:
        save_sidecar(folder, INT4_FILE, content, CheckpointInfo.without_int4)
        return f"{folder}/{INT4_FILE}"
    keep_in_cache(made_from, content)
    return str(cached_int4(made_from))


@torch.no_grad()
def choices(backend: TransformersBackend, texts: Tensor) -> Tensor:
    """The argmax (N, T) after each token of the texts."""
    hidden = (backend.run_texts(backend.embed(text[None]), 0, backend.num_layers) for text in texts)
    return torch.cat([backend.unembed(states).argmax(-1) for states in hidden])


def _texts(config: CalibrationConfig, report: Report) -> tuple[Tensor, Tensor, Tensor]:
    """(texts (N, T), halves of held-out texts, greedy answers to these). Raises ConfigError without
    an int4 kernel for it.
    """
    decoder = for_decoding(config.model, "cpu")
    spec = decoder.backend.spec
    missing = missing_feature(spec, native=True)
    if missing or not isinstance(spec, ModelSpec):
        raise ConfigError(
            f"int4 weights need a `model` that can be repacked, got {spec.model_type} with {missing}"
        )
    for is_unsuited, needed in (
        (spec.experts is not None, "without experts"),
        (bool(spec.sizes), "whose layers share no keys"),
        (spec.architecture.transposed, "that stores weights by outputs"),
    ):
        if is_unsuited:
            raise ConfigError(f"calibration needs a `model` {needed}, got {spec.model_type}")
    for name in matrix_names(spec):
        width = spec.shapes[name][1]
        needed = f"one whose layer widths {GROUP_SIZE} divides"
        require(width % GROUP_SIZE == 0, "model", needed, f"{width} in {name}")
    count = _HELD_OUT + config.samples
    texts = written_texts(
        decoder, count, min(_LENGTH, spec.context), config.seed, partial(report, "texts", count)
    )
    others = texts[:_HELD_OUT, : texts.shape[1] // 2]
    greedy = DecodingConfig("autoregressive", max_new_tokens=texts.shape[1] - others.shape[1])
    return texts[_HELD_OUT:], others, torch.tensor(_answers(decoder, others.tolist(), greedy))


def _answers(
    decoder: Decoder,
    prompts: list[list[int]],
    config: DecodingConfig,
    seeds: list[int] | None = None,
) -> list[list[int]]:
    answers = decode_batch(decoder.backend, prompts, config, seeds=seeds)
    return [answer.ids for answer in answers]


def written_texts(
    decoder: Decoder, count: int, length: int, seed: int, report: Callable[[int], None]
) -> Tensor:
    """(count, at most `length`) tokens, sampled at temperature 1. Texts run past EOS."""
    draw = Random(seed)
    start = decoder.prompt_start()[: length - 1]
    config = DecodingConfig(
        "autoregressive", max_new_tokens=length - max(len(start), 1), temperature=1.0
    )
    texts: list[list[int]] = []
    while len(texts) < count:
        places = range(len(texts), min(len(texts) + _ROWS, count))
        prompts = [
            start if start and place % 2 else [draw.randrange(decoder.backend.spec.vocab)]
            for place in places
        ]
        seeds = [draw.randrange(2**32) for _ in prompts]
        answers = _answers(decoder, prompts, config, seeds)
        texts += [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        report(len(texts))
    return torch.tensor([text[: config.max_new_tokens + 1] for text in texts])


def nearest(weights: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return ((weights - low) / scale).round_().clamp_(0, LEVELS - 1)


def fitted(group: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, lowest value), each (out,), of weights (in group, out), near the least squared error.

    From the whole range on, alternates rounding to levels with regression on these. `importance`
    (in group,) weighs the errors.
    """
    low, high = group.aminmax(dim=0)
    scale = ((high - low) / (LEVELS - 1)).clamp_min_(_TINY)
    share = importance / importance.sum()
    for _ in range(_FITS):
        levels = nearest(group, scale, low)
        middle = share @ levels
        mean = share @ group
        centred = levels.sub_(middle)
        scale = (
            (share @ (centred * (group - mean))) / (share @ centred.square()).clamp_min_(_TINY)
        ).clamp_min_(_TINY)
        low = mean - scale * middle
    return scale.bfloat16().float(), low.bfloat16().float()


def gptq(weight: Tensor, square: Tensor) -> Int4:
    """A weight (out, in) in 4 bits, for inputs with H `square` (in, in). Scales and lowest values
    are rounded to bf16.

    For uncorrelated inputs of equal size this is `fitted` for each group.
    """
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(square)), upper=True
    )
    diagonal = factor.diagonal()
    # (in, out): weights, corrected for the errors so far
    left = weight.T.float().clone(memory_format=torch.contiguous_format)
    levels = torch.empty_like(left)
    scales, lows = left.new_empty(2, len(left) // GROUP_SIZE, len(weight))
    for number, start in enumerate(range(0, len(left), GROUP_SIZE)):
        stop = start + GROUP_SIZE
        block = left[start:stop]
        errors = torch.empty_like(left[start:stop])
        scales[number], lows[number] = scale, low = fitted(block, diagonal[start:stop].pow(-2))
        for place, column in enumerate(range(start, stop)):
            levels[column] = level = nearest(block[place], scale, low)
            errors[place] = error = (block[place] - (level * scale + low)) / diagonal[column]
            block[place + 1 :].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return Int4(levels.T.to(torch.uint8).contiguous(), scales.T.contiguous(), lows.T.contiguous())


@torch.no_grad()
def quantize(
    backend: TransformersBackend, texts: Tensor, report: Callable[[int], None]
) -> dict[str, Int4]:
    """All projections and the head in 4 bits, by name, on texts (N, T). The projections of
    `backend` get their int4 values.

    `report` gets the number of layers done, the head as the last. The head of `backend` stays as it
    is, because drafts use it in 8 bits.
    """
    states = [backend.embed(part) for part in torch.split(texts, max(1, _TOKENS // texts.shape[1]))]
    spec = backend.own_spec
    weights = dict[str, Int4]()
    # Kernels have them in no low-bit form
    others = () if spec.architecture.mixer is None else spec.architecture.mixer.steps
    for index in range(backend.num_layers):
        layer = backend.layers[index]
        run = partial(backend.run_texts, start=index, end=index + 1)
        for names, square in _squares(layer, run, states, others).items():
            matrices = [layer.get_parameter(f"{name}.weight") for name in names]
            joint = gptq(torch.cat(matrices), damped(square, texts.numel()))
            start = 0
            for name, matrix in zip(names, matrices, strict=True):
                rows = slice(start, start + len(matrix))
                start = rows.stop
                made = Int4(joint.levels[rows], joint.scale[rows], joint.low[rows])
                weights[f"{spec.layer_prefix(index)}{name}.weight"] = made
                matrix.copy_(made.weight)
        states = [run(hidden) for hidden in states]
        report(index + 1)
    square = sum(map(_square, map(backend.normed, states)), torch.zeros(spec.hidden, spec.hidden))
    weights[spec.head_name] = gptq(
        backend.model.get_parameter(spec.head_name), damped(square, texts.numel())
    )
    report(backend.num_layers + 1)
    return weights


def damped(square: Tensor, tokens: int) -> Tensor:
    """H / mean(diagonal) + (in / tokens) I: H of few tokens is noisy."""
    return square / square.diagonal().mean().clamp_min(_TINY) + len(square) / tokens * torch.eye(
        len(square)
    )


def _square(inputs: Tensor) -> Tensor:
    wide = inputs.flatten(0, -2).float()
    return wide.T @ wide


def _squares(
    layer: nn.Module,
    run: Callable[[Tensor], Tensor],
    states: Sequence[Tensor],
    others: Sequence[str],
) -> dict[tuple[str, ...], Tensor]:
    """H by the names of the projections that share their inputs."""
    squares = dict[tuple[str, ...], Tensor]()
    for hidden in states:
        inputs = dict[str, Tensor]()

        def note(
            name: str, _: nn.Module, given: tuple[Tensor, ...], inputs: dict[str, Tensor] = inputs
        ) -> None:
            inputs[name] = given[0]

        with ExitStack() as hooks:
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear) and name not in others:
                    hooks.enter_context(module.register_forward_pre_hook(partial(note, name)))
            run(hidden)
        shared = dict[int, list[str]]()
        for name, given in inputs.items():
            shared.setdefault(id(given), []).append(name)
        for names in shared.values():
            squares[tuple(names)] = squares.get(tuple(names), 0) + _square(inputs[names[0]])
    return squares
