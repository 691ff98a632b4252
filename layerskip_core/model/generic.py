"""embed, run_layers(start, stop) and unembed over a transformers model: the only file that knows transformers' internals."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache
from .spec import ModelSpec

FP32_SDPA = "sdpa_fp32"  # of training/attention.py
_SDPA = ("sdpa", FP32_SDPA)  # kinds of attention that apply causality themselves and take masks of truth values


@dataclass(frozen=True)
class SpanInputs:
    """What every layer of a span needs beside its hidden states: per layer type, rotary embeddings and the attention mask.

    `rope[kind]`: cosine and sine, each (B or 1, T, head dim). `mask[kind]`: (B or 1, 1, T, S), or None where causality alone
    decides and the attention kernel applies it itself.
    """

    positions: Tensor
    rope: dict[str, tuple[Tensor, Tensor]]
    mask: dict[str, Tensor | None]
    writer: Any = None

    def rows(self, index: Tensor) -> "SpanInputs":
        """The same for the batch rows at `index` (kept,) only."""

        def select(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor.index_select(0, index)

        return SpanInputs(
            positions=select(self.positions),
            rope={kind: (select(cos), select(sin)) for kind, (cos, sin) in self.rope.items()},
            mask={kind: None if mask is None else select(mask) for kind, mask in self.mask.items()},
            writer=self.writer,
        )


class GenericBackend:
    """A transformers causal language model as three operations, so that any span of its layers can run alone.

    `unembed(run_layers(embed(ids), 0, L, positions))` equals `model(ids).logits`; stopping at E < L gives the early exit.
    """

    implementation = "generic"

    def __init__(self, model: nn.Module) -> None:
        """Raises CheckpointError for an architecture that cannot be split by depth, or that cannot be at all."""
        self.spec = ModelSpec.of(model.config)
        self.model = model
        transformers_model: Any = model
        self.config: Any = model.config
        self._decoder: Any = transformers_model.model
        self._head: Any = transformers_model.get_output_embeddings()
        self.layers: nn.ModuleList = self._decoder.layers
        parameters = inspect.signature(type(self.layers[0]).forward).parameters
        # transformers 5.24 renamed past_key_values; a wrong keyword would vanish in **kwargs without a word.
        self._cache_keyword = "cache" if "cache" in parameters else "past_key_values"
        self._rope_by_type = "layer_type" in inspect.signature(self._decoder.rotary_emb.forward).parameters
        self._kinds = self.spec.kinds
        # Gemma's embed_tokens scales its output itself.
        self._embedding_scale = 1.0 if self.spec.architecture.scales_embeddings else self.spec.embedding_scale

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self._head.weight.shape[0])

    @property
    def max_positions(self) -> int:
        """The context limit, in tokens."""
        return self.spec.context

    @property
    def device(self) -> torch.device:
        return self._head.weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self._head.weight.dtype  # type: ignore[no-any-return]

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        """An empty cache for this model's layers, up to the context limit unless told otherwise."""
        return KVCache(self.num_layers, batch_size, min(max_positions or self.max_positions, self.max_positions))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to hidden states (B, T, D)."""
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
        """Layers start..stop-1 over hidden states (B, T, D) of the tokens at `positions` (B, T).

        `positions` lives on the host, whatever the model's device, so that no call waits for the device to know a length.
        With a cache, the keys and values of the span are written at the positions and earlier ones are read. `key_mask`
        (B, T), True where a key may be seen, is for calls without one. Returns the pre-norm hidden states (B, T, D).
        """
        inputs = self.prepare(hidden, positions, cache, key_mask)
        for layer in range(start, stop):
            hidden = self.run_layer(layer, hidden, inputs)
        return hidden

    def run_layer(self, layer: int, hidden: Tensor, inputs: SpanInputs) -> Tensor:
        """One layer over (B, T, D), with the inputs that `prepare` made for these rows."""
        kind = self._kinds[layer]
        keywords = {self._cache_keyword: inputs.writer} if inputs.writer is not None else {}
        output: Any = self.layers[layer](
            hidden,
            attention_mask=inputs.mask[kind],
            position_ids=inputs.positions,
            position_embeddings=inputs.rope[kind],
            use_cache=False,
            **keywords,
        )
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def prepare(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: KVCache | None = None,
        key_mask: Tensor | None = None,
    ) -> SpanInputs:
        """Rotary embeddings and masks of a call, once for all layers of the span. Arguments as for `run_layers`."""
        writer = None if cache is None else cache.writer(positions)
        on_device = positions.to(hidden.device, non_blocking=True)
        key_count = positions.shape[1] if writer is None else writer.stop
        causal_kernel = (
            key_mask is None
            and key_count == positions.shape[1]
            and (writer is None or writer.contiguous)
            and self.config._attn_implementation in _SDPA
        )
        single_row = writer is not None and positions.shape == (1, 1)
        rope: dict[str, tuple[Tensor, Tensor]] = {}
        mask: dict[str, Tensor | None] = {}
        for kind in dict.fromkeys(self._kinds):
            rope[kind] = self._rope(hidden, on_device, kind)
            window = self._window(kind)
            if (causal_kernel or single_row) and (window is None or key_count <= window):
                mask[kind] = None
            else:
                mask[kind] = self._mask(hidden, on_device, key_count, window, key_mask, writer is None)
        return SpanInputs(on_device, rope, mask, writer)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V)."""
        logits = self._head(self._decoder.norm(hidden))
        if self.spec.logits_divisor != 1:
            logits = logits / self.spec.logits_divisor
        cap = self.spec.logits_cap
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits  # type: ignore[no-any-return]

    def _rope(self, hidden: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        if self._rope_by_type:
            return self._decoder.rotary_emb(hidden, positions, kind)  # type: ignore[no-any-return]
        return self._decoder.rotary_emb(hidden, positions)  # type: ignore[no-any-return]

    def _window(self, kind: str) -> int | None:
        return self.spec.window if kind == "sliding_attention" else None

    def _mask(
        self,
        hidden: Tensor,
        positions: Tensor,
        key_count: int,
        window: int | None,
        key_mask: Tensor | None,
        keys_at_positions: bool,
    ) -> Tensor:
        """(B, 1, T, S): what each query may see. Without a cache the keys stand at `positions` themselves."""
        queries = positions[:, :, None]
        keys = positions[:, None, :] if keys_at_positions else torch.arange(key_count, device=positions.device)
        seen = keys <= queries
        if window is not None:
            seen = seen & (keys > queries - window)
        if key_mask is not None:
            # A padded query sees itself: a row of the mask without a single key would give NaN.
            itself = torch.eye(key_count, dtype=torch.bool, device=positions.device)
            seen = seen & key_mask[:, None, :].to(torch.bool) | itself
        seen = seen[:, None]
        if self.config._attn_implementation in _SDPA:
            return seen
        return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
