"""The assistant of a Gemma 4 model on the C kernels: its layers are one call, on the pages of the model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...config.model import Quantization
from ..assistant import CENTROIDS, INPUT, ORDER, OUTPUT, Assistant
from ..backend import Backend, Layers
from ..cache import Places
from ..pages import PagePool
from ..spec import ModelSpec
from ..torch_linear import Norm
from ..weights import GROUP_SIZE, Affine, Weights, checked, norm_weights
from .compiled import Kernels
from .heads import NativeLinear
from .layers import Engine, NativeLayer, NativeLayers, keys_at
from .matrix import MatrixForm, PackMatrix


class NativeAssistant:
    """As a PlacedBlock, of a NativeBackend; it has no KV entries. What `run` gives is the state after its last layer."""

    needs_feature, kernel, vocabulary = True, None, None
    taps: tuple[int, ...] = ()  # it needs no states of the target but the last

    def __init__(
        self,
        kernels: Kernels,
        pack: PackMatrix,
        stored: Assistant,
        target: ModelSpec,
        embedding: Tensor,
        pool: PagePool,
        low_bits: tuple[Quantization | None, Quantization | None],
    ) -> None:
        """`target`, `embedding`, `pool`: of its model. `low_bits`: as for NativeEagle3; a head with clusters has none."""
        spec, self._hidden = stored.spec, target.hidden
        of_layers = [spec.of_layer(layer) for layer in range(spec.layers)]
        widths = 2 * target.hidden, spec.hidden, spec.inner, *(of_layer.queries for of_layer in of_layers)
        bf16 = embedding.dtype == torch.bfloat16 and not any(width % 2 for width in widths)
        dtype, unrounded = (torch.bfloat16, "bf16") if bf16 else (torch.float32, "fp32")
        fits = not any(width % GROUP_SIZE for width in widths)
        layer_kind, head_kind = (kind if fits and kind is not None else unrounded for kind in low_bits)
        weights = Weights(checked(lambda name: stored.take(name).to(dtype), stored.shapes), stored.shapes)
        engine = Engine(kernels, spec, embedding.dtype)
        engine.make_room(2 * target.hidden)

        def linear(name: str, kind: str, norm: Affine | None = None) -> NativeLinear:
            outputs, inputs = stored.shapes[name]
            form = MatrixForm(kind, inputs, outputs)
            return NativeLinear(engine, pack(f"assistant.{name}", form, lambda: [Affine(weights.of(name), None)]), norm)

        layers = list[NativeLayer | None]()
        for index, of_layer in enumerate(of_layers):
            own = weights.below(spec.layer_prefix(index))
            layer = NativeLayer(pack, own, spec, index, layer_kind)
            assert of_layer.source is not None and spec.architecture.layer_scale is not None
            layer.structure.keys = keys_at(target, of_layer.source)
            layer.structure.scale = float(own.of(spec.architecture.layer_scale))
            layers.append(layer)
        self._layers = NativeLayers(engine, spec, embedding, None, layers, pool)
        norm = norm_weights(weights, spec.names.norm, spec)
        self._join, self._next = linear(INPUT, layer_kind), linear(OUTPUT, layer_kind, norm)
        if stored.clusters:
            parts = weights.of(CENTROIDS), weights.of(spec.head_name), stored.take(ORDER).long()
            own_norm = Norm(Affine(norm.weight.float(), None), spec.eps)
            self.head: NativeLinear | ClusteredHead = ClusteredHead(own_norm, *parts, stored.chosen)
        else:
            self.head = linear(spec.head_name, head_kind, norm)

    def run(self, layers: Layers, states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        assert before is not None
        entered = self._join(torch.cat((states[..., : self._hidden], before), dim=-1))
        last = Places(places.cache, [max(0, start - 1) for start in places.origins], places.counts)
        return self._layers.run_layers(entered, 0, self._layers.num_layers, last)

    def write(self, model: Backend, states: Mapping[int, Tensor], before: Tensor | None, places: Places) -> None:
        pass

    def features(self, model: Backend, states: Mapping[int, Tensor], finals: Tensor) -> Tensor | None:
        return model.normed(finals)

    def own_feature(self, hidden: Tensor) -> Tensor | None:
        return self._next(hidden)


class ClusteredHead:
    """The logits (N, V) of states (N, D), -inf for the tokens of clusters that are not chosen."""

    def __init__(self, norm: Norm, centroids: Tensor, table: Tensor, order: Tensor, chosen: int) -> None:
        """`centroids` (C, D); `table` (V, D) by token; `order` (V,): token ids, cluster by cluster."""
        self._norm, self._centroids, self._chosen = norm, centroids.float(), chosen
        self._ids = order.view(len(centroids), -1)
        self._rows = table[self._ids].flatten(1)  # (C, V/C * D)

    def __call__(self, hidden: Tensor) -> Tensor:
        normed = self._norm(hidden)
        best = (normed @ self._centroids.T).topk(self._chosen).indices
        rows = torch.embedding(self._rows, best).view(len(normed), -1, normed.shape[1])  # an index takes five times as long
        found = rows.float() @ normed[..., None]
        logits = normed.new_full((len(normed), self._ids.numel()), -torch.inf)
        return logits.scatter_(1, self._ids[best].flatten(1), found[..., 0])
