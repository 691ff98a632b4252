"""`Backend` on the C kernels, if they were built and the CPU can run them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import frexp, prod
from typing import Any

import torch
from torch import Tensor

from ...config.model import PackingConfig, Quantization
from ...config.resolution import MOST_DRAFTS
from ...errors import CheckpointError
from ..backend import Chosen, DraftBlock, DraftKernel, TokenPass, choose_by_head
from ..configuration import SLIDING
from ..eagle3 import UNSUITED, Eagle3Weights
from ..exit_blocks import INPUT_NORMS, MTP, StoredDrafters
from ..pages import PAGE, PagePool
from ..repacked import RepackedBackend
from ..spec import AnySpec, ModelSpec
from ..torch_layer import missing_feature
from ..torch_linear import Norm
from ..vocabulary import DraftVocabulary
from ..weights import GROUP_SIZE, Affine, Take, Weights, head_weights, norm_weights
from .compiled import MOST_ROPES, Kernels, kernels
from .drafters import NativeAssistant, NativeEagle3, Target
from .heads import NativeLinear, choose, draft
from .layers import KEPT_ROWS, Engine, NativeLayer, NativeLayers, NativeNorm, NativeTokenInputs
from .matrix import HugePages, MatrixForm, NativeMatrix, PackMatrix
from .noise import perturbed
from .recurrence import LARGEST_KEY, MOST_TAPS, memory_of

_LARGEST_HEAD = 512
LEAST_CODED = 48 << 20  # weights: those of a smaller model may live in the caches
# AVX2 and NEON on two cores, see `Backend.row_cost`
_ROW_COSTS = {"fp32": 0.15, "bf16": 0.25, "widened": 0.25, "int8": 0.3, "int4": 0.3, "stored": 0.4}


def can_run_native(
    spec: AnySpec, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None
) -> bool:
    """Whether the kernels are built and can run this architecture in this precision."""
    return suits_kernels(spec, dtype, device, packing) and kernels() is not None


def suits_kernels(
    spec: AnySpec, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None
) -> bool:
    """Whether the kernels, if built, run this architecture, its widths and this precision."""
    if not isinstance(spec, ModelSpec) or missing_feature(spec, native=True) is not None:
        return False
    if not spec.attending:
        return False
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if len(spec.ropes) > MOST_ROPES or spec.token_width > spec.hidden:
        return False
    widths = [spec.hidden, spec.token_width, spec.inner]
    if spec.experts is not None:
        if not spec.experts.are_equal:
            return False
        widths[-1] = spec.experts.inner
    for layer in range(spec.layers if spec.sizes else 1):
        of_layer = spec.of_layer(layer)
        if of_layer.head_dim > _LARGEST_HEAD or of_layer.head_dim % 2:  # bf16 comes in pairs
            return False
        widths += [of_layer.inner, of_layer.query_width]
    recurrence = spec.recurrence
    if recurrence is not None:
        if recurrence.kernel_size > MOST_TAPS or recurrence.key_dim > LARGEST_KEY:
            return False
        widths.append(recurrence.outputs)
    low_bit = packing is not None and bool(packing.quantize or packing.draft_weights)
    divisor = GROUP_SIZE if low_bit else 2
    return not any(width % divisor for width in widths)


def codes_weights(kernels: Kernels, spec: ModelSpec) -> bool:
    """Whether bf16 weights take 12 bits: where passes are bound by memory, and decode faster."""
    return kernels.codes_bf16 and sum(map(prod, spec.shapes.values())) >= LEAST_CODED


class NativeBackend(RepackedBackend):
    """Repacked weights on the C kernels, for an architecture that `suits_kernels`. Hidden states
    are always fp32.
    """

    batch_invariant = True  # without splitting calls
    row_cost = 0.11

    def __init__(
        self,
        spec: ModelSpec,
        take: Take,
        *arguments: Any,
        pack: PackMatrix | None = None,
        through: Callable[[PackMatrix], PackMatrix] | None = None,
        **options: Any,
    ) -> None:
        """As `RepackedBackend`.

        `pack`: returns matrices (from a packed file); None: packs weights in memory. `through`:
        what to call in place of the function that packs in memory; it must give the same matrices
        (from a cache).
        """
        compiled = kernels()
        assert compiled is not None
        packed = partial(
            NativeMatrix.packed,
            compiled,
            empty=HugePages().empty,
            narrows=compiled.widens_bf16,
            codes=codes_weights(compiled, spec),
        )
        self._kernels = compiled
        self._packed = packed
        self._is_packed_file = pack is not None
        if pack is None:
            pack = packed
            if through is not None:
                pack = through(packed)
        self._pack = pack
        super().__init__(spec, take, *arguments, **options)
        if not compiled.has_cheap_rows:
            # More cores compute faster, but beyond two they hardly read memory faster
            threads = max(torch.get_num_threads(), 2)
            self.row_cost = _ROW_COSTS[self._head.matrix.form.kind] * 2 / threads
        # Division and caps may round different logits to a tie; division by a power of two does
        # not.
        self._is_plain = frexp(spec.logits_divisor)[0] == 0.5 and spec.logits_cap is None

    def context_length(self, num_draft_tokens: int = MOST_DRAFTS) -> int:
        pages = self._pool.most - self._pool.pages_of_memory(self._pool.slots_for(num_draft_tokens))
        return int(min(self.spec.context, max(0, pages) * PAGE))

    @property
    def bytes_read(self) -> float:
        """Bytes of weights that a step of one token reads, with scales and biases; only the chosen
        experts.
        """
        chosen = 1
        if self.spec.experts is not None:
            chosen = self.spec.experts.choices
        read = 0.0
        for matrix in self._matrices:
            size = sum(part.nbytes for part in matrix.parts.values())
            read += size * min(1.0, chosen / matrix.form.experts)
        return read

    @property
    def _matrices(self) -> list[NativeMatrix]:
        matrices: list[NativeMatrix] = [self._head.matrix]
        for layer in self._layers.layers:
            matrices += layer.matrices
        return matrices

    def choose(self, step: TokenPass) -> Chosen:
        is_plain = self._is_plain and (step.noise is None or self.spec.logits_divisor == 1)
        if not is_plain or sum(step.places.counts) > KEPT_ROWS:
            return choose_by_head(self, step, perturbed)
        assert isinstance(self._layers, NativeLayers)
        return choose(self._layers, self._head, step)

    def limit_memory(self, kv_bytes: int) -> None:
        """Limits the memory of KV entries from now on; a draft model gets as many pages as this
        one.
        """
        pools = [self._pool]
        if isinstance(self.draft_model, NativeBackend):
            pools.append(self.draft_model._pool)
        pages = kv_bytes // sum(pool.page_bytes for pool in pools)
        for pool in pools:
            pool.most = pages

    def _prepare(self, packing: PackingConfig, weights: Weights) -> None:
        self._unrounded = "bf16" if self._embedding.dtype == torch.bfloat16 else "fp32"
        self._engine = Engine(self._kernels, self.spec, self._embedding.dtype)
        self._layer_scales = [1.0] * self.spec.layers
        scale = self.spec.architecture.layer_scale
        if scale is not None:
            for layer in range(self.spec.layers):
                name = self.spec.layer_prefix(layer) + scale
                self._layer_scales[layer] = float(weights.of(name))
        spec = self._chain_spec
        self._inputs = None
        inputs = self.spec.token_inputs
        if inputs is not None:
            kind = packing.quantize or self._unrounded
            table = weights.of(inputs.table)
            self._inputs = NativeTokenInputs(
                self._pack, weights, self.spec, table, self._embedding, kind
            )
        sizes = [(spec.kv_heads, spec.of_layer(layer).head_dim) for layer in spec.attending]
        slides = {*spec.kinds} == {SLIDING}
        self._pool = PagePool(
            sizes, self._embedding.dtype, memory_of(spec), spec.window if slides else None
        )

    @property
    def in_12_bits(self) -> bool:
        """Whether bf16 weights are in 12 bits."""
        return any(matrix.form.exceptions is not None for matrix in self._matrices)

    def _described(self, packing: PackingConfig) -> str:
        precision = ""
        if packing.quantize is not None:
            precision = f", {packing.quantize}"
        elif self._stored is not None:
            precision = ", as stored"
        elif self.in_12_bits:
            precision = ", bf16 in 12 bits"
        return f"native ({self._kernels.variant}{precision}){packing.drafting}"

    def _layer(
        self, weights: Weights, index: int, low_bits: Quantization | None, exact: bool
    ) -> NativeLayer:
        # Packed files have no drafters
        pack = self._packed if weights.prefix.startswith(MTP.prefix) else self._pack
        # An exit block has the scale, and the slice of token inputs, of the layer that it copies
        copied = index if index < self.spec.layers else self.spec.attending[-1]
        return NativeLayer(
            pack,
            weights,
            self._chain_spec,
            index,
            low_bits or self._unrounded,
            token_slice=copied,
            scale=self._layer_scales[copied],
        )

    def _head_of(
        self,
        norm: Affine,
        weights: Weights,
        rows: DraftVocabulary | None,
        low_bits: Quantization | None,
        exact: bool,
    ) -> NativeLinear:
        spec = self.spec
        form = MatrixForm(
            low_bits or self._unrounded, spec.hidden, spec.vocab, biased=spec.architecture.head_bias
        )
        matrix = self._pack("head", form, lambda: [head_weights(weights, spec)])
        if rows is not None and matrix.form.exceptions is None:
            matrix = matrix.rows_of(rows)
        elif rows is not None:
            chosen = matrix.decoded(self._kernels).mapped(rows.rows_of)
            form = replace(matrix.form, outputs=rows.count, exceptions=None)
            matrix = self._packed("head", form, lambda: [chosen])
        return NativeLinear(self._engine, matrix, norm, spec)

    def _join(self, weights: Weights, low_bits: Quantization | None) -> NativeLinear:
        form = MatrixForm(low_bits or self._unrounded, 2 * self.spec.hidden, self.spec.hidden)
        read = lambda: [Affine(weights.of("input.weight"), None)]  # noqa: E731
        join = NativeLinear(self._engine, self._packed("mtp.input", form, read))
        join.input_norms = [NativeNorm(norm_weights(weights, of, self.spec)) for of in INPUT_NORMS]
        return join

    def _drafter_kinds(
        self, packing: PackingConfig
    ) -> tuple[Quantization | None, Quantization | None]:
        cpu = torch.device("cpu")
        if not suits_kernels(self.spec, self._embedding.dtype, cpu, PackingConfig("int8")):
            return packing.quantize, packing.quantize
        kind, of_head = packing.drafter
        # A packed file holds the head in few precisions
        if self._is_packed_file and not packing.draft_weights:
            of_head = packing.quantize
        return kind, of_head

    def _drafters(self, stored: StoredDrafters, packing: PackingConfig) -> dict[str, DraftBlock]:
        found = super()._drafters(stored, packing)
        if stored.assistant is not None:
            target = self._target(self.spec, packing)
            found["mtp"] = NativeAssistant(target, stored.assistant)
        return found

    def _target(self, spec: ModelSpec, packing: PackingConfig) -> Target:
        return Target(
            self._kernels, self._packed, spec, self._embedding, self._pool, packing.drafter
        )

    def placed_eagle3(
        self, stored: Eagle3Weights, place: int, packing: PackingConfig
    ) -> NativeEagle3:
        if self._inputs is not None:
            raise CheckpointError(UNSUITED.format(self.spec.model_type))
        self._pool.window = None  # EAGLE-3's attention is full
        return NativeEagle3(self._target(self._chain_spec, packing), stored, place)

    def _norm(self, weights: Affine) -> Callable[[Tensor], Tensor]:
        """A norm in fp32, of hidden states without their token ids."""
        norm = Norm(weights.mapped(Tensor.float), self.spec.eps)
        return lambda hidden: norm(hidden[..., : self.spec.hidden])

    def _layers_of(self, layers: list[NativeLayer | None], exact: bool) -> NativeLayers:
        return NativeLayers(
            self._engine,
            self._chain_spec,
            self._embedding,
            self._learned,
            layers,
            self._pool,
            self._inputs,
        )

    def _draft_kernel(self, layers: NativeLayers) -> DraftKernel:
        return partial(draft, layers, self.spec)
