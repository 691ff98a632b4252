"""EleutherAI's lm-evaluation-harness on this decoder: the model type `layerskip`, and its tasks
through every exit.
"""

from ..errors import ConfigError

MODEL_TYPE = "layerskip"


def register() -> None:
    """Registers the model type `layerskip` with lm-eval, which has no entry point or flag for types
    of other packages.
    """
    require_harness()
    import lm_eval.models  # noqa: F401  # fills the registry, which lm-eval does by itself only if it is empty
    from lm_eval.api.registry import model_registry

    if MODEL_TYPE not in model_registry:
        model_registry.register(MODEL_TYPE, target=f"{__name__}.model:LayerSkipLM")


def require_harness() -> None:
    """Raises ConfigError if lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness is needed, whose package {error.name} is missing: pip install 'layerskip[lm-eval]'"
        ) from None
