"""Which exits take part in the loss of a step: pure functions of the step, so that resuming needs no history."""

from ..config.training import RecipeConfig

_LARGE_VOCABULARY = 8192


def exits_on(recipe: RecipeConfig, step: int, total_steps: int, num_layers: int, vocab_size: int = 0) -> tuple[int, ...]:
    """Exit layers (counts, 1..L, ascending) whose loss is on at optimizer step `step` of `total_steps`.

    LayerSkip section 4.2, over the recipe's n exits (all L layers unless it names some). rotational: index i is on when
    i % R == step % R. gradual: when 2*n*step >= T*(n - i), from the last one down, one more every T/(2n) steps. The last layer
    is on whatever the curriculum: taken literally the paper's rotation would train it on one step in R.
    """
    exits = _candidates(recipe, num_layers)
    count = len(exits)
    if recipe.curriculum == "rotational":
        rotation = rotation_of(recipe, num_layers, vocab_size)
        chosen = [exit_layer for i, exit_layer in enumerate(exits) if i % rotation == step % rotation]
    elif recipe.curriculum == "gradual":
        chosen = [exit_layer for i, exit_layer in enumerate(exits) if 2 * count * step >= total_steps * (count - i)]
    elif recipe.curriculum == "all":
        chosen = list(exits)
    else:
        chosen = []
    return tuple(sorted({*chosen, num_layers}))


def rotation_of(recipe: RecipeConfig, num_layers: int, vocab_size: int) -> int:
    """R of the rotational curriculum: what the recipe says, else n-1 of n exits for a vocabulary above 8k, about n/3 below."""
    if recipe.rotation is not None:
        return recipe.rotation
    count = len(_candidates(recipe, num_layers))
    return max(1, count - 1 if vocab_size > _LARGE_VOCABULARY else count // 3)


def mean_exits(recipe: RecipeConfig, total_steps: int, num_layers: int, vocab_size: int = 0) -> float:
    """Heads computed a step, averaged over the run (the last layer's included): what the curriculum costs."""
    sampled = range(0, total_steps, max(1, total_steps // 1000))
    counts = [len(exits_on(recipe, step, total_steps, num_layers, vocab_size)) for step in sampled]
    return sum(counts) / len(counts)


def _candidates(recipe: RecipeConfig, num_layers: int) -> tuple[int, ...]:
    """The exit layers that the curriculum chooses among, ascending."""
    return tuple(sorted(recipe.exits)) or tuple(range(1, num_layers + 1))
