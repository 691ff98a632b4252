"""Where drafts come from. A drafter is one module here and one line in `DRAFTERS`."""

from ...config.checks import require
from ...config.decoding import DecodingConfig
from ...config.packing import EXACT_TOKENS
from ...model.backend import Backend
from ..sampling import Sampler
from .base import Context, Draft, Drafter
from .exit import ExitDrafter

__all__ = ["Context", "Draft", "Drafter", "ExitDrafter", "drafter_for"]


def drafter_for(
    model: Backend, sampler: Sampler, config: DecodingConfig, eos_ids: frozenset[int], reuse_exit_states: bool = True
) -> Drafter:
    """The drafter of self-speculative decoding.

    Raises ConfigError for an exit beyond the layers that the model keeps for drafting, and for drafts too long to be verified
    exactly.
    """
    exit_layer = config.exit_layer
    assert exit_layer is not None
    kept = model.draft_side.num_layers
    require(exit_layer <= kept, "exit_layer", f"at most the {kept} layers kept for drafting", exit_layer)
    short = not model.exact or config.num_draft_tokens < EXACT_TOKENS
    require(short, "num_draft_tokens", f"below {EXACT_TOKENS} with `exact`", config.num_draft_tokens)
    return ExitDrafter(model.draft_side, sampler, exit_layer, config.draft_confidence, eos_ids, reuse_exit_states)
