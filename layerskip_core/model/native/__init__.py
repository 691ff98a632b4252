"""`Backend` on the C kernels, if they were built and the CPU can run them."""

from collections.abc import Callable, Sequence
from functools import partial
from math import frexp
from typing import Any

import torch
from torch import Tensor

from ...config.model import PackingConfig, Quantization
from ...config.resolution import MOST_DRAFTS
from ...errors import CheckpointError
from ..backend import DraftKernel, choose_by_head
from ..cache import Places
from ..configuration import SLIDING
from ..eagle3 import UNSUITED, Eagle3Weights
from ..exit_blocks import INPUT_NORMS, MTP, DraftBlock, ExitBlocks
from ..noise import Noise
from ..pages import PAGE, PagePool
from ..repacked import RepackedBackend
from ..spec import AnySpec, ModelSpec
from ..torch_layer import missing_feature
from ..torch_linear import Norm
from ..vocabulary import DraftVocabulary
from ..weights import GROUP_SIZE, Affine, Take, Weights, head_weights, norm_weights
from .compiled import MOST_ROPES, kernels
from .drafters import NativeAssistant, NativeEagle3, Target
from .heads import NativeLinear, choose, draft
from .layers import KEPT_ROWS, Engine, NativeLayer, NativeLayers, NativeNorm, NativeTokenInputs
from .matrix import HugePages, MatrixForm, NativeMatrix, PackMatrix
from .noise import perturbed
from .recurrence import LARGEST_KEY, MOST_TAPS, memory_of

_LARGEST_HEAD = 512
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
    if (
        not isinstance(spec, ModelSpec)
        or missing_feature(spec, native=True) is not None
        or not spec.attending
    ):
        return False
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if len(spec.ropes) > MOST_ROPES or (spec.experts is not None and not spec.experts.are_equal):
        return False
    low_bit = packing is not None and bool(packing.quantize or packing.draft_weights)
    divisor = GROUP_SIZE if low_bit else 2
    layers = [spec.of_layer(layer) for layer in range(spec.layers)] if spec.sizes else [spec]
    odd_or_large = (
        of_layer.head_dim > _LARGEST_HEAD or of_layer.head_dim % 2 for of_layer in layers
    )  # bf16 comes in pairs
    if any(odd_or_large) or spec.token_width > spec.hidden:
        return False
    widths = [spec.hidden, spec.token_width, spec.experts.inner if spec.experts else spec.inner]
    widths += [width for of_layer in layers for width in (of_layer.inner, of_layer.queries)]
    if (recurrence := spec.recurrence) is not None:
        if recurrence.taps > MOST_TAPS or recurrence.key_dim > LARGEST_KEY:
            return False
        widths.append(recurrence.outputs)
    return not any(width % divisor for width in widths)


