"""The LayerSkip recipe (Elhoushi et al., ACL 2024, section 4.1) as functions of the step, and the
paper's settings.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config.resolution import require_exit_layer
from ..config.training import (
    Curriculum,
    DropoutProfile,
    DropoutSchedule,
    ExitReader,
    ExitWeights,
    Preset,
    RecipeSettings,
)
from ..errors import ConfigError, require
from ..model.spec import AnySpec, ModelSpec
from ..model.vocabulary import exit_vocabulary

_LARGE_VOCABULARY = 8192
SMALL_MODEL = 50_000_000  # parameters; the paper's learning rates are for models of 1B and more
_LEARNING_RATES = {"continual": 3e-5, "scratch": 8e-4}  # else 1e-4
_SMALL_LEARNING_RATES = {"continual": 2e-4, "scratch": 2e-3}  # else 5e-4
TEXT_PRESETS: tuple[Preset, ...] = ("continual", "scratch", "code")  # for plain text, in long rows
# An exit counts as trained after so many steps, or after all steps of a shorter run
STEPS_TO_COUNT_AS_TRAINED = 100
SHORT_RUN_STEPS = 300  # up to here dropout gained nothing where it was measured
# From here on the last layer can win back what dropout and the exits' gradient cost: `auto` uses
# dropout, and its exits train all layers below
LONG_RUN_STEPS = 1000
_LEAST_GRADIENT = 0.3  # share of the exits' gradient in short runs of `auto`


@dataclass(frozen=True)
class Recipe:
    """The recipe of a run: RecipeSettings with all defaults resolved."""

    preset: Preset = "finetune"
    p_max: float = 0.2
    dropout_schedule: DropoutSchedule = "constant"
    dropout_profile: DropoutProfile = "exponential"
    e_scale: float = 1.0
    exit_weights: ExitWeights = "paper"
    curriculum: Curriculum = "rotational"
    rotation: int = 0  # R of the rotational curriculum; 0 for the others
    # The exit layers that the curriculum chooses among, ascending; empty for all L
    exits: tuple[int, ...] = ()
    exit_reader: ExitReader = "none"
    distill: float = 0.0
    # Share of the gradient of the exits' losses that trains the layers below the exits
    exit_gradient: float = 1.0
    exit_vocab: int = 0  # the most frequent tokens that the exits' losses score; 0: all tokens


@dataclass(frozen=True)
class RunStep:
    """Where in the run a forward pass is: everything random or scheduled in the recipe is a
    function of it.
    """

    done: int  # optimizer steps
    total: int
    first_row: int = 0  # index of the batch's first row among all rows of the step


def recipe_preset(
    preset: Preset, spec: AnySpec, steps: int, has_blocks: bool = True
) -> dict[str, Any]:
    """The fields of a recipe: the paper's by parameters (LayerSkip tables 1 and 2; R = L-1 is our
    default), or ours, `auto`. `has_blocks`: whether its exits have exit blocks.
    """
    parameters = spec.parameters
    if preset == "none" or (preset == "auto" and spec.layers == 1):
        return {"p_max": 0.0, "e_scale": 0.0, "curriculum": "none"}
    if preset == "auto":
        return {
            # In shorter runs dropout costs exact match, and exits agree as often without
            "p_max": 0.1 if steps >= LONG_RUN_STEPS else 0.0,
            "dropout_schedule": "falling",
            "e_scale": 0.2,
            "exit_weights": "uniform",
            "curriculum": "all",
            "exits": auto_exits(spec.layers, steps),
            "exit_reader": "block" if spec.block_shapes and has_blocks else "none",
            "distill": 0.5,
        }
    if preset == "continual":  # Llama2-7B; Llama2-13B; Llama3.2-1B and Llama3-8B
        if parameters >= 10e9:
            return {"p_max": 0.1, "e_scale": 0.1}
        return {"p_max": 0.1, "e_scale": 0.2 if 3e9 <= parameters < 7.5e9 else 0.1, "rotation": 8}
    if preset == "scratch":  # 1.5B; 7B
        return {
            "p_max": 0.1 if parameters < 4e9 else 0.2,
            "e_scale": 0.2,
            "dropout_schedule": "rising",
        }
    if preset == "code":  # Llama1-7B
        return {"p_max": 0.1, "e_scale": 1.0, "rotation": 16}
    return {"p_max": 0.2, "e_scale": 1.0}  # TOPv2, 1.5B


def auto_exits(num_layers: int, steps: int) -> tuple[int, ...]:
    """The exits of the preset auto: after a third of the layers and, in runs that can train two, a
    fifth.
    """
    exits = {max(1, num_layers // 3)}
    if steps >= STEPS_TO_COUNT_AS_TRAINED:
        exits.add(max(1, num_layers // 5))
    return tuple(sorted(exits))


def learning_rate(preset: Preset, parameters: int, is_lora: bool = False) -> float:
    """The highest learning rate: the paper's for its presets, or a higher one for models under 50M
    parameters; else ours.

    Two were measured: 5e-5 on SmolLM2 (135M) and 5e-6 on Qwen2.5-Coder (0.6B), where 3e-5 cost a
    third of pass@1 (examples/LOG.md). A power of the size joins them; smaller and larger models take
    the nearer one. LoRA takes ten times as much (Schulman et al., LoRA Without Regret, 2025).
    """
    if preset == "continual" and parameters >= 10e9:
        return 2e-5
    if parameters < SMALL_MODEL:
        return _SMALL_LEARNING_RATES.get(preset, 5e-4)
    if preset in ("auto", "none"):
        base = 5e-4 if is_lora else 5e-5
        scale = min(1.0, max(0.1, (135e6 / parameters) ** 1.5))
        return float(f"{base * scale:.1e}")
    return _LEARNING_RATES.get(preset, 1e-4)


def resolve_recipe(
    settings: RecipeSettings,
    spec: AnySpec,
    steps: int,
    has_blocks: bool = True,
    is_sharded: bool = False,
) -> Recipe:
    """The requested settings, completed by the preset for this model and number of steps.

    Raises ConfigError for unused settings, exits without any weight, and dropout in a model of one
    layer or a run of one step. Without `has_blocks` the preset gives exits no blocks;
    with `is_sharded` their losses score all tokens.
    """
    given = {name: value for name, value in vars(settings).items() if value is not None}
    preset = recipe_preset(settings.preset, spec, steps, has_blocks)
    if settings.curriculum == "none":
        preset |= {"exits": (), "exit_reader": "none", "distill": 0.0}
    fields = preset | given
    if settings.preset == "auto" and fields.get("exit_reader") == "block":
        fields.setdefault("exit_gradient", exit_gradient(steps))
        if can_score_a_part(spec) and not is_sharded:
            fields.setdefault("exit_vocab", exit_vocabulary(spec.vocab))
    recipe = Recipe(**fields)
    for exit_layer in recipe.exits:
        require_exit_layer(exit_layer, spec.layers, field="exits")
    if recipe.curriculum == "none":
        _require_no_exits(recipe, settings)
    else:
        _require_trained_exits(recipe, spec.layers)
    if recipe.exit_vocab:
        can = recipe.exit_reader == "block" and can_score_a_part(spec)
        needed = "0 without `exit_reader` block, and for heads that change their products"
        require(can, "exit_vocab", needed, recipe.exit_vocab)
    if recipe.p_max:  # raises ConfigError for a layer or a step too few
        time_scale(0, steps, recipe.dropout_schedule)
        depth_scale(0, spec.layers)
    rotation = 0
    if recipe.curriculum == "rotational":
        rotation = recipe.rotation or _usual_rotation(len(recipe.exits) or spec.layers, spec.vocab)
    return replace(recipe, rotation=rotation, exits=tuple(sorted(recipe.exits)))


def can_score_a_part(spec: AnySpec) -> bool:
    """Whether rows of the head's weight give the logits of their tokens."""
    return isinstance(spec, ModelSpec) and spec.has_plain_head


