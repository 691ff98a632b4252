"""Quantises a model layer by layer: each layer's inputs come from the layers before it as they are already quantised."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..model import GenericBackend
from ..model.low_bit import Int4
from .descent import descended
from .gptq import Aim, Moments, gptq

_TOKENS = 4096  # of a forward pass
Report = Callable[[int], None]  # layers that are done, the head being the last


@dataclass(frozen=True)
class Quantized:
    """int4 weights by name, and the hidden states (N, T, D) of the original model after its last layer."""

    weights: dict[str, Int4]
    original: Tensor


@torch.no_grad()
def quantize(backend: GenericBackend, texts: Tensor, report: Report) -> Quantized:
    """GPTQ of all projections and of the head, on texts (N, T). The projections of `backend` get their int4 values.

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


def _quantized_head(backend: GenericBackend, low: list[Tensor], full: list[Tensor]) -> Int4:
    moments = Moments.zero(backend.hidden_size)
    for hidden, reference in zip(low, full, strict=True):
        moments.add(backend.normed(hidden).flatten(0, -2), backend.normed(reference).flatten(0, -2))
    return _quantized(backend.model.get_parameter(backend.spec.head_name), moments)


def _quantized(weight: Tensor, moments: Moments) -> Int4:
    aim = Aim.of(weight, moments)
    return descended(gptq(aim), aim)
