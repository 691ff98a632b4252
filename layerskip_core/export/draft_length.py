"""How many tokens an engine should draft with an exit that runs as a second model."""

from dataclasses import dataclass
from math import prod

from ..checkpoint.loaded import Decoder
from ..decoding.drafters.estimates import LinearTime, best_length
from ..model.spec import EMBEDDING, ModelSpec

_MOST = 16
_USUAL = 6


@dataclass(frozen=True)
class DraftLength:
    """A number of draft tokens, and why in words."""

    tokens: int
    why: str


def recommended_length(loaded: Decoder, exit_layer: int, layers: int) -> DraftLength:
    """What a sweep recommended for this exit; else the best for its acceptance, if that is known; else the usual number.

    The best number gives the most expected tokens per byte of weights that is read, because decoding one text is bound by
    memory. `layers`: of the draft, its block included.
    """
    info, spec = loaded.info, loaded.backend.spec
    if exit_layer == info.exit_layer and info.num_draft_tokens is not None:
        return DraftLength(info.num_draft_tokens, "recommended by `layerskip sweep-exits`, or with the model")
    acceptance = info.draft_profile(loaded.backend.num_layers).acceptance.get(f"exit {exit_layer}")
    if acceptance is None:
        return DraftLength(_USUAL, "the usual number; nothing is known of this exit's acceptance")
    share = _read(spec, layers) / _read(spec, spec.layers)
    _, tokens = best_length(acceptance, acceptance, LinearTime(0.0, share), 0, LinearTime(1.0, 0.0), 1, _MOST)
    why = f"the best if {acceptance:.0%} of the drafts are accepted and a draft takes {share:.0%} of the time of a full pass"
    return DraftLength(max(tokens, 1), why)


def _read(spec: ModelSpec, layers: int) -> int:
    """Numbers that a pass of one token reads, of a model with so many layers: theirs and the head's."""
    return layers * sum(map(prod, spec.layer_shapes.values())) + prod(spec.shapes[EMBEDDING])
