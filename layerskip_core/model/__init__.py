"""A decoder that can run any span of its layers.

Shape letters, used everywhere: B batch rows, T tokens of this call, S key positions, D hidden size, V vocabulary, L layers,
E exit layer (a count, 1..L), K drafted tokens of a round.
"""

from .cache import DepthCache
from .generic import DepthModel, SpanInputs
from .native import NativeModel, can_run_native, suits_kernels
from .packed.model import PackedModel, can_pack
from .spec import ModelSpec

__all__ = [
    "DepthCache",
    "DepthModel",
    "ModelSpec",
    "NativeModel",
    "PackedModel",
    "SpanInputs",
    "can_pack",
    "can_run_native",
    "suits_kernels",
]
