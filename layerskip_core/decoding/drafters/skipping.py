"""Drafts by all layers but some: self-speculative decoding by Draft & Verify (Zhang et al., ACL 2024).

The paper skips attention and MLP blocks one by one; here whole layers are skipped. The layers before the first skipped one
compute the target's own states, from which the target goes on. It runs the others again, and its KV entries overwrite those of
the drafts.
"""

from itertools import pairwise

from ...model.backend import Spans, Submodel
from . import DrafterSetup
from .exit import ExitDrafter


def drafter(setup: DrafterSetup) -> ExitDrafter:
    """Raises ConfigError as `ExitDrafter` does."""
    config, num_layers = setup.config, setup.model.num_layers
    name = f"{num_layers - len(set(config.skip))} of {num_layers} layers"
    source = f"{config.draft_weights} {name}" if config.draft_weights else name
    return ExitDrafter(setup, config.draft_weights, Submodel(*kept_layers(config.skip, num_layers)), source)


def kept_layers(skip: tuple[int, ...], num_layers: int) -> tuple[int, Spans]:
    """How many layers come before the first skipped one, and the spans of layers that run after it, by index from 0.

    `skip` numbers layers from 1.
    """
    ascending = sorted(set(skip))
    spans = tuple((before, after - 1) for before, after in pairwise([*ascending, num_layers + 1]) if before < after - 1)
    return ascending[0] - 1, spans
