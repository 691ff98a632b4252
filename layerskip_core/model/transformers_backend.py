"""`Backend` over a transformers model of any type, cut at its layers; and the layers of ours one by one, for training."""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import Quantization
from ..errors import CheckpointError
from .architectures import SUPPORTED
from .backend import DraftSide
from .cache import KVCache, MixedCache
from .cut import CutModel
from .exit_blocks import NO_BLOCKS, ExitBlock, ExitBlocks, PlacedBlock
from .probe import cut_at_layers
from .spec import AnySpec, ModelSpec, TransformersSpec


@dataclass(frozen=True)
class SpanInputs:
    """What all layers of a span need besides hidden states: rotary embeddings and the attention mask, by kind of layer.

    `rope[kind]`: cosine and sine, each (B or 1, T, head dim). `mask[kind]`: (B or 1, 1, T, S), or None where the attention
    kernel applies plain causality itself.
    """

    positions: Tensor
    rope: dict[str, tuple[Tensor, Tensor]]
    mask: dict[str, Tensor | None]

    def rows(self, index: Tensor) -> "SpanInputs":
        """Only the batch rows at `index` (kept,)."""

        def select(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor.index_select(0, index)

        rope = {kind: (select(cos), select(sin)) for kind, (cos, sin) in self.rope.items()}
        mask = {kind: None if mask is None else select(mask) for kind, mask in self.mask.items()}
        return SpanInputs(select(self.positions), rope, mask)


def attention_for(config: Any) -> str | None:
    """The attention of transformers that computes a model; None: its choice. `sdpa` has no cap of scores, and drops it."""
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        return "eager"
    return "sdpa" if config.model_type in SUPPORTED else None


class TransformersBackend:
    """A transformers causal language model as three operations, so that any span of its layers can run alone.

    `unembed(run_layers(embed(ids), 0, L, positions))` equals `model(ids).logits`; stopping at E < L is an early exit.
    """

    implementation = "generic"
    exact = batch_invariant = recordable = ragged = False
    chooser = None

    def __init__(self, model: Any, exit_blocks: ExitBlocks = NO_BLOCKS, spec: ModelSpec | None = None) -> None:
        """A model type that our kernels do not run is tried at once, others when they first run.

        Raises CheckpointError for a model that cannot be cut at its layers, or a configuration that is impossible.

        `exit_blocks`: those of the model's exits, which decode only. `spec`: the model's, if it is known already.
        """
        self.model, self.config = model, model.config
        self.spec: AnySpec
        self.layers: Any
        if spec is not None or self.config.model_type in SUPPORTED:
            self.spec = spec = spec or ModelSpec.of(self.config)
            self.layers, self.num_layers = self.model.model.layers, spec.layers
        else:
            self.layers = self._cut.form.layers
            self.num_layers = len(self.layers)
            self.spec = TransformersSpec.of(self.model, self.num_layers)
        self._blocks: list[tuple[nn.Module, int]] = []
        self.exit_blocks: dict[int, PlacedBlock] = {}
        for block in exit_blocks.blocks:
            self._add_block(block, exit_blocks)

    @property
    def own_spec(self) -> ModelSpec:
        """The spec of a model type that our kernels run. Raises CheckpointError for another."""
        if isinstance(self.spec, ModelSpec):
            return self.spec
        needed = f"training, calibration and export need a model_type among {', '.join(SUPPORTED)}"
        raise CheckpointError(f"{needed}, got {self.spec.model_type}, which only decodes")

    @cached_property
    def _cut(self) -> CutModel:
        return cut_at_layers(self.model)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device  # training may replace it, as FSDP does
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def row_cost(self) -> float:
        return 0.5 if self.device.type == "cpu" else 0.11  # its kernels on a CPU are made for one row or for many

    @property
    def draft_sides(self) -> Mapping[Quantization | None, DraftSide]:
        """The model itself."""
        return {None: DraftSide(self, self.num_layers, self.unembed, self.exit_blocks)}

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> MixedCache:
        positions = min(max_positions or self.spec.context, self.spec.context)
        return self._cut.new_cache(batch_size, positions, len(self._blocks))

    def embed(self, ids: Tensor) -> Tensor:
        return self._cut.embed(ids)

    def run_layers(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        positions: Tensor,
        cache: KVCache | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """As `Layers.run_layers`. `positions` (B, T) are on the host, so that no call waits for the device to learn a length.

        `key_mask` (B, T), True where a key may be seen, is for calls without a cache.
        """
        if start == stop:
            return hidden
        assert cache is None or isinstance(cache, MixedCache)
        if start < self.num_layers:
            return self._cut.run(hidden, start, stop, positions, cache, key_mask=key_mask)
        block = self._blocks[start - self.num_layers]
        return self._cut.run(hidden, self.num_layers - 1, self.num_layers, positions, cache, block=block)

    def write_kv(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        """As `Backend.write_kv`. Each layer ends where its attention has given its last entry to the cache."""
        assert isinstance(cache, MixedCache)
        if start < self.num_layers:
            self._cut.run(hidden, start, stop, positions, cache, only_writes=True)
            return
        block = self._blocks[start - self.num_layers]
        self._cut.run(hidden, self.num_layers - 1, self.num_layers, positions, cache, only_writes=True, block=block)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V)."""
        if not isinstance(self.spec, ModelSpec):
            return self._cut.unembed(hidden)
        logits: Tensor = self.model.get_output_embeddings()(self.normed(hidden))
        return self.spec.scaled_logits(logits)

    def normed(self, hidden: Tensor) -> Tensor:
        """The input (..., D) of the head."""
        if not isinstance(self.spec, ModelSpec):
            return self._cut.normed(hidden)
        normed: Tensor = self.model.model.norm(hidden)
        return normed

    def _add_block(self, block: ExitBlock, blocks: ExitBlocks) -> None:
        """As copies of the last layer and of the final norm with the block's weights."""
        weights = blocks.weights(self.own_spec, self.model.get_input_embeddings().weight)
        layer, norm = deepcopy(self.layers[-1]), deepcopy(self.model.model.norm)
        for module, prefix in ((layer, f"{block.prefix}layer."), (norm, f"{block.prefix}norm.")):
            for name, parameter in module.named_parameters():
                parameter.data = weights.of(prefix + name)
                parameter.requires_grad_(False)
        place = self._cut.place_of_block(len(self._blocks))
        parts: list[Any] = list(layer.modules())
        for part in parts:
            if hasattr(part, "layer_idx"):  # by which attention addresses the cache
                part.layer_idx = place
        join = partial(F.linear, weight=weights.of(f"{block.prefix}input.weight")) if block.feature == "final" else None
        head = partial(self._cut.unembed, norm=norm)
        self.exit_blocks[block.exit_layer] = PlacedBlock(block, self.num_layers + len(self._blocks), head, norm, join)
        self._blocks.append((layer.eval(), place))

    # Layers one by one, of the model types that our kernels run too.

    def embedded(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to the first layer's input (B, T, D)."""
        spec = self.own_spec
        hidden: Tensor = self.model.get_input_embeddings()(ids)
        if spec.embedding_scale != 1 and not spec.architecture.scales_embeddings:  # Gemma's embed_tokens scales itself
            hidden = hidden * spec.embedding_scale
        return F.dropout(hidden, spec.embedding_dropout, self.model.training) if spec.embedding_dropout else hidden

    def run_layer(self, layer: int, hidden: Tensor, inputs: SpanInputs) -> Tensor:
        """One layer over (B, T, D), with the inputs that `prepare` made."""
        kind = self.own_spec.kinds[layer]
        output: Tensor | tuple[Tensor, ...] = self.layers[layer](
            hidden,
            attention_mask=inputs.mask[kind],
            position_ids=inputs.positions,
            position_embeddings=inputs.rope[kind],
            use_cache=False,
        )
        return output[0] if isinstance(output, tuple) else output

    def prepare(self, hidden: Tensor, positions: Tensor, key_mask: Tensor | None = None) -> SpanInputs:
        """Rotary embeddings and masks for whole texts (B, T), once for all layers.

        `key_mask` (B, T), True where a key may be seen.
        """
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

        spec, rotary = self.own_spec, self.model.model.rotary_emb
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        on_device = positions.to(hidden.device, non_blocking=True)
        # transformers knows for every kind of attention, such as training's, whether it takes masks as `sdpa` does: boolean
        # ones, or none if it is causal.
        stock: Any = ALL_MASK_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        boolean = inspect.unwrap(stock) is sdpa_mask
        rope: dict[str, tuple[Tensor, Tensor]] = {}
        mask: dict[str, Tensor | None] = {}
        for kind in dict.fromkeys(spec.kinds):
            cos, sin = rotary(hidden, on_device, *((kind,) if by_type else ()))
            rope[kind] = cos, sin
            window = spec.window_of(kind)
            if boolean and key_mask is None and (window is None or positions.shape[1] <= window):
                mask[kind] = None
            else:
                seen = _seen(on_device, window, key_mask)
                if not boolean:  # then it is added to the scores
                    seen = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
                mask[kind] = seen
        return SpanInputs(on_device, rope, mask)


def _seen(positions: Tensor, window: int | None, key_mask: Tensor | None) -> Tensor:
    """(B, 1, T, S): the keys that each query sees."""
    queries, keys = positions[:, :, None], positions[:, None, :]
    seen = keys <= queries
    if window is not None:
        seen = seen & (keys > queries - window)
    if key_mask is not None:
        # A padded query sees itself: a row of the mask without a single key would give NaN.
        itself = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)
        seen = seen & key_mask[:, None, :].to(torch.bool) | itself
    return seen[:, None]
