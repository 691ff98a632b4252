"""Drafts by all layers but some: self-speculative decoding by Draft & Verify (Zhang et al., ACL 2024).

The paper skips attention and MLP blocks one by one, here a layer is skipped as a whole. The layers before the first skipped
one compute the target's own states, so that the target goes on from them; it computes the others again, and its keys and values
overwrite those of the drafts.
"""

from itertools import pairwise

from ...config.checks import require, require_skip
from ...model.backend import Spans, Submodel
from . import DrafterSetup
from .exit import ExitDrafter, draft_side, require_exact_length


def drafter(setup: DrafterSetup) -> ExitDrafter:
    """Raises ConfigError for layers that the model or the copy that drafts does not have, and as for exits."""
    config, num_layers = setup.config, setup.model.num_layers
    require_skip(config.skip, num_layers)
    require_exact_length(setup)
    exit_layer, beyond = kept_layers(config.skip, num_layers)
    side = draft_side(setup, config.draft_weights, exit_layer)
    last = beyond[-1][1] if beyond else exit_layer
    require(last <= side.num_layers, "skip", f"a list with all layers after the {side.num_layers} kept for drafting", last)
    name = f"{num_layers - len(set(config.skip))} of {num_layers} layers"
    source = f"{config.draft_weights} {name}" if config.draft_weights else name
    submodel = Submodel(exit_layer, beyond)
    return ExitDrafter(side, setup.sampler, submodel, config.draft_confidence, setup.eos_ids, setup.reuse_exit_states, source)


def kept_layers(skip: tuple[int, ...], num_layers: int) -> tuple[int, Spans]:
    """How many layers come before the first skipped one, and the spans of layers that run after it, by index from 0.

    `skip` numbers layers from 1.
    """
    ascending = sorted(set(skip))
    spans = tuple((before, after - 1) for before, after in pairwise([*ascending, num_layers + 1]) if before < after - 1)
    return ascending[0] - 1, spans
