"""A drafter in the EAGLE-3 layout on the C kernels: a whole greedy draft is one call, and so are the entries of many tokens."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.model import Quantization
from ..architectures import ARCHITECTURES
from ..backend import DraftEnds, DraftHead, Submodel
from ..cache import Places
from ..configuration import FULL
from ..eagle3 import FC, HEAD, HIDDEN_NORM, LAYER, NORM, Eagle3Form, Eagle3Weights, frequencies
from ..pages import PagePool
from ..spec import ModelSpec
from ..vocabulary import DraftVocabulary
from ..weights import GROUP_SIZE, Affine, Weights
from .compiled import Kernels
from .heads import NativeLinear, draft
from .layers import Engine, EntryLayers, NativeLayer
from .matrix import MatrixForm, PackMatrix

if TYPE_CHECKING:
    from ..backend import Backend, Layers


class NativeEagle3:
    """As PlacedEagle3, of a NativeBackend."""

    needs_feature = True

    def __init__(
        self,
        kernels: Kernels,
        pack: PackMatrix,
        stored: Eagle3Weights,
        spec: ModelSpec,
        embedding: Tensor,
        pool: PagePool,
        place: int,
        low_bits: tuple[Quantization | None, Quantization | None],
    ) -> None:
        """`spec`, `embedding`, `pool`: the target's. `low_bits`: of its layer and of its head, if the kernels have these for
        its widths; else its weights are as the embedding, or in fp32.
        """
        form = stored.form
        widths = form.hidden, form.inner, form.heads * form.head_dim
        unrounded = "bf16" if embedding.dtype == torch.bfloat16 and form.inner % 2 == 0 else "fp32"
        fits = not any(width % GROUP_SIZE for width in widths)
        layer_kind, head_kind = (kind if fits and kind is not None else unrounded for kind in low_bits)
        dtype = torch.bfloat16 if unrounded == "bf16" else torch.float32
        weights = {name: weight.to(dtype) for name, weight in stored.weights.items()}
        self._form, self._norms = form, {name: weight.float() for name, weight in weights.items() if weight.dim() == 1}
        self._spec = spec = _layer_spec(form, spec)
        self._engine = engine = Engine(kernels, spec, embedding.dtype, lambda count: [_rotations(form, count)])
        engine.make_room(len(form.layers) * form.hidden)
        engine.shape.norms_residual = form.norm_before_residual

        def linear(name: str, kind: str, norm: Affine | None = None) -> NativeLinear:
            outputs, inputs = form.shapes[name]
            matrix = pack(f"eagle3.{name}", MatrixForm(kind, inputs, outputs), lambda: [Affine(weights[name], None)])
            return NativeLinear(engine, matrix, norm)

        of_layer = Weights(weights.get, form.shapes, LAYER)
        layer = NativeLayer(pack, of_layer, spec, place, layer_kind, Affine(weights[HIDDEN_NORM], None))
        self._layers = EntryLayers(engine, spec, embedding, None, [None] * place + [layer], pool)
        self._fc, self.head = linear(FC, layer_kind), linear(HEAD, head_kind, Affine(weights[NORM], None))
        self._place, self.taps = place, (0, *form.layers)
        self.vocabulary = DraftVocabulary(spec.vocab, form.vocab, stored.tokens.tolist())

    def run(self, layers: "Layers", states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        return self._layers.run_layers(_entries(states, before), self._place, self._place + 1, places.moved(-1))

    def write(self, model: "Backend", states: Mapping[int, Tensor], before: Tensor | None, places: Places) -> None:
        self._layers.write_kv(_entries(states[0], before), self._place, self._place + 1, places.moved(-1))

    def features(self, model: "Backend", states: Mapping[int, Tensor], finals: Tensor) -> Tensor | None:
        return self._fc(self._form.fc_input([states[tap] for tap in self.taps[1:]], self._normed))

    def own_feature(self, hidden: Tensor) -> Tensor | None:
        return self._normed(NORM, hidden) if self._form.norm_output else hidden

    def _normed(self, name: str, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden.float(), hidden.shape[-1:], self._norms[name], self._form.eps)

    def kernel(
        self,
        head: DraftHead,
        token: Tensor,
        submodel: Submodel,
        places: Places,
        ends: DraftEnds,
        feature: Tensor | None,
        runs_last: bool,
    ) -> tuple[Tensor, dict[int, Tensor], list[float]]:
        """A `DraftKernel`."""
        layer = replace(submodel, block=None, beyond=((self._place, self._place + 1),))
        entries, norms = places.moved(-1), self._form.norm_output
        return draft(self._layers, self._spec, head, token, layer, entries, ends, feature, runs_last, norms)


def _entries(states: Tensor, before: Tensor | None) -> Tensor:
    assert before is not None
    return torch.cat((states, before), dim=-1)


def _layer_spec(form: Eagle3Form, spec: ModelSpec) -> ModelSpec:
    """Of the drafter's layer, a layer of Llama beside a target."""
    count = spec.layers
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
        window=None,
        rope_of=(0,) * count,
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
        clip=None,
    )


def _rotations(form: Eagle3Form, count: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(count, dtype=torch.float32), frequencies(form))
    return angles.cos(), angles.sin()