def _require_no_exits(recipe: Recipe, settings: RecipeSettings) -> None:
    needed = "left out with `curriculum` none"
    require(not recipe.exits, "exits", needed, recipe.exits)
    require(not recipe.distill, "distill", needed, recipe.distill)
    require(settings.exit_gradient is None, "exit_gradient", needed, settings.exit_gradient)
    reader = recipe.exit_reader
    require(reader == "none", "exit_reader", "none with `curriculum` none", reader)


def _require_trained_exits(recipe: Recipe, num_layers: int) -> None:
    """Raises ConfigError for settings that would train no early exit."""
    trains = recipe.exit_gradient > 0 or recipe.exit_reader == "block"
    needed = "above 0 without `exit_reader` block: an exit has no weights of its own"
    require(trains, "exit_gradient", needed, recipe.exit_gradient)
    needed = "above 0 unless `curriculum` is none"
    require(recipe.e_scale > 0, "e_scale", needed, recipe.e_scale)
    if not recipe.exits:
        reader = recipe.exit_reader
        require(reader == "none", "exit_reader", "none without `exits`", reader)
        return
    scales = exit_scales(num_layers, recipe.e_scale, recipe.exit_weights)
    weighs = any(scales[exit_layer - 1] > 0 for exit_layer in recipe.exits)
    needed = f"exits that `exit_weights` {recipe.exit_weights} gives a weight above 0"
    require(weighs, "exits", needed, ",".join(map(str, recipe.exits)))


