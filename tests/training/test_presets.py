import pytest

from layerskip_core.config.training import RecipeConfig
from layerskip_core.training.recipe.presets import learning_rate, recipe_preset, sequence_length
from layerskip_core.training.recipe.resolved import resolve_recipe

# RECIPE, "Hyper-parameters that the paper used": regime, parameters, layers -> p_max, e_scale, R, learning rate with dropout
PAPER = [
    ("continual", 6.7e9, 32, 0.1, 0.2, 8, 3e-5),
    ("continual", 13e9, 40, 0.1, 0.1, 39, 2e-5),
    ("continual", 8e9, 32, 0.1, 0.1, 8, None),
    ("continual", 1.2e9, 16, 0.1, 0.1, 8, None),
    ("scratch", 1.5e9, 24, 0.1, 0.2, 23, 8e-4),
    ("scratch", 6.7e9, 32, 0.2, 0.2, 31, 8e-4),
    ("code", 6.7e9, 32, 0.1, 1.0, 16, 1e-4),
]


@pytest.mark.parametrize(("regime", "parameters", "layers", "p_max", "e_scale", "rotation", "rate"), PAPER)
def test_the_papers_values(regime, parameters, layers, p_max, e_scale, rotation, rate):
    recipe = recipe_preset(regime, int(parameters))
    assert (recipe.p_max, recipe.e_scale, recipe.curriculum) == (p_max, e_scale, "rotational")
    assert resolve_recipe(recipe, layers, vocab_size=32_000).rotation == rotation
    if rate is not None:
        assert learning_rate(regime, int(parameters)) == rate


def test_task_finetuning_and_small_models():
    """TOPv2, 1.5B: the paper's values but for its gradual curriculum."""
    assert recipe_preset("finetune", 1_500_000_000) == RecipeConfig(p_max=0.2, e_scale=1.0, curriculum="rotational")
    assert learning_rate("finetune", 1_500_000_000) == 1e-4 < learning_rate("finetune", 5_000_000)
    assert (
        sequence_length("finetune", 4096) == 512
        and sequence_length("code", 4096) == 2048
        and sequence_length("code", 256) == 256
    )
