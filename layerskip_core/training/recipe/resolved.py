"""The recipe of a run, with all defaults resolved."""

from dataclasses import dataclass

from ...config.checks import require
from ...config.training import Curriculum, DropoutProfile, ExitWeights, RecipeConfig
from .exit_loss import exit_scales

_LARGE_VOCABULARY = 8192


@dataclass(frozen=True)
class Recipe:
    """RecipeConfig for a model of L layers. It is sealed into the run's checkpoints, so that a default that changes later
    cannot alter a run that is resumed.
    """

    p_max: float
    dropout_profile: DropoutProfile
    e_scale: float
    exit_weights: ExitWeights
    curriculum: Curriculum
    rotation: int  # R of the rotational curriculum; 0 for the others
    exits: tuple[int, ...]  # the n exit layers that the curriculum chooses among, ascending; empty for all L
    distill: float

    def candidates(self, num_layers: int) -> tuple[int, ...]:
        """The n exit layers that the curriculum chooses among, ascending."""
        return self.exits or tuple(range(1, num_layers + 1))


def resolve_recipe(asked: RecipeConfig, num_layers: int, vocab_size: int) -> Recipe:
    """R is by default n-1 of n exits for a vocabulary above 8k, where each extra exit costs a head, and n/3 below.

    Raises ConfigError for settings that the curriculum does not use, and for early exits that all weigh nothing.
    """
    _require_used(asked, num_layers)
    rotation = 0
    if asked.curriculum == "rotational":
        count = len(asked.exits) or num_layers
        rotation = asked.rotation or max(1, count - 1 if vocab_size > _LARGE_VOCABULARY else count // 3)
    return Recipe(
        p_max=asked.p_max,
        dropout_profile=asked.dropout_profile,
        e_scale=asked.e_scale,
        exit_weights=asked.exit_weights,
        curriculum=asked.curriculum,
        rotation=rotation,
        exits=tuple(sorted(asked.exits)),
        distill=asked.distill,
    )


def _require_used(asked: RecipeConfig, num_layers: int) -> None:
    if asked.curriculum == "none":
        for name in ("exits", "distill"):
            require(not getattr(asked, name), name, "left out with `curriculum` none", getattr(asked, name))
        return
    require(asked.e_scale > 0, "e_scale", "above 0 unless `curriculum` is none", asked.e_scale)
    early = [exit_layer for exit_layer in asked.exits if exit_layer < num_layers]
    scales = exit_scales(num_layers, asked.e_scale, asked.exit_weights)
    weighs = not early or any(scales[exit_layer - 1] > 0 for exit_layer in early)
    needed = f"exits that `exit_weights` {asked.exit_weights} gives a weight above 0"
    require(weighs, "exits", needed, ",".join(map(str, asked.exits)))
