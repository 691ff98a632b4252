"""A model in 4 bits: quantised layer by layer, then tuned as a whole.

Each layer's inputs come from the layers before it as they are already quantised. The tuning moves scales and lowest values,
with fixed levels, so that the whole model predicts as the original does. It is the second phase of EfficientQAT (Chen et al.,
ACL 2025), with the Kullback-Leibler divergence from the original model's predictions as the loss, which knows of errors that
cancel out, or grow, in later layers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..losses import summed_divergences
from ..model import TransformersBackend
from ..model.weights import Int4
from .gptq import CENTRE, Aim, Moments, descended

_TOKENS = 4096  # of a forward pass
_STEP_TOKENS = 2048  # of a step of the tuning
_RATE = 3e-4  # of the scales, as a share of them; lowest values move by five times as much, in steps
_WARMUP = 6  # steps
_DECAYS = (0.9, 0.99)  # of Adam


@torch.no_grad()
def quantize(backend: TransformersBackend, texts: Tensor, report: Callable[[int], None]) -> tuple[dict[str, Int4], Tensor]:
    """GPTQ of all projections and of the head, on texts (N, T). The projections of `backend` get their int4 values.

    `report` gets the number of layers that are done, the head being the last. Returns the weights by name, and the states
    (N, T, D) of the original model after its last layer. The head of `backend` stays as it is: drafts have it in 8 bits.
    """
    parts = torch.split(texts, max(1, _TOKENS // texts.shape[1]))
    low = [backend.embed(part) for part in parts]  # hidden states of the quantised layers
    full = list(low)  # and of the original ones
    weights: dict[str, Int4] = {}
    for index in range(backend.num_layers):
        made, low, full = _quantized_layer(backend, index, low, full)
        weights |= {f"model.layers.{index}.{name}.weight": weight for name, weight in made.items()}
        report(index + 1)
    moments = Moments(backend.spec.hidden)
    for hidden, original in zip(low, full, strict=True):
        moments.add(backend.normed(hidden), backend.normed(original))
    head = backend.spec.head_name
    weights[head] = descended(Aim.of(backend.model.get_parameter(head), moments))
    report(backend.num_layers + 1)
    return weights, torch.cat(full)


def _quantized_layer(
    backend: TransformersBackend, index: int, low: list[Tensor], full: list[Tensor]
) -> tuple[dict[str, Int4], list[Tensor], list[Tensor]]:
    """(int4 weights by name, states after the quantised layer, states after the original layer)."""
    layer, positions = backend.layers[index], torch.arange(low[0].shape[1])[None]

    def run(hidden: Tensor) -> Tensor:
        return backend.run_layer(index, hidden, backend.prepare(hidden, positions))

    originals, after = zip(*(_inputs(layer, run, hidden) for hidden in full), strict=True)
    stages: dict[int, list[str]] = {}  # projections with one input, in the order in which the layer uses them
    for name, given in originals[0].items():
        stages.setdefault(id(given), []).append(name)
    made = {}
    for names in stages.values():
        matrices: list[Tensor] = [layer.get_parameter(f"{name}.weight") for name in names]
        moments = Moments(originals[0][names[0]].shape[-1])
        for hidden, original in zip(low, originals, strict=True):
            found, _ = _inputs(layer, run, hidden, names[0])
            moments.add(found[names[0]], original[names[0]])
        joint = descended(Aim.of(torch.cat(matrices), moments))
        sizes = list(map(len, matrices))
        for name, matrix, *part in zip(names, matrices, *(torch.split(part, sizes) for part in joint), strict=True):
            made[name] = Int4(*part)
            matrix.copy_(made[name].weight)
    return made, [run(hidden) for hidden in low], list(after)


class _Reached(Exception):
    """Ends a pass whose rest is not needed."""


def _inputs(
    layer: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor, last: str | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """(the inputs of a layer's projections in a pass, by name, in the order of use; its output). The pass ends at `last`."""
    found: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[name] = given[0]
        if name == last:
            raise _Reached

    linear = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in linear]
    try:
        return found, run(hidden)
    except _Reached:
        return found, None
    finally:
        for hook in hooks:
            hook.remove()


class Tuned:
    """A weight whose scale and lowest value are tuned: the first by a share of it, the middle level by steps of the scale.

    (A scale turns a group about its middle level, else it would also move it.)
    """

    def __init__(self, weight: Int4, parameter: Tensor) -> None:
        """`parameter` (out, in) gets the weight's values, and its gradients."""
        self._first, self._parameter = weight, parameter
        self.share, self.middle = torch.zeros_like(weight.scale), torch.zeros_like(weight.scale)

    @property
    def weight(self) -> Int4:
        levels, scale, low = self._first
        changed = (scale * (1 + self.share)).bfloat16().float()
        middle = low + scale * (CENTRE + self.middle)
        return Int4(levels, changed, (middle - CENTRE * changed).bfloat16().float())

    def take_gradients(self) -> None:
        """The gradients of both changes, from the gradient of the parameter."""
        assert self._parameter.grad is not None
        levels, scale, _ = self._first
        gradients = self._parameter.grad.float().view(*scale.shape, -1)
        centred = levels.view_as(gradients).float() - CENTRE
        self.share.grad, self.middle.grad = (gradients * centred).sum(-1) * scale, gradients.sum(-1) * scale
        self._parameter.grad = None

    def apply(self) -> None:
        self._parameter.copy_(self.weight.weight)


def tune(
    backend: TransformersBackend,
    quantized: Mapping[str, Int4],
    original: Tensor,
    texts: Tensor,
    steps: int,
    seed: int,
    report: Callable[[int, float], None],
) -> dict[str, Int4]:
    """All weights of `quantized`, those of the layers tuned on the texts (N, T) that they were made with.

    `original` (N, T, D) are the states of the original model. `backend` has the values of the quantised weights, and gets the
    tuned ones. `report` gets the number of steps that are done, and the divergence in nats per token.
    """
    backend.model.requires_grad_(False)
    tuned = {
        name: Tuned(weight, backend.model.get_parameter(name).requires_grad_())
        for name, weight in quantized.items()
        if name != backend.spec.head_name
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
        hidden = backend.run_layers(backend.embed(texts[rows]), 0, backend.num_layers, positions).flatten(0, 1)
        (total,), _ = summed_divergences(backend.unembed, [hidden], original[rows].flatten(0, 1), backend.spec.vocab)
        divergence = total / len(hidden)
        torch.autograd.backward(divergence)
        with torch.no_grad():
            for one in tuned.values():
                one.take_gradients()
            adam.step()
            rate.step()
            for one in tuned.values():
                one.apply()
        report(number, float(divergence.detach()))
    return {**quantized, **{name: one.weight for name, one in tuned.items()}}


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
