"""What a regime means: the paper's hyper-parameters, each of which a flag can change (LayerSkip tables 1 and 2)."""

from ..config import RecipeConfig

_SMALL_MODEL = 50_000_000  # parameters; the paper's learning rates are for 1B and more

RECIPES = {
    "finetune": RecipeConfig(p_max=0.2, e_scale=1.0, curriculum="rotational"),
    "continual": RecipeConfig(p_max=0.1, e_scale=0.2, curriculum="rotational", rotation=8),
    "scratch": RecipeConfig(p_max=0.1, e_scale=0.2, curriculum="rotational"),
    "code": RecipeConfig(p_max=0.1, e_scale=1.0, curriculum="rotational", rotation=16),
}
_LEARNING_RATES = {"finetune": 1e-4, "continual": 3e-5, "scratch": 8e-4, "code": 1e-4}
_SMALL_LEARNING_RATES = {"finetune": 5e-4, "continual": 2e-4, "scratch": 2e-3, "code": 5e-4}


def learning_rate(regime: str, parameters: int) -> float:
    """The initial learning rate of a regime: the paper's, or one that suits models under 50M parameters."""
    return (_SMALL_LEARNING_RATES if parameters < _SMALL_MODEL else _LEARNING_RATES)[regime]
