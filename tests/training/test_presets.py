import pytest

from layerskip_core.config.training import RecipeSettings
from layerskip_core.training.recipe import learning_rate, resolve_recipe, sequence_length

# RECIPE, "Hyper-parameters that the paper used": regime, parameters, layers -> p_max, e_scale, R, learning rate with dropout
PAPER = [
    ("continual", 6.7e9, 32, 0.1, 0.2, 8, 3e-5),
    ("continual", 13e9, 40, 0.1, 0.1, 39, 2e-5),
    ("continual", 8e9, 32, 0.1, 0.1, 8, None),
    ("continual", 1.2e9, 16, 0.1, 0.1, 8, None),
    ("scratch", 1.5e9, 24, 0.1, 0.2, 23, 8e-4),
    ("scratch", 6.7e9, 32, 0.2, 0.2, 31, 8e-4),
    ("code", 6.7e9, 32, 0.1, 1.0, 16, 1e-4),
    ("finetune", 1.5e9, 24, 0.2, 1.0, 23, 1e-4),  # TOPv2: the paper's values but for its gradual curriculum
]


@pytest.mark.parametrize(("regime", "parameters", "layers", "p_max", "e_scale", "rotation", "rate"), PAPER)
def test_the_papers_values(regime, parameters, layers, p_max, e_scale, rotation, rate):
    recipe = resolve_recipe(RecipeSettings(), regime, int(parameters), layers, vocab_size=32_000)
    assert (recipe.p_max, recipe.e_scale, recipe.curriculum, recipe.rotation) == (p_max, e_scale, "rotational", rotation)
    if rate is not None:
        assert learning_rate(regime, int(parameters)) == rate < learning_rate(regime, 5_000_000)


def test_lengths():
    asked = ((None, "finetune", 4096), (None, "code", 4096), (None, "code", 256), (100, "code", 256))
    assert [sequence_length(*each) for each in asked] == [512, 2048, 256, 100]
