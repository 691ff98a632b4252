"""`Backend` on repacked weights, by PyTorch's kernels: faster than transformers' layers, on every device."""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..config.checks import require_choice
from ..config.packing import EXACT_TOKENS, PackingConfig, Quantization
from .cache import KVCache, SpanWriter
from .draft_vocabulary import DraftVocabulary
from .exit_blocks import NO_BLOCKS, ExitBlock, ExitBlocks, with_blocks
from .low_bit import named_int4
from .repack import repack
from .rope import Rope
from .spans import CHUNK, run_in_parts, tokens_at_once, write_kv_in_parts
from .spec import EMBEDDING, ModelSpec
from .torch_layer import Masks, Step, TorchLayer, Workspace, missing_feature
from .torch_linear import ExactRows, KernelLinear, Linear, Norm, linear
from .weights import NormWeights, Take, Weights, checked, taken_from

GRAPHS = "LAYERSKIP_CUDA_GRAPHS"  # environment variable: whether decoding on a GPU records its passes
_KEPT_ROWS = CHUNK // 2  # calls of up to this many rows keep their buffers
_KEPT = 16  # shapes of calls whose buffers are kept
_PRODUCT_TOKENS = 16  # up to this many tokens per row attention is two matrix products; a prompt's mask would be large


def graphs_are_on() -> bool:
    """What the environment says. Raises ConfigError if that is neither on nor off."""
    asked = os.environ.get(GRAPHS) or "on"
    require_choice(asked, GRAPHS, ("on", "off"))
    return asked == "on"


def can_repack(spec: ModelSpec) -> bool:
    """Whether TorchBackend supports every part of this architecture."""
    return missing_feature(spec) is None


class TorchBackend:
    """The operations and results of `TransformersBackend`, for inference only. Not for two threads at once."""

    chooser = None

    def __init__(
        self,
        spec: ModelSpec,
        take: Take,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
        exit_blocks: ExitBlocks = NO_BLOCKS,
    ) -> None:
        """Repacks the weights of an architecture that `can_repack`.

        Args:
            spec: of the model.
            take: gives its weights by their names in a checkpoint; each is taken once.
            packing: low bits, and what drafts.
            token_order: ids, the most frequent first, which `draft_vocab` counts; None for the tokenizer's order.
            int4: calibrated weights as rows of bytes, for int4 layers and heads; the others are rounded to nearest.
            exit_blocks: those of the model's exits.

        Raises:
            CheckpointError: a weight is missing, has another shape, or is not finite.
            ConfigError: no kernel does what `packing` asks for.
        """
        packing = packing or PackingConfig()
        self.spec, self._chain_spec = spec, with_blocks(spec, exit_blocks.blocks)
        weights = Weights(checked(take, spec.shapes), spec.shapes)
        with torch.inference_mode():
            embedding = weights.of(EMBEDDING)
            packer = _Packer(spec, self._chain_spec, renormed=bool(exit_blocks.blocks))
            packed = repack(weights, embedding, spec, packing, token_order, packer, int4, exit_blocks)
            layers_of = partial(TorchLayers, self._chain_spec, embedding, Rope(spec, embedding))
            self._layers, self._head = layers_of(packed.target.layers, packing.exact), packed.target.head
            self.exit_blocks, self.normed = packed.target.blocks, packed.normed
            self.draft_sides = packed.draft_sides(self._layers, lambda layers: layers_of(layers, False))
        self.implementation = named_int4(_implementation(packing, self._head, self._layers), int4 is not None)
        self.num_layers, self.hidden_size, self.vocab_size = spec.layers, spec.hidden, spec.vocab
        self.max_positions, self.exact, self.batch_invariant = spec.context, packing.exact, packing.exact
        self.device, self.dtype = embedding.device, embedding.dtype
        self.recordable = self.device.type == "cuda" and not packing.exact and graphs_are_on()
        if self.recordable:
            self.implementation += ", CUDA graphs"

    @classmethod
    def of(
        cls,
        model: nn.Module,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
        exit_blocks: ExitBlocks = NO_BLOCKS,
    ) -> "TorchBackend":
        """Takes the weights of a transformers model, which can no longer run afterwards."""
        return cls(ModelSpec.of(model.config), taken_from(model), packing, token_order, int4, exit_blocks)

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        return KVCache.of(self._chain_spec, batch_size, max_positions)

    def embed(self, ids: Tensor) -> Tensor:
        return self._layers.embed(ids)

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        return run_in_parts(self._layers, hidden, start, stop, positions, cache)

    def write_kv(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        write_kv_in_parts(self._layers, hidden, start, stop, positions, cache)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)