def _usual_rotation(exits: int, vocab: int) -> int:
    """R: n-1 for n exits if the vocabulary is above 8k, where an exit's head is expensive, else
    n/3.
    """
    return max(1, exits - 1 if vocab > _LARGE_VOCABULARY else exits // 3)


def depth_scale(layer: int, num_layers: int) -> float:
    """D(l) = exp(l ln2 / (L-1)) - 1 for layer index l: 0 at the first layer, 1 at the last."""
    if num_layers < 2:
        raise ConfigError(f"layer dropout needs at least 2 layers, got {num_layers}")
    return math.exp(layer * math.log(2) / (num_layers - 1)) - 1


def exit_gradient(total_steps: int) -> float:
    """The share of the gradient of the exits' losses that `auto` lets train the layers below exits
    with exit blocks.

    It rises to 1 at 1,000 steps. In 300 steps of `embedded-base` a share of 0 cost 0.6 points of
    exact match, 0.3 cost 1.3 and 1 cost 3.4; drafts of exit 8 gave 1.45, 1.53 and 1.57 times the
    speed.
    """
    return min(1.0, max(_LEAST_GRADIENT, total_steps / LONG_RUN_STEPS))


def dropout_steps(total_steps: int) -> int:
    """The number of steps over which falling dropout reaches 0: a share of sqrt(T) / 100 of T
    steps, at most a third.

    This is a tenth of 100 steps, a sixth of 300, a quarter of 600 and a third from 1,111 on.
    """
    share = min(1 / 3, math.sqrt(total_steps) / 100)
    return max(1, round(share * total_steps))


def time_scale(step: int, total_steps: int, schedule: DropoutSchedule = "constant") -> float:
    """S(t): 1, constant, for an existing checkpoint; exp(t ln2 / (T-1)) - 1, rising, for training
    from scratch (the paper).

    Ours, falling: from 1 to 0 over `dropout_steps`; later steps win back what dropout costs the
    last layer.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "falling":
        return max(0.0, 1 - step / dropout_steps(total_steps))
    require(
        total_steps > 1, "steps", "at least 2 to train from scratch with layer dropout", total_steps
    )
    return math.exp(step * math.log(2) / (total_steps - 1)) - 1


def dropout_rates(
    p_max: float, num_layers: int, scale: float = 1.0, profile: DropoutProfile = "exponential"
) -> list[float]:
    """p(l, t) = S(t) D(l) p_max for each layer index, `scale` = S(t); "constant": their mean
    (LayerSkip's figure 12).
    """
    if p_max == 0:
        return [0.0] * num_layers
    rates = [scale * depth_scale(layer, num_layers) * p_max for layer in range(num_layers)]
    if profile == "constant":
        return [sum(rates) / num_layers] * num_layers
    return rates


def kept_rows(
    rate: float, batch_size: int, seed: int, step: int, first_row: int, layer: int
) -> list[int]:
    """Indices of the batch rows that run a layer. `first_row`: index of the first row in the whole
    optimizer step.

    Draws depend on (seed, step, index in the step, layer) alone, not on how a step is divided over
    processes, and repeat where a run is resumed or a layer recomputed.
    """
    if rate == 0:
        return list(range(batch_size))
    generator = torch.Generator().manual_seed(mixed_seed(seed, step, 0, layer))
    draws = torch.rand(first_row + batch_size, generator=generator).tolist()
    return [row for row, draw in enumerate(draws[first_row:]) if draw >= rate]


def mixed_seed(*numbers: int) -> int:
    """A generator's seed that other numbers hardly share."""
    mixed = 0
    for number in numbers:
        mixed = mixed * 1_000_003 + number
    return mixed % (1 << 63)


def exit_scales(num_layers: int, e_scale: float, kind: ExitWeights = "paper") -> list[float]:
    """e(l) for layer index l.

    paper: e_scale * (0 + 1 + ... + l), and (L-1) + e_scale * (0 + ... + L-2) for the last layer.
    Ours, uniform: e_scale, and 1 for the last layer.
    """
    if kind == "uniform":
        return [e_scale] * (num_layers - 1) + [1.0]
    scales = [e_scale * layer * (layer + 1) / 2 for layer in range(num_layers - 1)]
    last = num_layers - 1
    return [*scales, last + e_scale * last * (last - 1) / 2]


def exit_weights(
    exit_layers: Sequence[int], num_layers: int, e_scale: float, kind: ExitWeights = "paper"
) -> list[float]:
    """Normalised e~ of the exits that are on, in the order given; they sum to 1. A single exit has
    weight 1.
    """
    scales = exit_scales(num_layers, e_scale, kind)
    chosen = [scales[exit_layer - 1] for exit_layer in exit_layers]
    total = sum(chosen)
    if total == 0:  # a model of one layer, by the paper's formula
        return [1.0 / len(chosen)] * len(chosen)
    return [scale / total for scale in chosen]


def exits_on(recipe: Recipe, step: int, total_steps: int, num_layers: int) -> tuple[int, ...]:
    """Exit layers (counts, 1..L, ascending) whose loss is on at optimizer step `step` of T =
    `total_steps`, the last always.

    Index i of the recipe's n exits (all L layers unless it names some) is on when i % R == step % R
    (rotational), or when 2*n*step >= T*(n - i) (gradual: from the last exit down). Taken literally,
    the paper trains the last layer one step in R.
    """
    exits = recipe.exits or tuple(range(1, num_layers + 1))
    count = len(exits)
    chosen = {num_layers}
    for i, exit_layer in enumerate(exits):
        if recipe.curriculum == "rotational":
            is_on = i % recipe.rotation == step % recipe.rotation
        elif recipe.curriculum == "gradual":
            is_on = 2 * count * step >= total_steps * (count - i)
        else:
            is_on = recipe.curriculum == "all"
        if is_on:
            chosen.add(exit_layer)
    return tuple(sorted(chosen))


def steps_on(recipe: Recipe, total_steps: int, num_layers: int) -> dict[int, int]:
    """The number of steps on which each exit is on, the last layer included."""
    counts = Counter[int]()
    for step in range(total_steps):
        counts.update(exits_on(recipe, step, total_steps, num_layers))
    return dict(sorted(counts.items()))


def trained_exits(recipe: Recipe, total_steps: int, num_layers: int) -> tuple[int, ...]:
    """The early exits whose loss has a weight on at least
    STEPS_TO_COUNT_AS_TRAINED steps of a run, or on all steps of a shorter one.
    """
    scales = exit_scales(num_layers, recipe.e_scale, recipe.exit_weights)
    steps = steps_on(recipe, total_steps, num_layers)
    needed = min(STEPS_TO_COUNT_AS_TRAINED, total_steps)
    return tuple(
        layer
        for layer, on in steps.items()
        if layer < num_layers and on >= needed and scales[layer - 1] > 0
    )