class NativeBackend(RepackedBackend):
    """Repacked weights on the C kernels, for an architecture that `suits_kernels`. Hidden states
    are always fp32.
    """

    batch_invariant = True  # without splitting calls

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
            NativeMatrix.packed, compiled, empty=HugePages().empty, narrows=compiled.widens_bf16
        )
        self._kernels = compiled
        self._packed = packed
        self._is_packed_file = pack is not None
        if pack is None:
            pack = packed if through is None else through(packed)
        self._pack = pack
        self._scales = dict[int, float]()  # by layer
        super().__init__(spec, take, *arguments, **options)
        # Arithmetic grows with cores, memory bandwidth hardly beyond two
        if not compiled.has_cheap_rows:
            self.row_cost = (
                _ROW_COSTS[self._head.matrix.form.kind] * 2 / max(torch.get_num_threads(), 2)
            )
        # Division and caps may round different logits to a tie; division by a power of two does
        # not.
        self._is_plain = frexp(spec.logits_divisor)[0] == 0.5 and spec.logits_cap is None

    @property
    def room(self) -> int:
        return self.room_for(MOST_DRAFTS)

    def room_for(self, num_draft_tokens: int) -> int:
        pages = self._pool.most - self._pool.pages_of_memory(self._pool.slots_for(num_draft_tokens))
        return int(min(self.spec.context, max(0, pages) * PAGE))

    @property
    def bytes_read(self) -> float:
        """Bytes of weights that a step of one token reads, with scales and biases; only the chosen
        experts.
        """
        assert isinstance(self._layers, NativeLayers)
        matrices: list[NativeMatrix] = [self._head.matrix]
        matrices += (matrix for layer in self._layers.layers for matrix in layer.matrices)
        chosen = self.spec.experts.choices if self.spec.experts else 1
        held = (
            (sum(part.nbytes for part in matrix.parts.values()), matrix.form.experts)
            for matrix in matrices
        )
        return sum(size * min(1.0, chosen / experts) for size, experts in held)

    def choose(
        self,
        tokens: Tensor,
        states: Tensor | None,
        start: int,
        stop: int,
        kept: Sequence[int],
        places: Places,
        noise: Noise | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        is_plain = self._is_plain and (noise is None or self.spec.logits_divisor == 1)
        if not is_plain or sum(places.counts) > KEPT_ROWS:
            return choose_by_head(self, tokens, states, start, stop, kept, places, noise, perturbed)
        assert isinstance(self._layers, NativeLayers)
        return choose(self._layers, self._head, tokens, states, start, stop, kept, places, noise)

    def limit_memory(self, kv_bytes: int) -> None:
        """Limits the memory of KV entries from now on; a draft model gets as many pages as this
        one.
        """
        pools = [
            model._pool for model in (self, self.draft_model) if isinstance(model, NativeBackend)
        ]
        pages = kv_bytes // sum(pool.page_bytes for pool in pools)
        for pool in pools:
            pool.most = pages

    def _prepare(self, packing: PackingConfig, weights: Weights) -> None:
        self._unrounded = "bf16" if self._embedding.dtype == torch.bfloat16 else "fp32"
        self._engine = Engine(self._kernels, self.spec, self._embedding.dtype)
        spec = self._chain_spec
        self._inputs = None
        if (inputs := self.spec.token_inputs) is not None:
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

    def _described(self, packing: PackingConfig) -> str:
        precision = packing.quantize or ("as stored" if self._stored else None)
        return f"native ({', '.join(filter(None, (self._kernels.variant, precision)))}){packing.drafting}"

    def _layer(
        self, weights: Weights, index: int, low_bits: Quantization | None, exact: bool
    ) -> NativeLayer:
        # Packed files have no drafters
        pack = self._packed if weights.prefix.startswith(MTP.prefix) else self._pack
        made = NativeLayer(pack, weights, self._chain_spec, index, low_bits or self._unrounded)
        like = index if index < self.spec.layers else self.spec.attending[-1]
        if like == index and (name := self.spec.architecture.layer_scale):
            self._scales[index] = float(weights.of(name))
        made.structure.slice, made.structure.scale = like, self._scales.get(like, 1.0)
        return made

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
        return NativeLinear(
            self._engine, matrix if rows is None else matrix.rows_of(rows), norm, spec
        )

    def _join(self, weights: Weights, low_bits: Quantization | None) -> NativeLinear:
        form = MatrixForm(low_bits or self._unrounded, 2 * self.spec.hidden, self.spec.hidden)
        join = NativeLinear(
            self._engine,
            self._packed("mtp.input", form, lambda: [Affine(weights.of("input.weight"), None)]),
        )
        join.input_norms = [NativeNorm(norm_weights(weights, of, self.spec)) for of in INPUT_NORMS]
        return join

    def _drafter_kinds(
        self, packing: PackingConfig
    ) -> tuple[Quantization | None, Quantization | None]:
        kind, of_head = packing.drafter
        if self._is_packed_file:  # it holds the head in few precisions
            of_head = (packing.draft_head or "int8") if packing.draft_weights else packing.quantize
        fits = suits_kernels(
            self.spec, self._embedding.dtype, torch.device("cpu"), PackingConfig("int8")
        )
        return (kind, of_head) if fits else (packing.quantize,) * 2

    def _drafters(self, exit_blocks: ExitBlocks, packing: PackingConfig) -> dict[str, DraftBlock]:
        found = super()._drafters(exit_blocks, packing)
        if (assistant := exit_blocks.assistant) is not None:
            found["mtp"] = NativeAssistant(self._target(self.spec, packing), assistant)
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
        norm = Norm(
            Affine(weights.weight.float(), None if weights.bias is None else weights.bias.float()),
            self.spec.eps,
        )
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
