"""Tunes the scales and lowest values of int4 weights, with fixed levels, so that the whole model predicts as the original does.

This is the second phase of EfficientQAT (Chen et al., ACL 2025), with the Kullback-Leibler divergence from the original model's
predictions as the loss: it knows of errors that cancel out, or grow, in later layers.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..losses import summed_divergences
from ..model import GenericBackend
from ..model.low_bit import LEVELS, Int4
from .layers import Quantized

_TOKENS = 2048  # of a step
_RATE = 3e-4  # of the scales, as a share of them; lowest values move by five times as much, in steps
_WARMUP = 6  # steps
_MEAN_DECAY, _SQUARE_DECAY = 0.9, 0.99  # of Adam
_CENTRE = (LEVELS - 1) / 2  # a scale turns a group about its middle level, else it would also move it
Report = Callable[[int, float], None]  # steps that are done, and the divergence in nats a token


class Tuned:
    """One weight, its scale and its lowest value as they are tuned, and their state of Adam (Kingma and Ba, 2015)."""

    def __init__(self, weight: Int4, parameter: Tensor) -> None:
        """`parameter` (out, in) gets the weight's values, and its gradients."""
        self._first, self._parameter = weight, parameter
        self._change = torch.zeros(2, *weight.scale.shape)  # of the scale, as a share; of the middle level, in steps
        self._mean, self._square = torch.zeros_like(self._change), torch.zeros_like(self._change)

    @property
    def weight(self) -> Int4:
        levels, scale, low = self._first
        changed = (scale * (1 + self._change[0])).bfloat16().float()
        middle = low + scale * (_CENTRE + self._change[1])
        return Int4(levels, changed, (middle - _CENTRE * changed).bfloat16().float())

    def step(self, number: int, rate: float) -> None:
        """Step `number`, 1.., of Adam."""
        assert self._parameter.grad is not None
        levels, scale, _ = self._first
        gradients = self._parameter.grad.float().view(*scale.shape, -1)
        centred = levels.view_as(gradients).float() - _CENTRE
        gradient = torch.stack([(gradients * centred).sum(-1), gradients.sum(-1)]) * scale
        self._parameter.grad = None
        self._mean.lerp_(gradient, 1 - _MEAN_DECAY)
        self._square.lerp_(gradient.square(), 1 - _SQUARE_DECAY)
        mean, square = self._mean / (1 - _MEAN_DECAY**number), self._square / (1 - _SQUARE_DECAY**number)
        self._change -= torch.tensor([rate, 5 * rate]).view(2, 1, 1) * mean / (square.sqrt() + 1e-12)
        self._parameter.copy_(self.weight.weight)


def tune(
    backend: GenericBackend, quantized: Quantized, texts: Tensor, steps: int, seed: int, report: Report
) -> dict[str, Int4]:
    """All weights of `quantized`, those of the layers tuned on the texts (N, T) that they were made with.

    `backend` has the values of the quantised weights, and gets the tuned ones.
    """
    head = backend.spec.head_name
    backend.model.requires_grad_(False)
    tuned = {}
    for name, weight in quantized.weights.items():
        if name != head:
            tuned[name] = Tuned(weight, backend.model.get_parameter(name).requires_grad_())
    positions = torch.arange(texts.shape[1])[None]
    for number, rows in enumerate(_batches(texts, steps, seed), start=1):
        hidden = backend.run_layers(backend.embed(texts[rows]), 0, backend.num_layers, positions)
        original = quantized.original[rows].flatten(0, 1)
        (total,), _ = summed_divergences(backend.unembed, [hidden.flatten(0, 1)], original, backend.vocab_size)
        divergence = total / len(original)
        torch.autograd.backward(divergence)
        rate = _RATE * min(1.0, number / _WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * number / steps)) / 2)
        with torch.no_grad():
            for one in tuned.values():
                one.step(number, rate)
        report(number, float(divergence.detach()))
    return quantized.weights | {name: one.weight for name, one in tuned.items()}


def _batches(texts: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Numbers of texts, `steps` times; all texts come equally often."""
    size = min(len(texts), max(1, _TOKENS // texts.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(left) < size:
            left = torch.cat([left, torch.randperm(len(texts), generator=generator)])
        yield left[:size]
        left = left[size:]
