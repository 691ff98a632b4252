"""Where drafts come from. A drafter is one module here and one line in `DRAFTERS` of config/decoding.py."""

from importlib import import_module

from ...config.decoding import DRAFTERS
from .base import Context, Draft, Drafter, DrafterSetup
from .exit import ExitDrafter

__all__ = ["Context", "Draft", "Drafter", "DrafterSetup", "ExitDrafter", "drafter_for"]


def drafter_for(setup: DrafterSetup) -> Drafter:
    """The drafter of the config's strategy, by the function `drafter` of its module. Raises ConfigError as that does."""
    drafter: Drafter = import_module(DRAFTERS[setup.config.strategy]).drafter(setup)
    return drafter
