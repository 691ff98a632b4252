"""A decoder that can run any span of its layers.

Shape letters, used everywhere: B batch rows, T tokens of this call, S key positions, D hidden size, V vocabulary, L layers,
E exit layer (a count, 1..L), K drafted tokens per round.
"""

from .backend import Backend, DraftEnds, Submodel
from .cache import KVCache
from .native import NativeBackend, can_run_native, suits_kernels
from .spec import ModelSpec
from .torch_backend import TorchBackend
from .torch_layer import missing_feature
from .transformers_backend import TransformersBackend

__all__ = [
    "Backend",
    "DraftEnds",
    "KVCache",
    "ModelSpec",
    "NativeBackend",
    "Submodel",
    "TorchBackend",
    "TransformersBackend",
    "can_run_native",
    "missing_feature",
    "suits_kernels",
]
