"""Which exits take part in the loss of a step: pure functions of the step, so that resuming needs no history."""

from ..config import RecipeConfig

_LARGE_VOCABULARY = 8192


def exits_on(recipe: RecipeConfig, step: int, total_steps: int, num_layers: int, vocab_size: int = 0) -> tuple[int, ...]:
    """Exit layers (counts, 1..L, ascending) whose loss is on at optimizer step `step` of `total_steps`.

    LayerSkip section 4.2. rotational: layer index l is on when l % R == step % R. gradual: when 2*L*step >= T*(L - l), from
    the last layer down, one more every T/(2L) steps. The last layer is on whatever the curriculum: taken literally the paper's
    rotation would train it on one step in R.
    """
    if recipe.curriculum == "rotational":
        rotation = rotation_of(recipe, num_layers, vocab_size)
        chosen = [layer for layer in range(num_layers) if layer % rotation == step % rotation]
    elif recipe.curriculum == "gradual":
        chosen = [layer for layer in range(num_layers) if 2 * num_layers * step >= total_steps * (num_layers - layer)]
    elif recipe.curriculum == "all":
        chosen = list(range(num_layers))
    else:
        chosen = []
    return tuple(layer + 1 for layer in sorted({*chosen, num_layers - 1}))


def rotation_of(recipe: RecipeConfig, num_layers: int, vocab_size: int) -> int:
    """R of the rotational curriculum: what the recipe says, else L-1 for a vocabulary above 8k and about L/3 below."""
    if recipe.rotation is not None:
        return recipe.rotation
    return max(1, num_layers - 1 if vocab_size > _LARGE_VOCABULARY else num_layers // 3)


def mean_exits(recipe: RecipeConfig, total_steps: int, num_layers: int, vocab_size: int = 0) -> float:
    """Heads computed a step, averaged over the run (the last layer's included): what the curriculum costs."""
    sampled = range(0, total_steps, max(1, total_steps // 1000))
    counts = [len(exits_on(recipe, step, total_steps, num_layers, vocab_size)) for step in sampled]
    return sum(counts) / len(counts)
