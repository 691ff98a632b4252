"""The drafter of each strategy.

A drafter is one module here, with a function `drafter(setup)`, and one entry of `STRATEGIES` in
config/decoding.py.
"""

from importlib import import_module

from ...config.decoding import STRATEGIES
from ...config.model import EXACT_TOKENS
from ...errors import require
from .lookup_drafter import LookupDrafter
from .protocol import Draft, Drafter, DrafterSetup, DraftInput

__all__ = ["Draft", "DraftInput", "Drafter", "DrafterSetup", "drafter_for"]


def drafter_for(setup: DrafterSetup) -> Drafter:
    """The drafter of the config's strategy.

    With a `lookup` in the config it drafts only if the lookup finds nothing, with a grammar of a
    row only if this forces nothing; the strategies `lookup` and `adaptive` include both. Raises
    ConfigError if it needs weights that were not loaded, and for drafts too long to be verified
    exactly.
    """
    config = setup.config
    fits = not setup.model.exact or config.num_draft_tokens < EXACT_TOKENS
    require(fits, "num_draft_tokens", f"below {EXACT_TOKENS} with `exact`", config.num_draft_tokens)
    module = STRATEGIES[config.strategy].drafter
    assert module is not None
    drafter: Drafter = import_module(module).drafter(setup)
    if config.strategy in ("lookup", "adaptive"):
        return drafter
    earlier = setup.earlier if config.lookup else None
    return LookupDrafter(config.lookup, drafter, earlier)
