"""Which exits take part in the loss of a step: pure functions of the step, so that resuming needs no history."""

from .resolved import Recipe


def exits_on(recipe: Recipe, step: int, total_steps: int, num_layers: int) -> tuple[int, ...]:
    """Exit layers (counts, 1..L, ascending) whose loss is on at optimizer step `step` of `total_steps`.

    LayerSkip section 4.1, over the recipe's n exits (all L layers unless it names some). rotational: index i is on when
    i % R == step % R. gradual: when 2*n*step >= T*(n - i), from the last exit down, one more every T/(2n) steps. The last layer
    is always on: taken literally, the paper's rotation would train it on one step in R.
    """
    exits = recipe.candidates(num_layers)
    count = len(exits)
    if recipe.curriculum == "rotational":
        chosen = [exit_layer for i, exit_layer in enumerate(exits) if i % recipe.rotation == step % recipe.rotation]
    elif recipe.curriculum == "gradual":
        chosen = [exit_layer for i, exit_layer in enumerate(exits) if 2 * count * step >= total_steps * (count - i)]
    elif recipe.curriculum == "all":
        chosen = list(exits)
    else:
        chosen = []
    return tuple(sorted({*chosen, num_layers}))


def mean_exits(recipe: Recipe, total_steps: int, num_layers: int) -> float:
    """Heads computed per step, averaged over the run, the last layer's included: what the curriculum costs."""
    sampled = range(0, total_steps, max(1, total_steps // 1000))
    counts = [len(exits_on(recipe, step, total_steps, num_layers)) for step in sampled]
    return sum(counts) / len(counts)
