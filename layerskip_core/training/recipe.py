"""The LayerSkip recipe (Elhoushi et al., ACL 2024, section 4.1): what it does at each step, and the paper's settings.

All of it is a function of the step, so that a run is resumed without a history.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config.decoding import require_exit_layer
from ..config.training import Curriculum, DropoutProfile, ExitWeights, RecipeSettings, Regime
from ..errors import ConfigError, require

_MIX = 1_000_003
_LARGE_VOCABULARY = 8192
_SMALL_MODEL = 50_000_000  # parameters; the paper's learning rates are for models of 1B and more
_LEARNING_RATES = {"finetune": 1e-4, "continual": 3e-5, "scratch": 8e-4, "code": 1e-4}
_SMALL_LEARNING_RATES = {"finetune": 5e-4, "continual": 2e-4, "scratch": 2e-3, "code": 5e-4}
_LENGTHS = {"finetune": 512, "continual": 2048, "scratch": 2048, "code": 2048}


@dataclass(frozen=True)
class Recipe:
    """The recipe of a run: RecipeSettings with all defaults resolved."""

    p_max: float = 0.2
    dropout_profile: DropoutProfile = "exponential"
    e_scale: float = 1.0
    exit_weights: ExitWeights = "paper"
    curriculum: Curriculum = "rotational"
    rotation: int = 0  # R of the rotational curriculum; 0 for the others
    exits: tuple[int, ...] = ()  # the exit layers that the curriculum chooses among, ascending; empty for all L
    distill: float = 0.0


NO_EXITS = Recipe(p_max=0.0, e_scale=0.0, curriculum="none")


@dataclass(frozen=True)
class RunStep:
    """Where in the run a forward pass is: everything random or scheduled in the recipe is a function of it."""

    done: int  # optimizer steps
    total: int
    first_row: int = 0  # index of the batch's first row among all rows of the step


def recipe_preset(regime: Regime, parameters: int) -> dict[str, Any]:
    """The fields of the paper's recipe for a regime and a model of that many parameters (LayerSkip tables 1 and 2).

    Where the paper gives R = L-1 (23, 31 and 39 for 24, 32 and 40 layers), R is left to its default, which is L-1 for a
    vocabulary above 8k. For tasks the paper uses the gradual curriculum, which trains every exit on every step of its second
    half; the rotational curriculum costs a fraction of that.
    """
    if regime == "continual":  # Llama2-7B; Llama2-13B; Llama3.2-1B and Llama3-8B
        if parameters >= 10e9:
            return {"p_max": 0.1, "e_scale": 0.1}
        return {"p_max": 0.1, "e_scale": 0.2 if 3e9 <= parameters < 7.5e9 else 0.1, "rotation": 8}
    if regime == "scratch":  # 1.5B; 7B
        return {"p_max": 0.1 if parameters < 4e9 else 0.2, "e_scale": 0.2}
    if regime == "code":  # Llama1-7B
        return {"p_max": 0.1, "e_scale": 1.0, "rotation": 16}
    return {"p_max": 0.2, "e_scale": 1.0}  # TOPv2, 1.5B


def learning_rate(regime: Regime, parameters: int) -> float:
    """The initial learning rate of a regime: the paper's, or a higher one for models under 50M parameters."""
    if regime == "continual" and parameters >= 10e9:
        return 2e-5
    return (_SMALL_LEARNING_RATES if parameters < _SMALL_MODEL else _LEARNING_RATES)[regime]


def sequence_length(asked: int | None, regime: Regime, context: int) -> int:
    """Tokens per row: what was asked for, or 512 for tasks and 2048 for plain text (our values: the paper's table has none),
    within the context. Raises ConfigError above it.
    """
    fits = asked is None or asked <= context
    require(fits, "max_length", f"at most the model's context of {context} tokens", asked)
    return min(_LENGTHS[regime], context) if asked is None else asked


