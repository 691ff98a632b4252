"""Drafters with layers of their own on the C kernels: the EAGLE-3 layout, and the assistant of a
Gemma 4 model.

An assistant is a small decoder trained to draft for its model (google/gemma-4-E2B-it-assistant).
Its layers have queries only: each reads the keys and values of the model's last attending layer of
its kind. Let e be the model's embedding of a token, and s the model's hidden state of the previous
token after the final norm:

    x = W_in [e; s], h = norm(layers(x)), logits = head(h); for the next draft s = W_out h

All drafts of a round have the position of the model's last KV entry, as in vLLM and mlx-vlm;
transformers rotates queries for the position after it. A head with clusters scores only the tokens
of the `chosen` clusters with the best centroids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.model import Quantization
from ..architectures import ARCHITECTURES
from ..assistant import CENTROIDS, INPUT, ORDER, OUTPUT, Assistant
from ..backend import Backend, DraftBlock, DraftCall, Drafted, Layers
from ..cache import Places
from ..configuration import FULL
from ..eagle3 import FC, HEAD, HIDDEN_NORM, LAYER, NORM, Eagle3Form, Eagle3Weights, frequencies
from ..pages import PagePool
from ..spec import ModelSpec
from ..torch_linear import Norm
from ..vocabulary import DraftVocabulary
from ..weights import GROUP_SIZE, Affine, Weights, checked, norm_weights
from .compiled import Kernels
from .heads import NativeLinear, draft
from .layers import Engine, EntryLayers, NativeLayer, NativeLayers, keys_at
from .matrix import MatrixForm, PackMatrix


class Target(NamedTuple):
    """The parts of a backend that its drafters use."""

    kernels: Kernels
    pack: PackMatrix
    spec: ModelSpec
    embedding: Tensor
    pool: PagePool
    # Of a drafter's layers and head, if its widths allow
    low_bits: tuple[Quantization | None, Quantization | None]


class _Matrices:
    """Makes a drafter's matrices: in low bits if `widths` allow it, else in the embedding's
    precision or fp32.
    """

    def __init__(self, target: Target, widths: Sequence[int]) -> None:
        is_bf16 = target.embedding.dtype == torch.bfloat16 and not any(
            width % 2 for width in widths
        )
        self.dtype, unrounded = (torch.bfloat16, "bf16") if is_bf16 else (torch.float32, "fp32")
        fits = not any(width % GROUP_SIZE for width in widths)
        self.layers, self.head = (
            kind if fits and kind is not None else unrounded for kind in target.low_bits
        )
        self._pack = target.pack

    def linear(
        self, engine: Engine, weights: Weights, name: str, kind: str, norm: Affine | None = None
    ) -> NativeLinear:
        outputs, inputs = weights.shapes[name]
        matrix = self._pack(
            name, MatrixForm(kind, inputs, outputs), lambda: [Affine(weights.of(name), None)]
        )
        return NativeLinear(engine, matrix, norm)


class NativeEagle3(DraftBlock):
    """PlacedEagle3 on the C kernels."""

    needs_feature = True

    def __init__(self, target: Target, stored: Eagle3Weights, place: int) -> None:
        form = stored.form
        pack = target.pack
        embedding = target.embedding
        made = _Matrices(target, (form.hidden, form.inner, form.heads * form.head_dim))
        rounded = {name: weight.to(made.dtype) for name, weight in stored.weights.items()}
        self._form = form
        self._norms = {
            name: weight.float() for name, weight in rounded.items() if weight.dim() == 1
        }
        weights = Weights(rounded.get, form.shapes)
        spec = _layer_spec(form, target.spec)

        def ropes(count: int) -> list[tuple[Tensor, Tensor]]:
            angles = torch.outer(torch.arange(count, dtype=torch.float32), frequencies(form))
            return [(angles.cos(), angles.sin())]

        engine = Engine(target.kernels, spec, embedding.dtype, ropes)
        engine.make_room(len(form.layers) * form.hidden)
        engine.shape.norms_residual = form.norm_before_residual
        layer = NativeLayer(
            pack,
            weights.below(LAYER),
            spec,
            place,
            made.layers,
            Affine(weights.of(HIDDEN_NORM), None),
        )
        self._layers = EntryLayers(
            engine, spec, embedding, None, [None] * place + [layer], target.pool
        )
        self._fc = made.linear(engine, weights, FC, made.layers)
        self.head = made.linear(engine, weights, HEAD, made.head, Affine(weights.of(NORM), None))
        self._place = place
        self.taps = (0, *form.layers)
        self.vocabulary = DraftVocabulary(spec.vocab, form.vocab, stored.tokens.tolist())
        self.kernel = partial(_draft_by_layer, self._layers, spec, place, form.norm_output)

    def run(self, layers: Layers, states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        return self._layers.run_layers(
            _entries(states, before), self._place, self._place + 1, places.moved(-1)
        )

    def write(
        self, model: Backend, states: Mapping[int, Tensor], before: Tensor | None, places: Places
    ) -> None:
        self._layers.write_kv(
            _entries(states[0], before), self._place, self._place + 1, places.moved(-1)
        )

    def features(
        self, model: Backend, states: Mapping[int, Tensor], finals: Tensor
    ) -> Tensor | None:
        return self._fc(self._form.fc_input([states[tap] for tap in self.taps[1:]], self._normed))

    def own_feature(self, hidden: Tensor) -> Tensor | None:
        return self._normed(NORM, hidden) if self._form.norm_output else hidden

    def _normed(self, name: str, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden.float(), hidden.shape[-1:], self._norms[name], self._form.eps)


def _draft_by_layer(
    layers: NativeLayers, spec: ModelSpec, layer: int, norms_output: bool, call: DraftCall
) -> Drafted:
    """A `DraftKernel` of one layer, which reads the previous token's feature, once the rest is
    bound.
    """
    submodel = replace(call.submodel, block=None, beyond=((layer, layer + 1),))
    call = replace(call, submodel=submodel, places=call.places.moved(-1))
    return draft(layers, spec, call, norms_output)


def _entries(states: Tensor, before: Tensor | None) -> Tensor:
    assert before is not None
    return torch.cat((states, before), dim=-1)


def _layer_spec(form: Eagle3Form, spec: ModelSpec) -> ModelSpec:
    """The target's spec with the drafter's layer, a layer of Llama, as the last."""
    return replace(
        spec,
        architecture=ARCHITECTURES["llama"],
        heads=form.heads,
        kv_heads=form.kv_heads,
        head_dim=form.head_dim,
        inner=form.inner,
        experts=None,
        recurrence=None,
        eps=form.eps,
        activation="silu",
        kinds=(*spec.kinds[:-1], FULL),
        rope_of=(0,) * spec.layers,
        rotary=form.head_dim,
        parallel=False,
        query_bias=False,
        output_bias=False,
        mlp_bias=False,
        attention_scale=form.head_dim**-0.5,
        residual_scale=1.0,
        logits_divisor=1.0,
        score_cap=None,
        logits_cap=None,
    )


class NativeAssistant(DraftBlock):
    """An assistant on the C kernels. It writes no KV entries; `run` returns the last layer's
    output.
    """

    needs_feature = True

    def __init__(self, target: Target, stored: Assistant) -> None:
        spec = stored.spec
        self._hidden = target.spec.hidden
        embedding = target.embedding
        of_layers = [spec.of_layer(layer) for layer in range(spec.layers)]
        made = _Matrices(
            target,
            (
                2 * self._hidden,
                spec.hidden,
                spec.inner,
                *(of_layer.query_width for of_layer in of_layers),
            ),
        )
        weights = Weights(
            checked(lambda name: stored.take(name).to(made.dtype), stored.shapes), stored.shapes
        )
        engine = Engine(target.kernels, spec, embedding.dtype)
        engine.make_room(2 * self._hidden)
        layers = list[NativeLayer | None]()
        for index, of_layer in enumerate(of_layers):
            own = weights.below(spec.layer_prefix(index))
            assert of_layer.source is not None and spec.architecture.layer_scale is not None
            layer = NativeLayer(
                target.pack,
                own,
                spec,
                index,
                made.layers,
                keys_offset=keys_at(target.spec, of_layer.source),
                scale=float(own.of(spec.architecture.layer_scale)),
            )
            layers.append(layer)
        self._layers = NativeLayers(engine, spec, embedding, None, layers, target.pool)
        norm = norm_weights(weights, spec.names.norm, spec)
        self._join = made.linear(engine, weights, INPUT, made.layers)
        self._next = made.linear(engine, weights, OUTPUT, made.layers, norm)
        if stored.clusters:
            self.head = ClusteredHead(
                Norm(Affine(norm.weight.float(), None), spec.eps),
                centroids=weights.of(CENTROIDS),
                table=weights.of(spec.head_name),
                order=stored.take(ORDER).long(),
                chosen=stored.chosen,
            )
        else:
            self.head = made.linear(engine, weights, spec.head_name, made.head, norm)

    def run(self, layers: Layers, states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        entered = self._join(_entries(states[..., : self._hidden], before))
        last = Places(places.cache, [max(0, start - 1) for start in places.origins], places.counts)
        return self._layers.run_layers(entered, 0, len(self._layers.layers), last)

    def features(
        self, model: Backend, states: Mapping[int, Tensor], finals: Tensor
    ) -> Tensor | None:
        return model.normed(finals)

    def own_feature(self, hidden: Tensor) -> Tensor | None:
        return self._next(hidden)


class ClusteredHead:
    """Logits (N, V) of states (N, D), -inf outside the chosen clusters."""

    def __init__(
        self, norm: Norm, centroids: Tensor, table: Tensor, order: Tensor, chosen: int
    ) -> None:
        """`centroids` (C, D); `table` (V, D) by token; `order` (V,): token ids, cluster by
        cluster.
        """
        self._norm = norm
        self._centroids = centroids.float()
        self._chosen = chosen
        self._ids = order.view(len(centroids), -1)
        self._rows = table[self._ids].flatten(1)  # (C, V/C * D)

    def __call__(self, hidden: Tensor) -> Tensor:
        normed = self._norm(hidden)
        best = (normed @ self._centroids.T).topk(self._chosen).indices
        # Indexing takes five times as long
        rows = torch.embedding(self._rows, best).view(len(normed), -1, normed.shape[1])
        scores = rows.float() @ normed[..., None]
        logits = normed.new_full((len(normed), self._ids.numel()), -torch.inf)
        return logits.scatter_(1, self._ids[best].flatten(1), scores[..., 0])
