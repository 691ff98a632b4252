"""The base of both backends on repacked weights: makes layers, heads and low-bit copies."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..config.model import PackingConfig, Quantization
from ..config.resolution import MOST_DRAFTS
from .backend import (
    Backend,
    Chosen,
    DraftBlock,
    DraftHead,
    DraftKernel,
    DraftSide,
    TokenPass,
    choose_by_head,
)
from .cache import KVCache, Places
from .eagle3 import Eagle3Weights
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
from .vocabulary import EXIT_VOCABULARY, DraftVocabulary
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
        self.num_layers = len(layers)
        self.device = embedding.device
        self.embedding = embedding
        self.spec = spec
        self.layers = layers
        self.dtype = dtype
        # As transformers rounds it
        self._scale = float(torch.tensor(spec.embedding_scale).to(embedding.dtype))

    def embed(self, ids: Tensor) -> Tensor:
        hidden = torch.embedding(self.embedding, ids).to(self.dtype)
        return hidden if self._scale == 1 else hidden * self._scale

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
            assert 0 <= start <= end <= self.num_layers
            if start == end or not len(flat):
                return hidden
            if start == 0:
                flat = self.placed(flat, places)
            return self.run(flat, start, end, places).view(*hidden.shape[:-1], -1)

    def write_kv(self, hidden: Tensor, start: int, end: int, places: Places) -> None:
        with torch.inference_mode():
            if start < end and hidden.numel():
                self.run(hidden.reshape(-1, hidden.shape[-1]), start, end, places, only_kv=True)


@dataclass
class _Chain:
    """The first `depth` layers of the model and those of exit blocks, in one precision; None where
    this copy lacks one.

    `whole` and `at_exits`: as in DraftSide. `blocks`: by exit.
    """

    low_bits: Quantization | None
    exact: bool
    depth: int
    whole: DraftHead
    at_exits: DraftHead
    layers: list[Any] = field(default_factory=list)
    blocks: dict[int, PlacedBlock] = field(default_factory=dict)


class RepackedBackend(ABC):
    """`Backend` on repacked weights, with the results of `TransformersBackend`, for inference only;
    not thread-safe.
    """

    exact = batch_invariant = recordable = False
    draft_model: Backend | None = None
    row_cost = 0.11

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
                order. With an order, exits draft among its first EXIT_VOCABULARY tokens by default.
            int4: calibrated weights as rows of bytes, for int4 layers and heads; without them
                weights are rounded to nearest.
            stored_drafters: the model's blocks and drafters.
            embedding: in place of the one from `take`.
            stored: rows of blocks of a GGUF file, for layers and heads without other low bits
                (compiled kernels only).

        Raises:
            CheckpointError: a weight is missing, has another shape, or is not finite.
            ConfigError: no kernel supports `packing`.
        """
        packing = packing or PackingConfig()
        self.spec = spec
        self._chain_spec = with_drafter_layers(spec, stored_drafters)
        self._calibrated = int4
        self._stored = stored and checked(stored, spec.shapes)
        weights = Weights(checked(take, spec.shapes, spec.mapped), spec.shapes)
        with torch.inference_mode():
            self._embedding = embedding = (
                weights.of(spec.embedding_name) if embedding is None else embedding
            )
            positions = spec.names.positions
            self._learned = None if positions is None else weights.of(f"{positions}.weight")
            # If so, the head follows several norms
            self._has_blocks = bool(stored_drafters.blocks or stored_drafters.mtp)
            self._prepare(packing, weights)
            norm = norm_weights(weights, spec.names.norm, spec)
            mtp = stored_drafters.mtp
            self._head, chains, drafting = self._headed_chains(
                weights, norm, packing, token_order, mtp is not None
            )
            self.exit_blocks: dict[int, PlacedBlock] = {}
            self._add_layers(chains, weights, stored_drafters)
            runners = [self._layers_of(chain.layers, chain.exact) for chain in chains]
            self._layers = layers = runners[0]
            self.embed = layers.embed
            self.run_layers = layers.run_layers
            self.write_kv = layers.write_kv
            self.normed = self._norm(norm)
            self.drafters = self._drafters(stored_drafters, packing)
            if mtp is not None:
                self.drafters["mtp"] = self._placed_mtp(
                    mtp, layers.num_layers, self._drafter_kinds(packing)[0], drafting
                )
        self.draft_sides: dict[Quantization | None, DraftSide] = {}
        for chain, layers in zip(chains, runners, strict=True):
            own = layers is self._layers
            kernel = self._draft_kernel(layers)
            side = DraftSide(
                layers, chain.depth, chain.whole, chain.at_exits, chain.blocks, own, kernel
            )
            self.draft_sides[None if own else chain.low_bits] = side
        self.num_layers = spec.layers
        self.device = embedding.device
        self.dtype = embedding.dtype
        self.implementation = named_int4(self._described(packing), int4 is not None)

    @classmethod
    def of(cls, model: nn.Module, *args: Any, **options: Any) -> Self:
        """Takes the weights out of a transformers model, which can no longer run."""
        return cls(ModelSpec.of(model.config), taken_from(model), *args, **options)

    def context_length(self, num_draft_tokens: int = MOST_DRAFTS) -> int:
        return self.spec.context

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        context = self.spec.context
        return self._layers.new_cache(batch_size, min(max_positions or context, context))

    def unembed(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden)
        return logits

    def choose(self, step: TokenPass) -> Chosen:
        return choose_by_head(self, step)

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

    def _drafters(
        self, stored_drafters: StoredDrafters, packing: PackingConfig
    ) -> dict[str, DraftBlock]:
        """The drafters outside the chain of layers, except MTP."""
        if stored_drafters.eagle3 is None:
            return {}
        place = self._chain_spec.layers - 1
        return {"eagle3": self.placed_eagle3(stored_drafters.eagle3, place, packing)}

    @abstractmethod
    def placed_eagle3(
        self, stored: Eagle3Weights, place: int, packing: PackingConfig
    ) -> DraftBlock: ...

    @abstractmethod
    def _norm(self, weights: Affine) -> Callable[[Tensor], Tensor]: ...

    @abstractmethod
    def _layers_of(self, layers: list[Any], exact: bool) -> RepackedLayers: ...

    def _draft_kernel(self, layers: Any) -> DraftKernel | None:
        """The function that makes a whole draft in one call, if there is one."""
        return None

    def _headed_chains(
        self,
        weights: Weights,
        norm: Affine,
        packing: PackingConfig,
        order: list[int] | None,
        has_mtp: bool,
    ) -> tuple[Any, list[_Chain], DraftHead]:
        """The verifying head; the chains of the model and of its copies, with heads but no layers
        yet; MTP's head.
        """
        quantize = packing.quantize
        exact = packing.exact
        layers = self.spec.layers
        count = packing.draft_vocab
        weights = weights.remembered().after({self.spec.embedding_name: self._embedding}.get)
        few = DraftVocabulary(self.spec.vocab, count or EXIT_VOCABULARY, order)
        trims_exits = count > 0 or (order is not None and self.spec.vocab > 4 * EXIT_VOCABULARY)

        def head(
            kind: Quantization | None, rows: DraftVocabulary | None = None, exact: bool = False
        ) -> Any:
            return self._head_of(norm, self._source(weights, kind), rows, kind, exact)

        def drafting(
            kind: Quantization | None, all_tokens: Callable[[], Any]
        ) -> tuple[DraftHead, DraftHead]:
            trimmed = DraftHead(head(kind, few), few) if trims_exits else None
            whole = trimmed if trimmed and count else DraftHead(all_tokens())
            return whole, trimmed or whole

        verifying = head(quantize, exact=exact)
        chains = [_Chain(quantize, exact, layers, *drafting(quantize, lambda: verifying))]
        at_exits = {quantize: chains[0].at_exits}
        if packing.draft_weights:
            kind = packing.draft_head or "int8"
            shared = kind == quantize and not exact
            heads = (
                (chains[0].whole, chains[0].at_exits)
                if shared
                else drafting(kind, lambda: head(kind))
            )
            depth = packing.draft_layers or layers
            at_exits[kind] = heads[1]
            chains += [
                _Chain(copy, False, depth, heads[depth < layers], heads[1])
                for copy in packing.draft_weights
            ]
        of_mtp = self._drafter_kinds(packing)[1] if has_mtp else quantize
        if of_mtp not in at_exits:
            at_exits[of_mtp] = drafting(of_mtp, lambda: head(of_mtp))[1]
        return verifying, chains, at_exits[of_mtp]

    def _add_layers(
        self, chains: list[_Chain], weights: Weights, stored_drafters: StoredDrafters
    ) -> None:
        """Adds the chains' layers. Takes every weight once: at most one matrix (with copies, one
        layer) is in memory twice.
        """
        of_blocks = stored_drafters.weights(self.spec, self._embedding)
        parts: list[tuple[int, Weights, ExitBlock | None]] = [
            *(
                (index + 1, weights.below(self.spec.layer_prefix(index)), None)
                for index in range(self.spec.layers)
            ),
            *(
                (block.exit_layer, of_blocks.below(block.prefix), block)
                for block in stored_drafters.blocks
            ),
        ]
        for place, (depth, stored, block) in enumerate(parts):
            own = stored.remembered() if block or len(chains) > 1 else stored
            for chain in chains:
                if depth > chain.depth:
                    chain.layers.append(None)
                    continue
                of_layer = own.below("layer.") if block else self._source(own, chain.low_bits)
                chain.layers.append(self._layer(of_layer, place, chain.low_bits, chain.exact))
                if block:
                    norm = norm_weights(own, "norm", self.spec)
                    head = cast(Any, chain.at_exits.unembed)
                    placed = PlacedBlock(
                        block, place, head.with_norm(norm), chain.at_exits.vocabulary
                    )
                    chain.blocks[depth] = placed
                    if chain is chains[0]:
                        self.exit_blocks[depth] = replace(
                            placed, head=self._head.with_norm(norm), vocabulary=None
                        )

    def _placed_mtp(
        self, mtp: StoredDrafters, place: int, low_bits: Quantization | None, head: DraftHead
    ) -> PlacedMtp:
        """The drafter that the checkpoint ships: layer `place`, in a chain of its own."""
        own = mtp.weights(self.spec, self._embedding).below(MTP.prefix)
        matrix = cast(Any, head.unembed)
        layer = self._layer(own.below("layer."), place, low_bits, False)
        layers = self._layers_of([*[None] * place, layer], False)
        norm, *inputs = (norm_weights(own, name, self.spec) for name in ("norm", *INPUT_NORMS))
        return PlacedMtp(
            MTP,
            place,
            matrix.with_norm(norm),
            head.vocabulary,
            self._draft_kernel(layers),
            norm=self._norm(norm),
            join=self._join(own, low_bits),
            input_norms=list(map(self._norm, inputs)),
            layers=layers,
        )

    def _source(self, weights: Weights, kind: Quantization | None) -> Weights:
        """The weights, with calibrated rows for int4, and with the file's rows of blocks where
        there are no low bits.
        """
        stored = {"int4": self._calibrated, None: self._stored}.get(kind)
        return weights if stored is None else weights.after(stored)
