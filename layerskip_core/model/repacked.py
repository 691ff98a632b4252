"""The base of both backends on repacked weights: makes layers, heads and low-bit copies."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ..config.model import PackingConfig, Quantization
from .backend import (
    Backend,
    DraftBlock,
    DraftHead,
    DraftKernel,
    DraftSide,
)
from .cache import KVCache, Places
from .exit_blocks import (
    INPUT_NORMS,
    MTP,
    NO_STORED_DRAFTERS,
    ExitBlock,
    PlacedBlock,
    PlacedMtp,
    StoredDrafters,
    with_drafter_layers,
)
from .spec import ModelSpec
from .vocabulary import DraftVocabulary, exit_vocabulary
from .weights import Affine, Take, Weights, checked, named_int4, norm_weights, taken_from

CHUNK = 256  # tokens of a prompt per part of a call, which bounds the attention mask
MOST_BYTES = 1 << 28  # of activations in a part with several prompts


def rows_at_once(rows: int, row_bytes: Callable[[], int]) -> int:
    """Tokens per part of a call. `row_bytes`: approximate size of a token's activations."""
    return CHUNK if rows <= CHUNK else max(CHUNK, MOST_BYTES // row_bytes())


class RepackedLayers(ABC):
    """`Layers` by kernels that run a span of layers, for inference only; not thread-safe.

    Large calls are split into parts of at least 256 tokens and about 256 MB of activations.
    """

    def __init__(
        self,
        spec: ModelSpec,
        embedding: Tensor,
        learned: Tensor | None,
        layers: list[Any],
        dtype: torch.dtype,
    ) -> None:
        """`learned`: positions (context, D), added to the embedding. `layers`: the model's, then
        the exit blocks'; None if this copy lacks the layer. `dtype`: of hidden states.
        """
        self.learned = None if learned is None else learned.to(dtype)
        self.device = embedding.device
        self.embedding = embedding
        self.spec = spec
        self.layers = layers
        self.dtype = dtype
        # Rounded as transformers does
        self._scale = float(torch.tensor(spec.embedding_scale).to(embedding.dtype))

    def embed(self, ids: Tensor) -> Tensor:
        hidden = torch.embedding(self.embedding, ids).to(self.dtype)
        if self._scale == 1:
            return hidden
        return hidden * self._scale

    def placed(self, hidden: Tensor, places: Places) -> Tensor:
        """Adds learned positions, if the model has these, to embedded tokens (N, D)."""
        if self.learned is None:
            return hidden
        return hidden + self.learned[places.positions.to(self.device, non_blocking=True)]

    @abstractmethod
    def row_bytes(self) -> int:
        """Approximate bytes of a token's activations in a layer."""

    @abstractmethod
    def new_cache(self, batch_size: int, max_positions: int) -> KVCache: ...

    @abstractmethod
    def run(
        self, hidden: Tensor, start: int, end: int, places: Places, only_kv: bool = False
    ) -> Tensor:
        """As `run_layers`, or as `Backend.write_kv` if `only_kv`; for at least one token (N, D) and
        one layer.
        """

    def run_layers(self, hidden: Tensor, start: int, end: int, places: Places) -> Tensor:
        with torch.inference_mode():
            flat = hidden.reshape(-1, hidden.shape[-1])
            assert 0 <= start <= end <= len(self.layers)
            if start == end or not len(flat):
                return hidden
            if start == 0:
                flat = self.placed(flat, places)
            return self.run(flat, start, end, places).view(*hidden.shape[:-1], -1)

    def write_kv(self, hidden: Tensor, start: int, end: int, places: Places) -> None:
        with torch.inference_mode():
            if start < end and hidden.numel():
                self.run(hidden.reshape(-1, hidden.shape[-1]), start, end, places, only_kv=True)


class _DraftHeads(NamedTuple):
    """The heads of drafts in one precision."""

    whole: DraftHead  # after all layers
    at_exits: DraftHead  # may score fewer tokens


class _HeadParts(NamedTuple):
    """What all heads of a backend are made of."""

    norm: Affine
    weights: Weights
    few: DraftVocabulary | None  # the tokens that exits score in drafts; None: all
    trims_whole: bool  # whether `whole` scores only these too


@dataclass
class _Chain:
    """The first `depth` layers of the model and those of exit blocks, in one precision."""

    low_bits: Quantization | None
    exact: bool
    depth: int
    whole: DraftHead  # as in DraftSide
    at_exits: DraftHead
    layers: list[Any] = field(default_factory=list)  # None where this copy lacks one
    blocks: dict[int, PlacedBlock] = field(default_factory=dict)  # by exit


class RepackedBackend(Backend):
    """`Backend` on repacked weights, with the results of `TransformersBackend`, for inference only;
    not thread-safe.
    """

    spec: ModelSpec

    def __init__(
        self,
        spec: ModelSpec,
        take: Take,
        packing: PackingConfig | None = None,
        token_order: list[int] | None = None,
        int4: Take | None = None,
        stored_drafters: StoredDrafters = NO_STORED_DRAFTERS,
        embedding: Tensor | None = None,
        stored: Take | None = None,
    ) -> None:
        """Repacks the weights of an architecture that the backend's kernels support.

        Args:
            spec: of the model.
            take: gives its weights by their names in a checkpoint; each is taken once.
            packing: low bits and drafts.
            token_order: ids, the most frequent first, for `draft_vocab`; None: the tokenizer's
                order. With an order, exits draft among its first tokens by default, see `exit_vocabulary`.
            int4: calibrated weights as rows of bytes, for int4 layers and heads; without them
                weights are rounded to nearest.
            stored_drafters: the model's exit blocks and drafters.
            embedding: in place of the one from `take`.
            stored: rows of blocks of a GGUF file, for layers and heads without other low bits
                (compiled kernels only).

        Raises:
            CheckpointError: a weight is missing, has another shape, or is not finite.
            ConfigError: no kernel supports `packing`.
        """
        packing = packing or PackingConfig()
        self.spec = spec
        self.num_layers = spec.layers
        self._chain_spec = with_drafter_layers(spec, stored_drafters)
        self._calibrated = int4
        self._stored = stored and checked(stored, spec.shapes)
        # Exit blocks and MTP have norms of their own before the same head
        self._has_other_norms = bool(stored_drafters.blocks or stored_drafters.mtp)
        weights = Weights(checked(take, spec.shapes, spec.mapped), spec.shapes)
        with torch.inference_mode():
            if embedding is None:
                embedding = weights.of(spec.embedding_name)
            self._embedding = embedding
            self._learned = None
            if spec.names.positions is not None:
                self._learned = weights.of(f"{spec.names.positions}.weight")
            self._prepare(packing, weights)
            norm = norm_weights(weights, spec.names.norm, spec)
            self._normed = self._norm(norm)
            self._make(weights, norm, packing, token_order, stored_drafters)
        self.implementation = named_int4(self._described(packing), int4 is not None)

    def _make(
        self,
        weights: Weights,
        norm: Affine,
        packing: PackingConfig,
        token_order: list[int] | None,
        stored: StoredDrafters,
    ) -> None:
        """Makes the heads, the layers and all that drafts."""
        parts = self._head_parts(weights, norm, packing, token_order)
        self._head = self._made_head(parts, packing.quantize, exact=packing.exact)
        heads: dict[Quantization | None, _DraftHeads] = {}
        chains = self._chains(parts, packing, heads)
        self.exit_blocks: dict[int, PlacedBlock] = {}
        self._add_layers(chains, weights, stored)
        runners = [self._layers_of(chain.layers, chain.exact) for chain in chains]
        self._layers = runners[0]
        self.drafters = self._drafters(stored, packing)
        if stored.mtp is not None:
            low_bits, of_head = self._drafter_kinds(packing)
            if of_head not in heads:
                heads[of_head] = self._draft_heads(parts, of_head)
            self.drafters["mtp"] = self._placed_mtp(stored.mtp, low_bits, heads[of_head].at_exits)
        self._draft_sides: dict[Quantization | None, DraftSide] = {}
        for chain, layers in zip(chains, runners, strict=True):
            is_own = layers is self._layers
            self._draft_sides[None if is_own else chain.low_bits] = DraftSide(
                layers,
                chain.depth,
                chain.whole,
                chain.at_exits,
                chain.blocks,
                shares_states=is_own,
                kernel=self._draft_kernel(layers),
            )

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def draft_sides(self) -> dict[Quantization | None, DraftSide]:
        return self._draft_sides

    @classmethod
    def of(cls, model: nn.Module, *args: Any, **options: Any) -> Self:
        """Takes the weights out of a transformers model, which can no longer run."""
        return cls(ModelSpec.of(model.config), taken_from(model), *args, **options)

    def _new_cache(self, batch_size: int, max_positions: int) -> KVCache:
        return self._layers.new_cache(batch_size, max_positions)

    def embed(self, ids: Tensor) -> Tensor:
        return self._layers.embed(ids)

    def run_layers(self, hidden: Tensor, start: int, end: int, places: Places) -> Tensor:
        return self._layers.run_layers(hidden, start, end, places)

    def write_kv(self, hidden: Tensor, start: int, end: int, places: Places) -> None:
        self._layers.write_kv(hidden, start, end, places)

    def unembed(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden)
        return logits

    def normed(self, hidden: Tensor) -> Tensor:
        return self._normed(hidden)

    # What subclasses make. A head is a norm and a matrix, (..., D) to logits (..., N);
    # `with_norm(norm)` is the same matrix after another norm. Matrices have the precision of the
    # weights, or `low_bits`. `exact`: batch-invariant.

    @abstractmethod
    def _prepare(self, packing: PackingConfig, weights: Weights) -> None:
        """Sets what the methods below share; called once the embedding is set."""

    @abstractmethod
    def _described(self, packing: PackingConfig) -> str:
        """The name of the implementation; called once the layers are made."""

    @abstractmethod
    def _layer(
        self, weights: Weights, index: int, low_bits: Quantization | None, exact: bool
    ) -> Any: ...

    @abstractmethod
    def _head_of(
        self,
        norm: Affine,
        weights: Weights,
        rows: DraftVocabulary | None,
        low_bits: Quantization | None,
        exact: bool,
    ) -> Any: ...

    @abstractmethod
    def _join(
        self, weights: Weights, low_bits: Quantization | None
    ) -> Callable[[Tensor], Tensor]: ...

    def _drafter_kinds(
        self, packing: PackingConfig
    ) -> tuple[Quantization | None, Quantization | None]:
        """The precision of MTP's layer and of the head after it."""
        return packing.quantize, packing.quantize

    def _drafters(self, stored: StoredDrafters, packing: PackingConfig) -> dict[str, DraftBlock]:
        """The drafters outside the chain of layers, except MTP."""
        if stored.eagle3 is None:
            return {}
        place = self._chain_spec.layers - 1
        return {"eagle3": self.placed_eagle3(stored.eagle3, place, packing)}

    @abstractmethod
    def _norm(self, weights: Affine) -> Callable[[Tensor], Tensor]: ...

    @abstractmethod
    def _layers_of(self, layers: list[Any], exact: bool) -> RepackedLayers: ...

    def _draft_kernel(self, layers: Any) -> DraftKernel | None:
        """The function that makes a whole draft in one call, if there is one."""
        return None

    # The heads and the chains of layers

    def _head_parts(
        self, weights: Weights, norm: Affine, packing: PackingConfig, order: list[int] | None
    ) -> _HeadParts:
        # A tied head is the embedding, which was taken already
        remembered = weights.remembered().after({self.spec.embedding_name: self._embedding}.get)
        vocab = self.spec.vocab
        size = packing.draft_vocab
        if size == 0 and order is not None:
            size = exit_vocabulary(vocab)
        few = DraftVocabulary(vocab, size, order) if size else None
        return _HeadParts(norm, remembered, few, trims_whole=packing.draft_vocab > 0)

    def _made_head(
        self,
        parts: _HeadParts,
        low_bits: Quantization | None,
        rows: DraftVocabulary | None = None,
        exact: bool = False,
    ) -> Any:
        weights = self._source(parts.weights, low_bits)
        return self._head_of(parts.norm, weights, rows, low_bits, exact)

    def _draft_heads(
        self, parts: _HeadParts, low_bits: Quantization | None, whole: Any = None
    ) -> _DraftHeads:
        """`whole`: a head of this precision over all tokens, if there is one."""
        trimmed = None
        if parts.few is not None:
            trimmed = DraftHead(self._made_head(parts, low_bits, parts.few), parts.few)
            if parts.trims_whole:
                return _DraftHeads(trimmed, trimmed)
        of_all = DraftHead(whole or self._made_head(parts, low_bits))
        return _DraftHeads(of_all, trimmed or of_all)

    def _chains(
        self,
        parts: _HeadParts,
        packing: PackingConfig,
        heads: dict[Quantization | None, _DraftHeads],
    ) -> list[_Chain]:
        """The chains of the model and of its low-bit copies, without layers yet; adds the heads of
        their drafts to `heads`.
        """
        quantize = packing.quantize
        layers = self.spec.layers
        heads[quantize] = own = self._draft_heads(parts, quantize, self._head)
        chains = [_Chain(quantize, packing.exact, layers, own.whole, own.at_exits)]
        if not packing.draft_weights:
            return chains
        kind = packing.draft_head or "int8"
        if kind not in heads or packing.exact:  # copies need no exact head
            heads[kind] = self._draft_heads(parts, kind)
        whole, at_exits = heads[kind]
        depth = packing.draft_layers or layers
        if depth < layers:  # the end of such a copy is an exit
            whole = at_exits
        chains += [_Chain(copy, False, depth, whole, at_exits) for copy in packing.draft_weights]
        return chains

    def _add_layers(self, chains: list[_Chain], weights: Weights, stored: StoredDrafters) -> None:
        """Adds the chains' layers. Takes every weight once: at most one matrix (with copies, one
        layer) is in memory twice.
        """
        for index in range(self.spec.layers):
            own = weights.below(self.spec.layer_prefix(index))
            if len(chains) > 1:
                own = own.remembered()
            for chain in chains:
                layer = None
                if index < chain.depth:
                    of_layer = self._source(own, chain.low_bits)
                    layer = self._layer(of_layer, index, chain.low_bits, chain.exact)
                chain.layers.append(layer)
        of_blocks = stored.weights(self.spec, self._embedding)
        for place, block in enumerate(stored.blocks, start=self.spec.layers):
            self._add_block(chains, of_blocks.below(block.prefix).remembered(), block, place)

    def _add_block(self, chains: list[_Chain], own: Weights, block: ExitBlock, place: int) -> None:
        """Adds an exit block to the chains that reach its exit, and with the verifying head to
        `exit_blocks`.
        """
        norm = norm_weights(own, "norm", self.spec)
        for chain in chains:
            if block.exit_layer > chain.depth:
                chain.layers.append(None)
                continue
            of_layer = own.below("layer.")
            chain.layers.append(self._layer(of_layer, place, chain.low_bits, chain.exact))
            head = cast(Any, chain.at_exits.unembed).with_norm(norm)
            placed = PlacedBlock(block, place, head, chain.at_exits.vocabulary)
            chain.blocks[block.exit_layer] = placed
        placed = PlacedBlock(block, place, self._head.with_norm(norm))
        self.exit_blocks[block.exit_layer] = placed

    def _placed_mtp(
        self, mtp: StoredDrafters, low_bits: Quantization | None, head: DraftHead
    ) -> PlacedMtp:
        """The drafter that the checkpoint ships: the layer after the others, in a chain of its
        own.
        """
        own = mtp.weights(self.spec, self._embedding).below(MTP.prefix)
        place = len(self._layers.layers)
        layer = self._layer(own.below("layer."), place, low_bits, False)
        layers = self._layers_of([*[None] * place, layer], False)
        norm = norm_weights(own, "norm", self.spec)
        return PlacedMtp(
            MTP,
            place,
            cast(Any, head.unembed).with_norm(norm),
            head.vocabulary,
            self._draft_kernel(layers),
            norm=self._norm(norm),
            join=self._join(own, low_bits),
            input_norms=[self._norm(norm_weights(own, name, self.spec)) for name in INPUT_NORMS],
            layers=layers,
        )

    def _source(self, weights: Weights, kind: Quantization | None) -> Weights:
        """The weights, with calibrated rows for int4, and with the file's rows of blocks where
        there are no low bits.
        """
        stored = None
        if kind == "int4":
            stored = self._calibrated
        elif kind is None:
            stored = self._stored
        if stored is None:
            return weights
        return weights.after(stored)
