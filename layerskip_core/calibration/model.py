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
from torch.optim.lr_scheduler import LambdaLR

from ..losses import summed_divergences
from ..model import TransformersBackend
from ..model.weights import LEVELS, Int4
from .gptq import Aim, Moments, descended, gptq

_TOKENS = 4096  # of a forward pass
_STEP_TOKENS = 2048  # of a step of the tuning
_RATE = 3e-4  # of the scales, as a share of them; lowest values move by five times as much, in steps
_WARMUP = 6  # steps
_DECAYS = (0.9, 0.99)  # of Adam
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
            moments = Moments(stage[0][1].in_features)
            for hidden, reference in zip(low, references, strict=True):
                with _recorded(stage[0][1], then_stop=True) as inputs, suppress(_Reached):
                    run(hidden)
                moments.add(inputs[0].flatten(0, -2), reference.flatten(0, -2))
            references.clear()
            joint = _quantized(torch.cat([module.weight for _, module in stage]), moments)
            sizes = [module.out_features for _, module in stage]
            split = zip(*(torch.split(part, sizes) for part in joint), strict=True)
            for (name, module), part in zip(stage, split, strict=True):
                weights[f"model.layers.{index}.{name}.weight"] = weight = Int4(*part)
                module.weight.copy_(weight.weight)
        low = [run(hidden) for hidden in low]
        report(index + 1)
    moments = Moments(backend.spec.hidden)
    for hidden, reference in zip(low, full, strict=True):
        moments.add(backend.normed(hidden).flatten(0, -2), backend.normed(reference).flatten(0, -2))
    head = backend.spec.head_name
    weights[head] = _quantized(backend.model.get_parameter(head), moments)
    report(backend.num_layers + 1)
    return Quantized(weights, torch.cat(full))


def _stages(layer: nn.Module, run: Callable[[], object]) -> list[list[tuple[str, nn.Linear]]]:
    """The projections of a layer with their names, in the order in which it uses them; those with one input together."""
    stages: list[list[tuple[str, nn.Linear]]] = []
    seen: list[object] = []  # the inputs of the stages
    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear):
                continue

            def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                assert isinstance(module, nn.Linear)
                if not seen or seen[-1] is not inputs[0]:
                    seen.append(inputs[0])
                    stages.append([])
                stages[-1].append((name, module))

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


def _quantized(weight: Tensor, moments: Moments) -> Int4:
    aim = Aim.of(weight, moments)
    return descended(gptq(aim), aim)


class Tuned:
    """A weight whose scale and lowest value are tuned: the first by a share of it, the middle level by steps of the scale."""

    def __init__(self, weight: Int4, parameter: Tensor) -> None:
        """`parameter` (out, in) gets the weight's values, and its gradients."""
        self._first, self._parameter = weight, parameter
        self.share, self.middle = torch.zeros_like(weight.scale), torch.zeros_like(weight.scale)

    @property
    def weight(self) -> Int4:
        levels, scale, low = self._first
        changed = (scale * (1 + self.share)).bfloat16().float()
        middle = low + scale * (_CENTRE + self.middle)
        return Int4(levels, changed, (middle - _CENTRE * changed).bfloat16().float())

    def take_gradients(self) -> None:
        """The gradients of both changes, from the gradient of the parameter."""
        assert self._parameter.grad is not None
        levels, scale, _ = self._first
        gradients = self._parameter.grad.float().view(*scale.shape, -1)
        centred = levels.view_as(gradients).float() - _CENTRE
        self.share.grad, self.middle.grad = (gradients * centred).sum(-1) * scale, gradients.sum(-1) * scale
        self._parameter.grad = None

    def apply(self) -> None:
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
    tuned = {
        name: Tuned(weight, backend.model.get_parameter(name).requires_grad_())
        for name, weight in quantized.weights.items()
        if name != head
    }
    groups = [
        {"params": [one.share for one in tuned.values()], "lr": _RATE},
        {"params": [one.middle for one in tuned.values()], "lr": 5 * _RATE},
    ]
    adam = torch.optim.Adam(groups, betas=_DECAYS, eps=1e-12)
    rate = LambdaLR(
        adam, lambda done: min(1.0, (done + 1) / _WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * (done + 1) / steps)))
    )
    positions = torch.arange(texts.shape[1])[None]
    for number, rows in enumerate(_batches(texts, steps, seed), start=1):
        hidden = backend.run_layers(backend.embed(texts[rows]), 0, backend.num_layers, positions)
        original = quantized.original[rows].flatten(0, 1)
        (total,), _ = summed_divergences(backend.unembed, [hidden.flatten(0, 1)], original, backend.spec.vocab)
        divergence = total / len(original)
        torch.autograd.backward(divergence)
        with torch.no_grad():
            for one in tuned.values():
                one.take_gradients()
            adam.step()
            rate.step()
            for one in tuned.values():
                one.apply()
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
