"""A model in 4 bits: quantised layer by layer, then tuned as a whole.

Each layer's inputs come from the layers before it as they are already quantised. The tuning moves scales and lowest values,
with fixed levels, so that the whole model predicts as the original does. It is the second phase of EfficientQAT (Chen et al.,
ACL 2025), with the Kullback-Leibler divergence from the original model's predictions as the loss, which knows of errors that
cancel out, or grow, in later layers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..losses import summed_divergences
from ..model import TransformersBackend
from ..model.low_bit import LEVELS, Int4
from .gptq import Aim, Moments, descended, gptq

_TOKENS = 4096  # of a forward pass
_STEP_TOKENS = 2048  # of a step of the tuning
_RATE = 3e-4  # of the scales, as a share of them; lowest values move by five times as much, in steps
_WARMUP = 6  # steps
_MEAN_DECAY, _SQUARE_DECAY = 0.9, 0.99  # of Adam
_CENTRE = (LEVELS - 1) / 2  # a scale turns a group about its middle level, else it would also move it


@dataclass(frozen=True)
class Quantized:
    """int4 weights by name, and the hidden states (N, T, D) of the original model after its last layer."""

    weights: dict[str, Int4]
    original: Tensor


@torch.no_grad()
def quantize(backend: TransformersBackend, texts: Tensor, report: Callable[[int], None]) -> Quantized:
    """GPTQ of all projections and of the head, on texts (N, T). The projections of `backend` get their int4 values.
    `report` gets the number of layers that are done, the head being the last.

    The head of `backend` stays as it is, because low-bit drafts have it in 8 bits.
    """
    parts = torch.split(texts, max(1, _TOKENS // texts.shape[1]))
    low = [backend.embed(part) for part in parts]  # hidden states of the quantised layers
    full = list(low)  # and of the original ones
    positions = torch.arange(texts.shape[1])[None]
    weights: dict[str, Int4] = {}
    for index in range(backend.num_layers):

        def run(hidden: Tensor, index: int = index) -> Tensor:
            return backend.run_layer(index, hidden, backend.prepare(hidden, positions))

        stages = _stages(backend.layers[index], partial(run, low[0]))
        with ExitStack() as hooks:
            originals = [hooks.enter_context(_recorded(stage[0][1])) for stage in stages]
            full = [run(hidden) for hidden in full]
        for stage, references in zip(stages, originals, strict=True):
            moments = Moments.zero(stage[0][1].in_features)
            for hidden, reference in zip(low, references, strict=True):
                with _recorded(stage[0][1], then_stop=True) as inputs, suppress(_Reached):
                    run(hidden)
                moments.add(inputs[0].flatten(0, -2), reference.flatten(0, -2))
            references.clear()
            made = _split(_quantized(torch.cat([module.weight for _, module in stage]), moments), stage)
            for (name, module), weight in zip(stage, made, strict=True):
                module.weight.copy_(weight.weight)
                weights[f"model.layers.{index}.{name}.weight"] = weight
        low = [run(hidden) for hidden in low]
        report(index + 1)
    weights[backend.spec.head_name] = _quantized_head(backend, low, full)
    report(backend.num_layers + 1)
    return Quantized(weights, torch.cat(full))


_Stage = list[tuple[str, nn.Linear]]  # projections, by name in their layer, that have the same input


def _stages(layer: nn.Module, run: Callable[[], object]) -> list[_Stage]:
    """The projections of a layer in the order in which it uses them."""
    stages: list[_Stage] = []
    seen: list[object] = []  # the inputs of the stages
    names = {module: name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        if not seen or seen[-1] is not inputs[0]:
            seen.append(inputs[0])
            stages.append([])
        stages[-1].append((names[module], module))

    with ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_pre_hook(note).remove)
        run()
    return stages


class _Reached(Exception):
    """Ends a pass whose rest is not needed."""


@contextmanager
def _recorded(module: nn.Module, then_stop: bool = False) -> Iterator[list[Tensor]]:
    """The inputs of a module, pass by pass."""
    inputs: list[Tensor] = []

    def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs.append(given[0])
        if then_stop:
            raise _Reached

    hook = module.register_forward_pre_hook(note)
    try:
        yield inputs
    finally:
        hook.remove()


def _split(joint: Int4, stage: _Stage) -> list[Int4]:
    """The weights of a stage's projections, which were quantised as one."""
    sizes = [module.out_features for _, module in stage]
    parts = zip(*(torch.split(part, sizes) for part in joint), strict=True)
    return [Int4(*part) for part in parts]


def _quantized_head(backend: TransformersBackend, low: list[Tensor], full: list[Tensor]) -> Int4:
    moments = Moments.zero(backend.hidden_size)
    for hidden, reference in zip(low, full, strict=True):
        moments.add(backend.normed(hidden).flatten(0, -2), backend.normed(reference).flatten(0, -2))
    return _quantized(backend.model.get_parameter(backend.spec.head_name), moments)


def _quantized(weight: Tensor, moments: Moments) -> Int4:
    aim = Aim.of(weight, moments)
    return descended(gptq(aim), aim)


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
    backend: TransformersBackend,
    quantized: Quantized,
    texts: Tensor,
    steps: int,
    seed: int,
    report: Callable[[int, float], None],
) -> dict[str, Int4]:
    """All weights of `quantized`, those of the layers tuned on the texts (N, T) that they were made with.
    `report` gets the number of steps that are done, and the divergence in nats per token.

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
    size = min(len(texts), max(1, _STEP_TOKENS // texts.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(left) < size:
            left = torch.cat([left, torch.randperm(len(texts), generator=generator)])
        yield left[:size]
        left = left[size:]
