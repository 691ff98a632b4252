"""The settings of each regime: the paper's hyper-parameters by model size (LayerSkip tables 1 and 2)."""

from ...config.training import RecipeConfig, Regime

_SMALL_MODEL = 50_000_000  # parameters; the paper's learning rates are for models of 1B and more
_LEARNING_RATES = {"finetune": 1e-4, "continual": 3e-5, "scratch": 8e-4, "code": 1e-4}
_SMALL_LEARNING_RATES = {"finetune": 5e-4, "continual": 2e-4, "scratch": 2e-3, "code": 5e-4}
_LENGTHS = {"finetune": 512, "continual": 2048, "scratch": 2048, "code": 2048}


def recipe_preset(regime: Regime, parameters: int) -> RecipeConfig:
    """The paper's recipe for a regime and a model of that many parameters.

    Where the paper gives R = L-1 (23, 31 and 39 for 24, 32 and 40 layers), R is left to its default, which is L-1 for a
    vocabulary above 8k. For tasks the paper uses the gradual curriculum, which trains every exit on every step of its second
    half; the rotational curriculum costs a fraction of that.
    """
    if regime == "continual":  # Llama2-7B; Llama2-13B; Llama3.2-1B and Llama3-8B
        if parameters >= 10e9:
            return RecipeConfig(p_max=0.1, e_scale=0.1)
        return RecipeConfig(p_max=0.1, e_scale=0.2 if 3e9 <= parameters < 7.5e9 else 0.1, rotation=8)
    if regime == "scratch":  # 1.5B; 7B
        return RecipeConfig(p_max=0.1 if parameters < 4e9 else 0.2, e_scale=0.2)
    if regime == "code":  # Llama1-7B
        return RecipeConfig(p_max=0.1, e_scale=1.0, rotation=16)
    return RecipeConfig(p_max=0.2, e_scale=1.0)  # TOPv2, 1.5B


def learning_rate(regime: str, parameters: int) -> float:
    """The initial learning rate of a regime: the paper's, or a higher one for models under 50M parameters."""
    if regime == "continual" and parameters >= 10e9:
        return 2e-5
    return (_SMALL_LEARNING_RATES if parameters < _SMALL_MODEL else _LEARNING_RATES)[regime]


def sequence_length(regime: str, context: int) -> int:
    """Tokens per row: 512 for tasks, 2048 for plain text (our values: the paper's table has none), within the context."""
    return min(_LENGTHS[regime], context)
