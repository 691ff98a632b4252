"""`Backend` over a transformers model: the only file that knows the inside of transformers' models."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import Quantization
from .backend import DraftSide
from .cache import KVCache, SpanWriter
from .exit_blocks import NO_BLOCKS, ExitBlock, ExitBlocks, PlacedBlock, with_blocks
from .spec import ModelSpec
from .weights import Weights


@dataclass(frozen=True)
class SpanInputs:
    """What all layers of a span need besides hidden states: rotary embeddings and the attention mask, by kind of layer.

    `rope[kind]`: cosine and sine, each (B or 1, T, head dim). `mask[kind]`: (B or 1, 1, T, S), or None where the attention
    kernel applies plain causality itself.
    """

    positions: Tensor
    rope: dict[str, tuple[Tensor, Tensor]]
    mask: dict[str, Tensor | None]
    writer: SpanWriter | None = None

    def rows(self, index: Tensor) -> "SpanInputs":
        """Only the batch rows at `index` (kept,)."""

        def select(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor.index_select(0, index)

        rope = {kind: (select(cos), select(sin)) for kind, (cos, sin) in self.rope.items()}
        mask = {kind: None if mask is None else select(mask) for kind, mask in self.mask.items()}
        return SpanInputs(select(self.positions), rope, mask, self.writer)


class _KeysWritten(Exception):
    """Ends a layer that had to write its keys and values only."""


class _KeysOnly(SpanWriter):
    """The attention module does not go on after its call of `update`."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> NoReturn:
        super().update(keys, values, layer_idx)
        raise _KeysWritten


def attention_for(spec: ModelSpec) -> str:
    """The attention of transformers that computes a model. `sdpa` has no cap of scores, and some versions leave it out."""
    return "sdpa" if spec.score_cap is None else "eager"


