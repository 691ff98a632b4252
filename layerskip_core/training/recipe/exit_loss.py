"""The weights of the early-exit loss (LayerSkip section 4.1). The cross-entropy itself is in losses.py."""

import math
from collections.abc import Sequence

from ...config.training import ExitWeights


def exit_scales(num_layers: int, e_scale: float, kind: ExitWeights = "paper") -> list[float]:
    """e(l) for layer index l.

    paper: e_scale * (0 + 1 + ... + l), and (L-1) + e_scale * (0 + ... + L-2) for the last layer. Ours: e_scale * w(l + 1), and
    w(L) for the last layer, with w(n) = n (linear), sqrt(n) or 1 (uniform).
    """
    if kind != "paper":
        power = {"linear": 1.0, "sqrt": 0.5, "uniform": 0.0}[kind]
        return [*(e_scale * math.pow(layer, power) for layer in range(1, num_layers)), math.pow(num_layers, power)]
    scales = [e_scale * layer * (layer + 1) / 2 for layer in range(num_layers - 1)]
    last = num_layers - 1
    return [*scales, last + e_scale * last * (last - 1) / 2]


def exit_weights(exit_layers: Sequence[int], num_layers: int, e_scale: float, kind: ExitWeights = "paper") -> list[float]:
    """Normalised e~ of the exits that are on, in the order given; they sum to 1. A single exit has weight 1."""
    scales = exit_scales(num_layers, e_scale, kind)
    chosen = [scales[exit_layer - 1] for exit_layer in exit_layers]
    total = sum(chosen)
    return [scale / total for scale in chosen] if total else [1.0 / len(chosen)] * len(chosen)
