"""A model in 4 bits, layer by layer, from the inputs that the layers before give it as they are already quantised.

GPTQ (Frantar et al., ICLR 2023) chooses the levels of a weight input by input, and the inputs that follow make up for each
error. The error of a weight W (out, in) is the sum over inputs x of |(W - W4) x|^2, which is the trace of
(W - W4) H (W - W4)^T with H = sum x x^T.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..model import TransformersBackend
from ..model.weights import GROUP_SIZE, LEVELS, Int4

_TOKENS = 4096  # of a forward pass
_FITS = 3  # of a group's scale and lowest value to its levels, which are then nearest again
_TINY = 1e-8  # the smallest step


def nearest(weights: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return ((weights - low) / scale).round_().clamp_(0, LEVELS - 1)


def fitted(group: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, lowest value), each (out,), of weights (in group, out), near the least squared error.

    From the whole range on, levels and the best line through them by turns. `importance` (in group,) weighs the errors.
    """
    low, high = group.aminmax(dim=0)
    scale, share = ((high - low) / (LEVELS - 1)).clamp_min_(_TINY), importance / importance.sum()
    for _ in range(_FITS):
        levels = nearest(group, scale, low)
        middle, mean = share @ levels, share @ group
        centred = levels.sub_(middle)
        scale = ((share @ (centred * (group - mean))) / (share @ centred.square()).clamp_min_(_TINY)).clamp_min_(_TINY)
        low = mean - scale * middle
    return scale.bfloat16().float(), low.bfloat16().float()


def gptq(weight: Tensor, square: Tensor) -> Int4:
    """A weight (out, in) in 4 bits, for inputs with H `square` (in, in). Scales and lowest values are those of bf16.

    Without correlations between the inputs, all of them equally large, this is `fitted` for each group.
    """
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(square)), upper=True)
    diagonal = factor.diagonal()
    left = weight.T.float().clone(memory_format=torch.contiguous_format)  # of each input (in, out): what is still to be stored
    levels = torch.empty_like(left)
    scales, lows = left.new_empty(2, len(left) // GROUP_SIZE, len(weight))
    for number, start in enumerate(range(0, len(left), GROUP_SIZE)):
        stop = start + GROUP_SIZE
        block, errors = left[start:stop], torch.empty_like(left[start:stop])
        scales[number], lows[number] = scale, low = fitted(block, diagonal[start:stop].pow(-2))
        for place, column in enumerate(range(start, stop)):
            levels[column] = level = nearest(block[place], scale, low)
            errors[place] = error = (block[place] - (level * scale + low)) / diagonal[column]
            block[place + 1 :].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return Int4(levels.T.to(torch.uint8).contiguous(), scales.T.contiguous(), lows.T.contiguous())


@torch.no_grad()
def quantize(backend: TransformersBackend, texts: Tensor, report: Callable[[int], None]) -> dict[str, Int4]:
    """All projections and the head in 4 bits, by name, on texts (N, T). The projections of `backend` get their int4 values.

    `report` gets the number of layers that are done, the head being the last. The head of `backend` stays as it is: drafts
    have it in 8 bits.
    """
    states = [backend.embed(part) for part in torch.split(texts, max(1, _TOKENS // texts.shape[1]))]
    spec, weights = backend.own_spec, dict[str, Int4]()
    others = () if spec.architecture.mixer is None else spec.architecture.mixer.steps  # which no kernel has in low bits
    for index in range(backend.num_layers):
        layer, run = backend.layers[index], partial(backend.run_texts, start=index, stop=index + 1)
        for names, square in _squares(layer, run, states, others).items():
            matrices = [layer.get_parameter(f"{name}.weight") for name in names]
            joint, sizes = gptq(torch.cat(matrices), damped(square, texts.numel())), [*map(len, matrices)]
            for name, matrix, *part in zip(names, matrices, *(torch.split(part, sizes) for part in joint), strict=True):
                weights[f"{spec.layer_prefix(index)}{name}.weight"] = made = Int4(*part)
                matrix.copy_(made.weight)
        states = [run(hidden) for hidden in states]
        report(index + 1)
    square = sum(map(_square, map(backend.normed, states)), torch.zeros(spec.hidden, spec.hidden))
    weights[spec.head_name] = gptq(backend.model.get_parameter(spec.head_name), damped(square, texts.numel()))
    report(backend.num_layers + 1)
    return weights


def damped(square: Tensor, tokens: int) -> Tensor:
    """H of so many tokens over the mean of its diagonal, with more on it the fewer they are: H has the noise of the texts."""
    return square / square.diagonal().mean().clamp_min(_TINY) + len(square) / tokens * torch.eye(len(square))


def _square(inputs: Tensor) -> Tensor:
    wide = inputs.flatten(0, -2).float()
    return wide.T @ wide


def _squares(
    layer: nn.Module, run: Callable[[Tensor], Tensor], states: Sequence[Tensor], others: Sequence[str]
) -> dict[tuple[str, ...], Tensor]:
    """H by the names of the projections that share their inputs."""
    squares = dict[tuple[str, ...], Tensor]()
    for hidden in states:
        inputs = dict[str, Tensor]()

        def note(name: str, _: nn.Module, given: tuple[Tensor, ...], inputs: dict[str, Tensor] = inputs) -> None:
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
