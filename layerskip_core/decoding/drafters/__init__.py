"""Where drafts come from. A drafter is one module here and one line in `DRAFTERS` of config/decoding.py."""

from importlib import import_module

from ...config.decoding import DRAFTERS
from .base import Context, Draft, Drafter, DrafterSetup
from .exit import ExitDrafter
from .lookup import LookupDrafter

__all__ = ["Context", "Draft", "Drafter", "DrafterSetup", "ExitDrafter", "LookupDrafter", "drafter_for"]


def drafter_for(setup: DrafterSetup) -> Drafter:
    """The drafter of the config's strategy, by the function `drafter` of its module. Raises ConfigError as that does.

    With a `lookup` in the config it drafts only where nothing is found. A lookup itself and adaptive drafting include that.
    """
    config = setup.config
    drafter: Drafter = import_module(DRAFTERS[config.strategy]).drafter(setup)
    if config.lookup and config.strategy not in ("lookup", "adaptive"):
        return LookupDrafter(config.lookup, setup.eos_ids, drafter)
    return drafter
