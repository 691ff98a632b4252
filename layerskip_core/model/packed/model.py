"""`Backend` on repacked weights, by torch's kernels: faster than transformers' layers, on every device."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...config.packing import PackingConfig, Quantization
from ..backend import DraftSide
from ..cache import KVCache
from ..drafting import LayeredDraftSide
from ..int4 import named_int4
from ..layer_weights import NormWeights
from ..repack import repack, taken_from
from ..rope import Rope
from ..spec import EMBEDDING, ModelSpec
from ..splitting import propagate_in_parts, run_in_parts
from ..weights import Take, Weights, checked
from .head import PackedHead
from .layer import PackedLayer, missing_feature
from .linear import KernelLinear
from .span import PackedLayers


def can_pack(config: object) -> bool:
    """Whether PackedBackend supports every part of this architecture."""
    return missing_feature(ModelSpec.of(config)) is None


class PackedBackend:
    """The operations and results of `GenericBackend`, for inference only. Not for two threads at once."""

    def __init__(
        self,
        config: object,
        take: Take,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
    ) -> None:
        """The weights of an architecture that `can_pack`, by their names in its checkpoints; each is taken once.

        `token_order`: token ids, the most frequent first, which `draft_vocab` counts; None for the tokenizer's order. `int4`:
        calibrated weights as rows of bytes, for int4 layers and heads; the others are rounded to nearest.
        Raises CheckpointError for a configuration that is impossible and for a weight that is missing, of another shape or not
        finite, ConfigError where no kernel does what `packing` asks for.
        """
        packing = packing or PackingConfig()
        spec = self.spec = ModelSpec.of(config)
        weights = Weights(checked(take, spec.shapes), spec.shapes)

        def pack_layer(weights: Weights, index: int, quantization: Quantization | None, exact: bool) -> PackedLayer:
            return PackedLayer(weights, spec, index, quantization, exact)

        def pack_head(norm: NormWeights, weight: Tensor, quantization: Quantization | None, exact: bool) -> PackedHead:
            return PackedHead(norm, weight, spec, quantization, exact)

        with torch.inference_mode():
            embedding = weights.of(EMBEDDING)
            packed = repack(weights, embedding, spec, packing, token_order, pack_layer, pack_head, int4)
            chain = partial(PackedLayers, spec, embedding, Rope(config, spec, embedding))
            self._layers, self._head = chain(packed.layers, packing.exact), packed.head
            own = LayeredDraftSide(self._layers, packed.draft_head, packed.vocabulary)
            copies: dict[Quantization | None, DraftSide] = {
                kind: LayeredDraftSide(chain(layers, False), head, packed.vocabulary, shares_states=False)
                for kind, (layers, head) in packed.copies.items()
            }
        self.draft_sides: Mapping[Quantization | None, DraftSide] = {None: own} | copies
        self.implementation = named_int4(_implementation(packing, self._head, self._layers), int4 is not None)
        self.num_layers, self.hidden_size, self.vocab_size = spec.layers, spec.hidden, spec.vocab
        self.max_positions, self.exact, self.batch_invariant = spec.context, packing.exact, packing.exact
        self.device, self.dtype = embedding.device, embedding.dtype

    @classmethod
    def of(
        cls,
        model: nn.Module,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
    ) -> "PackedBackend":
        """Takes the weights of a transformers model, which can no longer run afterwards."""
        return cls(model.config, taken_from(model), packing, token_order, int4)

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        return KVCache.of(self.spec, batch_size, max_positions)

    def embed(self, ids: Tensor) -> Tensor:
        return self._layers.embed(ids)

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        return run_in_parts(self._layers, hidden, start, stop, positions, cache)

    def propagate(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        propagate_in_parts(self._layers, hidden, start, stop, positions, cache)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)


def _implementation(packing: PackingConfig, head: PackedHead, layers: PackedLayers) -> str:
    prepacked = any(isinstance(part, KernelLinear) for part in (head.linear, *layers.layers[0].linears))
    kernels = f"packed ({packing.quantize or 'oneDNN'})" if prepacked else "packed"
    return kernels + packing.drafting + (", exact" if packing.exact else "")