def resolve_recipe(asked: RecipeSettings, regime: Regime, parameters: int, num_layers: int, vocab_size: int) -> Recipe:
    """What was asked, else the regime's preset, for a model of L layers.

    R is by default n-1 of n exits for a vocabulary above 8k, where each extra exit costs a head, and n/3 below.

    Raises ConfigError for settings that the curriculum does not use, and for early exits that all weigh nothing.
    """
    given = {name: value for name, value in vars(asked).items() if value is not None}
    recipe = Recipe(**recipe_preset(regime, parameters) | given)
    for exit_layer in recipe.exits:
        require_exit_layer(exit_layer, num_layers, field="exits")
    if recipe.curriculum == "none":
        for name in ("exits", "distill"):
            require(not getattr(recipe, name), name, "left out with `curriculum` none", getattr(recipe, name))
    else:
        require(recipe.e_scale > 0, "e_scale", "above 0 unless `curriculum` is none", recipe.e_scale)
        scales = exit_scales(num_layers, recipe.e_scale, recipe.exit_weights)
        weighs = not recipe.exits or any(scales[exit_layer - 1] > 0 for exit_layer in recipe.exits)
        needed = f"exits that `exit_weights` {recipe.exit_weights} gives a weight above 0"
        require(weighs, "exits", needed, ",".join(map(str, recipe.exits)))
    rotation = 0
    if recipe.curriculum == "rotational":
        count = len(recipe.exits) or num_layers
        rotation = recipe.rotation or max(1, count - 1 if vocab_size > _LARGE_VOCABULARY else count // 3)
    return replace(recipe, rotation=rotation, exits=tuple(sorted(recipe.exits)))


def depth_scale(layer: int, num_layers: int) -> float:
    """D(l) = exp(l ln2 / (L-1)) - 1 for layer index l: 0 at the first layer, 1 at the last."""
    if num_layers < 2:
        raise ConfigError(f"layer dropout needs at least 2 layers, got {num_layers}")
    return math.exp(layer * math.log(2) / (num_layers - 1)) - 1


def time_scale(step: int, total_steps: int, from_scratch: bool) -> float:
    """S(t): 1 for an existing checkpoint; exp(t ln2 / (T-1)) - 1 for training from scratch."""
    if not from_scratch:
        return 1.0
    require(total_steps > 1, "steps", "at least 2 to train from scratch with layer dropout", total_steps)
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


def exits_on(recipe: Recipe, step: int, total_steps: int, num_layers: int) -> tuple[int, ...]:
    """Exit layers (counts, 1..L, ascending) whose loss is on at optimizer step `step` of `total_steps`.

    Over the recipe's n exits (all L layers unless it names some). rotational: index i is on when i % R == step % R. gradual:
    when 2*n*step >= T*(n - i), from the last exit down, one more every T/(2n) steps. The last layer is always on: taken
    literally, the paper's rotation would train it on one step in R.
    """
    exits = recipe.exits or tuple(range(1, num_layers + 1))
    count = len(exits)
    chosen: Sequence[int] = ()
    if recipe.curriculum == "rotational":
        chosen = [exit_layer for i, exit_layer in enumerate(exits) if i % recipe.rotation == step % recipe.rotation]
    elif recipe.curriculum == "gradual":
        chosen = [exit_layer for i, exit_layer in enumerate(exits) if 2 * count * step >= total_steps * (count - i)]
    elif recipe.curriculum == "all":
        chosen = exits
    return tuple(sorted({*chosen, num_layers}))


def mean_exits(recipe: Recipe, total_steps: int, num_layers: int) -> float:
    """Heads computed per step, averaged over the run, the last layer's included: what the curriculum costs."""
    sampled = range(0, total_steps, max(1, total_steps // 1000))
    counts = [len(exits_on(recipe, step, total_steps, num_layers)) for step in sampled]
    return sum(counts) / len(counts)