class TorchLayers:
    """`Layers` of a model whose hidden states have the precision of its weights. Not for two threads at once."""

    def __init__(self, spec: ModelSpec, embedding: Tensor, rope: Rope, layers: list[TorchLayer | None], exact: bool) -> None:
        """`exact`: calls are split so that a token of a single row has the same bits alone as among others.

        `layers`: None where this copy lacks one; the first is there.
        """
        self.num_layers, self.max_positions = len(layers), spec.context
        self.device, self.dtype = embedding.device, embedding.dtype
        self.layers = layers
        self._spec, self._embedding, self._rope = spec, embedding, rope
        self._kinds = spec.kinds
        self._embedding_scale = float(torch.tensor(spec.embedding_scale).to(embedding.dtype))  # as transformers rounds it
        self._masks = Masks(spec, embedding)
        self._exact = ExactRows() if exact else None
        self._spaces: dict[tuple[int, int], Workspace] = {}

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Those of the first layer."""
        return self._span(0, 1)[0].linears

    def embed(self, ids: Tensor) -> Tensor:
        hidden = torch.embedding(self._embedding, ids)
        return hidden if self._embedding_scale == 1 else hidden * self._embedding_scale

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        return run_in_parts(self, hidden, start, stop, positions, cache)

    def tokens_at_once(self, batch: int, count: int) -> int:
        """How many of each row's `count` tokens run at once."""
        if self._exact is not None and 1 < count <= EXACT_TOKENS:
            return self._exact.at_once(self._same_alone)
        return tokens_at_once(batch, count, self._row_bytes)

    def run(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> Tensor:
        """As `run_layers`, in one part."""
        batch, count, size = hidden.shape
        writer = cache.writer(positions)
        space = self._workspace(batch, count, cache)
        slots = writer.layers(start, stop, self._spec.kv_heads, self._spec.head_dim, hidden)
        step = self._step(writer, positions, slots[0].values.shape[1])
        rows = hidden.reshape(batch * count, size).clone()
        for layer, kind, held in zip(self._span(start, stop), self._kinds[start:stop], slots, strict=True):
            layer.run_(rows, step, kind, held, space)
        return rows.view(batch, count, size)

    def write_kv(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        """As `Backend.write_kv`, in one part."""
        batch, count, size = hidden.shape
        writer = cache.writer(positions)
        space = self._workspace(batch, count, cache)
        slots = writer.layers(start, stop, self._spec.kv_heads, self._spec.head_dim, hidden)
        step = self._step(writer, positions, slots[0].values.shape[1])
        for layer, held in zip(self._span(start, stop), slots, strict=True):
            layer.write_kv(hidden.reshape(batch * count, size), step, held, space)

    def _span(self, start: int, stop: int) -> list[TorchLayer]:
        layers = [layer for layer in self.layers[start:stop] if layer is not None]
        assert len(layers) == stop - start
        return layers

    def _step(self, writer: SpanWriter, positions: Tensor, capacity: int) -> Step:
        on_device = positions.to(self.device, non_blocking=True)
        ropes, still = self._rope.at(writer, on_device), self._rope.still
        batch, count = positions.shape
        if self._exact is not None and batch == 1 and count <= EXACT_TOKENS:
            spans = self._masks.spans(positions[0].tolist())
            return Step(ropes, still, dict.fromkeys(spans), spans, writer.stop)
        by_products = count <= _PRODUCT_TOKENS and self.device.type == "cpu"
        keys = capacity if by_products else writer.stop
        masks = self._masks.by_kind(writer, on_device, keys, by_products)
        return Step(ropes, still, masks, None, None if by_products else writer.stop)

    def _workspace(self, batch: int, count: int, cache: KVCache) -> Workspace:
        """Kept for the shapes that decoding repeats, not for prompts. A pass that is recorded has its own."""
        space = None if cache.is_recorded else self._spaces.get((batch, count))
        if space is None:
            space = Workspace(batch, count, self._span(0, 1)[0], self._embedding)
            if batch * count <= _KEPT_ROWS and not cache.is_recorded:
                if len(self._spaces) >= _KEPT:
                    self._spaces.pop(next(iter(self._spaces)))
                self._spaces[batch, count] = space
        return space

    def _same_alone(self, count: int) -> bool:
        """Whether a layer gives `count` random rows what it gives each alone. All layers have the same shapes."""
        generator = torch.Generator(self.device).manual_seed(count)
        size = self._embedding.shape[1]
        hidden = torch.randn(1, 24 + count, size, generator=generator, device=self.device).to(self.dtype)
        positions = torch.arange(24 + count)[None]
        cache = KVCache(self.num_layers, 1, 24 + count)
        self.run(hidden[:, :24], 0, 1, positions[:, :24], cache)
        together = self.run(hidden[:, 24:], 0, 1, positions[:, 24:], cache)
        alone = [self.run(hidden[:, [at]], 0, 1, positions[:, [at]], cache) for at in range(24, 24 + count)]
        return torch.equal(together, torch.cat(alone, dim=1))

    def _row_bytes(self) -> int:
        """About what the activations of a token take in a layer."""
        spec = self._spec
        return 4 * (2 * spec.queries + 2 * spec.keys + 3 * spec.inner + 4 * spec.hidden)


class TorchHead:
    """Norm and head (N, D)."""

    def __init__(self, norm: Norm, linear: Linear, unfolded: Linear | None, spec: ModelSpec, exact: bool) -> None:
        """`linear`: of the head with the norm folded into it; `unfolded`: the same without, for other norms."""
        self._spec = spec
        self._norm, self.linear, self._unfolded = norm, linear, unfolded
        self._exact = ExactRows() if exact else None

    def with_norm(self, norm: NormWeights) -> "TorchHead":
        """The same matrix after another norm."""
        assert self._unfolded is not None
        unfolded = Norm(norm, self._spec.eps, folds=False)
        return TorchHead(unfolded, self._unfolded, self._unfolded, self._spec, self._exact is not None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) to logits (..., N)."""
        *shape, size = hidden.shape
        rows = hidden.reshape(-1, size)
        if self._exact is not None and 1 < len(rows) <= EXACT_TOKENS:
            most = self._exact.at_once(partial(self._same_alone, rows))
            logits = torch.cat([self._logits(part) for part in torch.split(rows, most)])
        else:
            logits = self._logits(rows)
        return logits.view(*shape, logits.shape[-1])

    def _logits(self, rows: Tensor) -> Tensor:
        return self._spec.scaled_logits(self.linear(self._norm(rows)))

    def _same_alone(self, like: Tensor, count: int) -> bool:
        generator = torch.Generator(like.device).manual_seed(count)
        rows = torch.randn(count, like.shape[1], generator=generator, device=like.device).to(like.dtype)
        return torch.equal(self._logits(rows), torch.cat([self._logits(row[None]) for row in rows]))


class _Packer:
    """The `Packer` of PyTorch's kernels."""

    def __init__(self, spec: ModelSpec, chain_spec: ModelSpec, renormed: bool) -> None:
        """`renormed`: heads get other norms too, so that they are needed without the final norm folded into them."""
        self._spec, self._chain_spec, self._renormed = spec, chain_spec, renormed

    def layer(self, weights: Weights, index: int, low_bits: Quantization | None, exact: bool) -> TorchLayer:
        return TorchLayer(weights, self._chain_spec, index, low_bits, exact)

    def head(
        self, norm: NormWeights, weights: Weights, rows: DraftVocabulary | None, low_bits: Quantization | None, exact: bool
    ) -> TorchHead:
        whole = weights.of(self._spec.head_name)
        weight = whole if rows is None else rows.rows_of(whole)
        folding = Norm(norm, self._spec.eps, low_bits is None and weight.dtype.itemsize >= 4)
        folded = folding.folded_into(weight)
        product = linear(folded, None, low_bits, exact)
        unfolded = product if folded is weight else linear(weight, None, low_bits, exact) if self._renormed else None
        return TorchHead(folding, product, unfolded, self._spec, exact)

    def join(self, weights: Weights, block: ExitBlock, low_bits: Quantization | None) -> Callable[[Tensor], Tensor]:
        product = linear(weights.of(block.input_name), None, low_bits)

        def joined(states: Tensor) -> Tensor:
            """(..., 2D) to (..., D)."""
            *shape, size = states.shape
            return product(states.reshape(-1, size)).view(*shape, -1)

        return joined

    def norm(self, weights: NormWeights) -> Norm:
        return Norm(weights, self._spec.eps, folds=False)


def _implementation(packing: PackingConfig, head: TorchHead, layers: TorchLayers) -> str:
    prepacked = any(isinstance(part, KernelLinear) for part in (head.linear, *layers.linears))
    kernels = f"packed ({packing.quantize or 'oneDNN'})" if prepacked else "packed"
    return kernels + packing.drafting + (", exact" if packing.exact else "")
