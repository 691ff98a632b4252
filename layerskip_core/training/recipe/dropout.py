"""Layer dropout: which rows skip which layer. The rate grows with depth (LayerSkip section 4.1), or is constant over it."""

import math

import torch
from torch import Tensor

from ...config.training import DropoutProfile
from ...errors import ConfigError
from ...model import GenericBackend, SpanInputs

_MIX = 1_000_003


def depth_scale(layer: int, num_layers: int) -> float:
    """D(l) = exp(l ln2 / (L-1)) - 1 for layer index l: 0 at the first layer, 1 at the last."""
    if num_layers < 2:
        raise ConfigError(f"layer dropout needs at least 2 layers, got {num_layers}")
    return math.exp(layer * math.log(2) / (num_layers - 1)) - 1


def time_scale(step: int, total_steps: int, from_scratch: bool) -> float:
    """S(t): 1 for an existing checkpoint; exp(t ln2 / (T-1)) - 1 for training from scratch."""
    if not from_scratch:
        return 1.0
    if total_steps < 2:
        raise ConfigError(f"`steps` must be at least 2 to train from scratch with layer dropout, got {total_steps}")
    return math.exp(step * math.log(2) / (total_steps - 1)) - 1


def dropout_rates(p_max: float, num_layers: int, scale: float = 1.0, profile: DropoutProfile = "exponential") -> list[float]:
    """p(l, t) = S(t) D(l) p_max for each layer index; `scale` is S(t).

    With the profile "constant", every layer has the mean of these rates: the comparison of LayerSkip's figure 12.
    """
    if p_max == 0:
        return [0.0] * num_layers
    rates = [scale * depth_scale(layer, num_layers) * p_max for layer in range(num_layers)]
    return rates if profile == "exponential" else [sum(rates) / num_layers] * num_layers


def kept_rows(rate: float, batch_size: int, seed: int, step: int, first_row: int, layer: int) -> list[int]:
    """Indices of the batch rows that run a layer. `first_row`: index of the first of them among the rows of the whole
    optimizer step, over processes and micro-batches.

    Each row's draw depends on (seed, step, its index in the step, layer) alone. So the same rows are dropped however a step is
    divided, and where a run is resumed or a layer recomputed.
    """
    if rate == 0:
        return list(range(batch_size))
    generator = torch.Generator().manual_seed(((seed * _MIX + step) * _MIX**2 + layer) % (1 << 63))
    draws = torch.rand(first_row + batch_size, generator=generator).tolist()
    return [row for row, draw in enumerate(draws[first_row:]) if draw >= rate]


def run_layer_on(backend: GenericBackend, layer: int, hidden: Tensor, inputs: SpanInputs, kept: list[int]) -> Tensor:
    """Runs a layer on the kept rows of (B, T, D) only and scatters them back; the other rows skip it unchanged.

    If no row is kept, the layer runs on one row times zero: its parameters need a gradient in every process (DDP, FSDP2).
    """
    if len(kept) == hidden.shape[0]:
        return backend.run_layer(layer, hidden, inputs)
    index = torch.tensor(kept or [0], device=hidden.device)
    selected = hidden.index_select(0, index)
    output = backend.run_layer(layer, selected, inputs.rows(index))
    if not kept:
        output = selected + 0.0 * output
    return hidden.index_copy(0, index, output.to(hidden.dtype))