class TransformersBackend:
    """A transformers causal language model as three operations, so that any span of its layers can run alone.

    `unembed(run_layers(embed(ids), 0, L, positions))` equals `model(ids).logits`; stopping at E < L is an early exit.
    """

    implementation = "generic"
    exact = batch_invariant = recordable = ragged = False
    chooser = None

    def __init__(self, model: nn.Module, exit_blocks: ExitBlocks = NO_BLOCKS, spec: ModelSpec | None = None) -> None:
        """Raises CheckpointError for an architecture that is not supported or a configuration that is impossible.

        `exit_blocks`: those of the model's exits, which decode only. `spec`: the model's, if it is known already.
        """
        self.spec = spec = spec or ModelSpec.of(model.config)
        self.model = model
        transformers_model: Any = model
        self.config: Any = model.config
        self._decoder: Any = transformers_model.model
        self._head: Any = transformers_model.get_output_embeddings()
        self.layers: nn.ModuleList = self._decoder.layers
        self.num_layers = spec.layers
        # transformers 5.24 renamed past_key_values; layers swallow a wrong keyword in **kwargs without an error.
        parameters = inspect.signature(type(self.layers[0]).forward).parameters
        self._cache_keyword = "cache" if "cache" in parameters else "past_key_values"
        self._rope_by_type = "layer_type" in inspect.signature(self._decoder.rotary_emb.forward).parameters
        self._chain_spec = with_blocks(spec, exit_blocks.blocks)
        self._kinds = self._chain_spec.kinds
        self._block_layers: list[nn.Module] = []
        self.exit_blocks: dict[int, PlacedBlock] = {}
        for block in exit_blocks.blocks:
            self._add_block(block, exit_blocks.weights(spec, self._head.weight))
        # Gemma's embed_tokens scales its output itself.
        self._embedding_scale = 1.0 if spec.architecture.scales_embeddings else spec.embedding_scale

    @property
    def device(self) -> torch.device:
        device: torch.device = self._head.weight.device  # of a weight that training may replace, as FSDP does
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._head.weight.dtype
        return dtype

    @property
    def row_cost(self) -> float:
        return 0.5 if self.device.type == "cpu" else 0.11  # its kernels on a CPU are made for one row or for many

    @property
    def draft_sides(self) -> Mapping[Quantization | None, DraftSide]:
        """The model itself."""
        return {None: DraftSide(self, self.num_layers, self.unembed, self.exit_blocks)}

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        return KVCache.of(self._chain_spec, batch_size, max_positions)

    def embed(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self._decoder.embed_tokens(ids)
        if self._embedding_scale != 1:
            hidden = hidden * self._embedding_scale
        return F.dropout(hidden, self.spec.embedding_dropout, self.model.training) if self.spec.embedding_dropout else hidden

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
        inputs = self.prepare(hidden, positions, cache, key_mask)
        for layer in range(start, stop):
            hidden = self.run_layer(layer, hidden, inputs)
        return hidden

    def write_kv(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> None:
        """As `Backend.write_kv`. Each layer ends where its attention module has given its keys and values to the cache."""
        inputs = replace(self.prepare(hidden, positions, cache), writer=_KeysOnly(cache, positions))
        for layer in range(start, stop):
            with suppress(_KeysWritten):
                self.run_layer(layer, hidden, inputs)

    def run_layer(self, layer: int, hidden: Tensor, inputs: SpanInputs) -> Tensor:
        """One layer over (B, T, D), with the inputs that `prepare` made."""
        kind = self._kinds[layer]
        keywords = {self._cache_keyword: inputs.writer} if inputs.writer is not None else {}
        module = self.layers[layer] if layer < self.num_layers else self._block_layers[layer - self.num_layers]
        output: Tensor | tuple[Tensor, ...] = module(
            hidden,
            attention_mask=inputs.mask[kind],
            position_ids=inputs.positions,
            position_embeddings=inputs.rope[kind],
            use_cache=False,
            **keywords,
        )
        return output[0] if isinstance(output, tuple) else output

    def prepare(
        self, hidden: Tensor, positions: Tensor, cache: KVCache | None = None, key_mask: Tensor | None = None
    ) -> SpanInputs:
        """Rotary embeddings and masks of a call, once for all layers. Arguments as for `run_layers`."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

        writer = None if cache is None else cache.writer(positions)
        on_device = positions.to(hidden.device, non_blocking=True)
        key_count = positions.shape[1] if writer is None else writer.stop
        # transformers knows for every kind of attention, such as training's, whether it takes masks as `sdpa` does: boolean
        # ones, or none if it is causal.
        boolean = ALL_MASK_ATTENTION_FUNCTIONS.get(self.config._attn_implementation) is sdpa_mask
        causal_kernel = (
            boolean and key_mask is None and key_count == positions.shape[1] and (writer is None or writer.contiguous)
        )
        single_token = writer is not None and positions.shape == (1, 1)
        rope: dict[str, tuple[Tensor, Tensor]] = {}
        mask: dict[str, Tensor | None] = {}
        for kind in dict.fromkeys(self._kinds):
            cos, sin = self._decoder.rotary_emb(hidden, on_device, *((kind,) if self._rope_by_type else ()))
            rope[kind] = cos, sin
            window = self.spec.window_of(kind)
            if (causal_kernel or single_token) and (window is None or key_count <= window):
                mask[kind] = None
            else:
                seen = _seen(on_device, None if writer is None else writer.stop, window, key_mask)
                if not boolean:  # then it is added to the scores
                    seen = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
                mask[kind] = seen
        return SpanInputs(on_device, rope, mask, writer)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V)."""
        logits: Tensor = self._head(self.normed(hidden))
        return self.spec.scaled_logits(logits)

    def normed(self, hidden: Tensor) -> Tensor:
        """The input (..., D) of the head."""
        normed: Tensor = self._decoder.norm(hidden)
        return normed

    def _add_block(self, block: ExitBlock, weights: Weights) -> None:
        """As copies of the last layer and of the final norm with the block's weights."""
        layer, norm = deepcopy(self.layers[-1]), deepcopy(self._decoder.norm)
        for module, prefix in ((layer, f"{block.prefix}layer."), (norm, f"{block.prefix}norm.")):
            for name, parameter in module.named_parameters():
                parameter.data = weights.of(prefix + name)
                parameter.requires_grad_(False)
        place = self.num_layers + len(self._block_layers)
        parts: list[Any] = list(layer.modules())
        for part in parts:
            if hasattr(part, "layer_idx"):  # by which attention addresses the cache
                part.layer_idx = place
        self._block_layers.append(layer.eval())
        join = partial(F.linear, weight=weights.of(f"{block.prefix}input.weight")) if block.feature == "final" else None

        def head(hidden: Tensor) -> Tensor:
            return self.spec.scaled_logits(self._head(norm(hidden)))

        self.exit_blocks[block.exit_layer] = PlacedBlock(block, place, head, norm, join)


def _seen(positions: Tensor, key_count: int | None, window: int | None, key_mask: Tensor | None) -> Tensor:
    """(B, 1, T, S): the keys that each query sees. Without a cache, and a `key_count`, the keys stand at `positions`."""
    queries = positions[:, :, None]
    keys = positions[:, None, :] if key_count is None else torch.arange(key_count, device=positions.device)
    seen = keys <= queries
    if window is not None:
        seen = seen & (keys > queries - window)
    if key_mask is not None:
        # A padded query sees itself: a row of the mask without a single key would give NaN.
        itself = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)
        seen = seen & key_mask[:, None, :].to(torch.bool) | itself
    return seen[:, None]
