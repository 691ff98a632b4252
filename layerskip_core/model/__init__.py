"""A decoder that can run any span of its layers.

Shape letters, used everywhere: B batch rows, T tokens of this call, S key positions, D hidden size, V vocabulary, L layers,
E exit layer (a count, 1..L), K drafted tokens of a round.
"""

from .cache import KVCache
from .generic import GenericBackend, SpanInputs
from .native import NativeBackend, can_run_native, suits_kernels
from .packed.model import PackedBackend, can_pack
from .spec import ModelSpec

__all__ = [
    "GenericBackend",
    "KVCache",
    "ModelSpec",
    "NativeBackend",
    "PackedBackend",
    "SpanInputs",
    "can_pack",
    "can_run_native",
    "suits_kernels",
]
