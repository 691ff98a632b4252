"""A decoder that can run any span of its layers.

Shape letters: B batch rows, T tokens of a call, N tokens of a pass, S key positions, D hidden size,
V vocabulary, L layers, E exit layer (a count, 1..L), K drafted tokens per round.
"""

from .backend import Backend as Backend
from .backend import DraftEnds as DraftEnds
from .backend import Submodel as Submodel
from .cache import KVCache as KVCache
from .native import NativeBackend as NativeBackend
from .native import can_run_native as can_run_native
from .spec import ModelSpec as ModelSpec
from .torch_backend import TorchBackend as TorchBackend
from .torch_layer import missing_feature as missing_feature
from .transformers_backend import TransformersBackend as TransformersBackend
