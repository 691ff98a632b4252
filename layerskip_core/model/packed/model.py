"""The operations of GenericBackend on repacked weights: the fast path of decoding, for the Llama family."""

import math
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...config.packing import EXACT_TOKENS, PackingConfig, Quantization
from ..cache import KVCache, SpanWriter
from ..draft_vocabulary import DraftVocabulary
from ..rope import Rope
from ..spec import ModelSpec
from ..weights import Take, Weights
from .layer import Norm, PackedLayer, Step, Workspace
from .linear import Head, KernelLinear, linear

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on nothing but the position
_CHUNK = 256  # tokens of a prompt that run at once: bounds the attention mask and the activations
_MOST_BYTES = 1 << 28  # that the activations of a larger call take, of several prompts: it has fewer tokens of each
_WORKSPACES = 16  # shapes of calls whose buffers are kept
_PRODUCT_TOKENS = 16  # most tokens a row that attention by two matrix products is for; a prompt's mask would be large
_EXACT_ROWS = 8  # most rows that an exact call runs at once


def can_pack(config: Any) -> bool:
    """Whether PackedBackend knows every part of this architecture."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILY
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _STATIC_ROPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
    )


class PackedBackend:
    """The same operations and results as `GenericBackend`, for inference only. Not for two threads at once."""

    draft: "PackedBackend | None" = None  # what drafts where that is not this model itself
    drafts_own_states = True  # whether the hidden states of what drafts are this model's
    vocabulary: DraftVocabulary | None = None  # the tokens that there is a head for, where it is not all

    def __init__(
        self, config: Any, take: Take, packing: PackingConfig | None = None, token_order: list[int] | None = None
    ) -> None:
        """The weights of an architecture that `can_pack`, by their names in its checkpoints; each is taken once.

        `token_order`: token ids, the most frequent first, as `draft_vocab` counts them; None for the tokenizer's order.
        Raises CheckpointError for a configuration that cannot be and for a weight that is missing, of another shape or not
        finite, ConfigError where there is no kernel for what `packing` asks for.
        """
        packing = packing or PackingConfig()
        self.config = config
        self.spec = ModelSpec.of(config)
        self.exact = packing.exact
        self._quantize, self._draft_weights = packing.quantize, packing.draft_weights
        self._kinds = self.spec.kinds
        self._kinds_once = tuple(dict.fromkeys(self._kinds))
        self._spaces: dict[tuple[int, int], Workspace] = {}
        self._proven: dict[int, int] = {}  # by number of threads
        weights = Weights(take, self.spec.shapes)
        with torch.inference_mode():
            self._embedding = weights.of("model.embed_tokens.weight")
            self._rope = Rope(config, self.spec, self._embedding)
            self._ahead = self._embedding.new_empty(0)
            norm = weights.of("model.norm.weight")
            head = self._embedding if self.spec.tied else weights.of("lm_head.weight")
            self._norm, self._head = self._pack_head(norm, head, packing.quantize, packing.exact)
            if packing.drafts_apart:
                self.draft = copy(self)
                self.draft.exact, self.draft._spaces = False, {}
                bits = packing.draft_weights or packing.quantize
                if packing.draft_vocab:
                    kept = self.draft.vocabulary = DraftVocabulary(len(head), packing.draft_vocab, token_order)
                    kept_head = kept.rows_of(head)
                else:
                    kept_head = head
                self.draft._norm, self.draft._head = self._pack_head(norm, kept_head, bits, exact=False)
                del kept_head
            del head
            self._layers: list[PackedLayer] = []
            drafts: list[PackedLayer] = []
            copies = 0 if packing.draft_weights is None else packing.draft_layers or len(self._kinds) - 1
            for index in range(len(self._kinds)):
                mine = weights.remembered(f"model.layers.{index}.")
                self._layers.append(self._pack_layer(mine, index, packing.quantize, packing.exact))
                if index < copies:
                    drafts.append(self._pack_layer(mine, index, packing.draft_weights, exact=False))
        if self.draft is not None:
            self.draft._layers = drafts or self._layers
            self.drafts_own_states = not drafts

    @classmethod
    def of(
        cls, model: nn.Module, packing: PackingConfig | None = None, token_order: list[int] | None = None
    ) -> "PackedBackend":
        """Takes the weights of a transformers model; its own are released, so that it can no longer run."""
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        model.to("meta")
        return cls(model.config, lambda name: weights.pop(name, None), packing, token_order)

    @property
    def implementation(self) -> str:
        """Which kernels run, for people who measure."""
        prepacked = any(isinstance(part, KernelLinear) for part in (self._head, *self._layers[0].linears))
        kernels = f"packed ({self._quantize or 'oneDNN'})" if prepacked else "packed"
        drafts = f", {self._draft_weights} drafts" if self._draft_weights else ""
        return kernels + drafts + (", exact" if self.exact else "")

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def hidden_size(self) -> int:
        return self._embedding.shape[1]

    @property
    def vocab_size(self) -> int:
        return self._embedding.shape[0]

    @property
    def max_positions(self) -> int:
        """The context limit, in tokens."""
        return self.spec.context

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        """An empty cache for this model's layers, up to the context limit unless told otherwise."""
        return KVCache(self.num_layers, batch_size, min(max_positions or self.max_positions, self.max_positions))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to hidden states (B, T, D)."""
        return torch.embedding(self._embedding, ids)

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """Layers start..stop-1 over hidden states (B, T, D) of the tokens at `positions` (B, T), on the host.

        Without a cache the tokens see each other only. Returns the pre-norm hidden states (B, T, D). Many tokens run in
        parts, whose activations take about 256 MB at most, or those of 256 tokens or of one token of each row if that is more.
        """
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self.run_layers(hidden, start, stop, positions, cache)
        batch, count, _ = hidden.shape
        if not 0 <= start <= stop <= self.num_layers:
            raise ValueError(f"layers must be in 0..{self.num_layers}, got {start}..{stop}")
        if start == stop or batch * count == 0:
            return hidden
        if cache is None:
            cache = self.new_cache(batch)
        if len(cache.lengths) != batch or positions.shape != hidden.shape[:2]:
            raise ValueError(
                f"{batch} x {count} tokens do not fit {list(positions.shape)} positions, {len(cache.lengths)} rows"
            )
        piece = self._tokens_at_once(batch, count)
        if count <= piece:
            return self._run(hidden, start, stop, positions, cache)
        parts = zip(torch.split(hidden, piece, 1), torch.split(positions, piece, 1), strict=True)
        return torch.cat([self._run(part, start, stop, places, cache) for part, places in parts], dim=1)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V), -inf for what `vocabulary` leaves out."""
        logits = self.unembed_vocabulary(hidden)
        return logits if self.vocabulary is None else self.vocabulary.spread(logits, -math.inf)

    def unembed_vocabulary(self, hidden: Tensor) -> Tensor:
        """(..., D) to logits (..., N) of the `vocabulary` alone."""
        *shape, size = hidden.shape
        rows = hidden.reshape(-1, size)
        if self.exact and 1 < len(rows) <= EXACT_TOKENS:
            logits = torch.cat([self._logits(part) for part in torch.split(rows, self._rows_at_once())])
        else:
            logits = self._logits(rows)
        return logits.view(*shape, logits.shape[-1])

    def _tokens_at_once(self, batch: int, count: int) -> int:
        """How many tokens of each row run at once."""
        if self.exact and 1 < count <= EXACT_TOKENS:
            return self._rows_at_once()
        return max(1, min(_CHUNK, self._rows_in_memory(batch * count) // batch))

    def _rows_in_memory(self, count: int) -> int:
        """How many of so many rows a call may have."""
        return _CHUNK if count <= _CHUNK else max(_CHUNK, _MOST_BYTES // self._row_bytes())

    def _row_bytes(self) -> int:
        """About what the activations of a token take in a layer."""
        spec = self.spec
        return 4 * (2 * spec.queries + 2 * spec.keys + 3 * spec.inner + 4 * spec.hidden)

    def _pack_layer(self, weights: Weights, index: int, quantization: Quantization | None, exact: bool) -> PackedLayer:
        return PackedLayer(weights, self.spec, index, quantization, exact)

    def _pack_head(self, norm: Tensor, weight: Tensor, quantization: Quantization | None, exact: bool) -> tuple[Norm, Head]:
        """Final norm and head."""
        packed_norm = Norm(norm, self.spec, folds=quantization is None)
        return packed_norm, linear(packed_norm.folded_into(weight), None, quantization, exact)

    def _logits(self, rows: Tensor) -> Tensor:
        return self._head(self._norm(rows))

    def _run(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache) -> Tensor:
        batch, count, size = hidden.shape
        writer = cache.writer(positions)
        space = self._workspace(batch, count)
        slots = writer.layers(start, stop, self._layers[0].kv_heads, self._layers[0].head_dim, hidden)
        step = self._step(writer, positions, slots[0].values.shape[1])
        rows = hidden.reshape(batch * count, size).clone()
        for layer, kind, held in zip(self._layers[start:stop], self._kinds[start:stop], slots, strict=True):
            layer.run_(rows, step, kind, held, space)
        return rows.view(batch, count, size)

    def _rows_at_once(self) -> int:
        """How many rows a call may have so that each has the bits that it has alone, found by trying on this machine."""
        threads = torch.get_num_threads()
        if threads not in self._proven:
            self._proven[threads] = next(
                (rows for rows in range(1, _EXACT_ROWS) if not self._same_alone(rows + 1)), _EXACT_ROWS
            )
        return self._proven[threads]

    def _same_alone(self, count: int) -> bool:
        """Whether a layer and the head give `count` random rows what they give each alone. All layers have the same shapes."""
        generator = torch.Generator(self.device).manual_seed(count)
        hidden = torch.randn(1, 24 + count, self.hidden_size, generator=generator, device=self.device).to(self.dtype)
        before, positions = hidden[:, :24], torch.arange(24 + count)[None]
        cache = self.new_cache(max_positions=24 + count)
        self._run(before, 0, 1, positions[:, :24], cache)
        together = self._run(hidden[:, 24:], 0, 1, positions[:, 24:], cache)
        places = range(24, 24 + count)
        alone = [self._run(hidden[:, [place]], 0, 1, positions[:, [place]], cache) for place in places]
        logits = [self._logits(rows[0]) for rows in alone]
        return torch.equal(together, torch.cat(alone, dim=1)) and torch.equal(self._logits(together[0]), torch.cat(logits))

    def _step(self, writer: SpanWriter, positions: Tensor, capacity: int) -> Step:
        places = positions.to(self.device, non_blocking=True)
        rope, still = self._rope.at(writer, places), self._rope.still
        batch, count = positions.shape
        kinds = self._kinds_once
        if self.exact and batch == 1 and count <= EXACT_TOKENS:
            spans = {kind: self._spans(kind, positions[0].tolist()) for kind in kinds}
            return Step(rope, still, dict.fromkeys(kinds), spans, writer.stop)
        by_products = count <= _PRODUCT_TOKENS and self.device.type == "cpu"
        keys = capacity if by_products else writer.stop
        masks = {kind: self._mask(kind, writer, places, keys, by_products) for kind in kinds}
        return Step(rope, still, masks, None, None if by_products else writer.stop)

    def _spans(self, kind: str, places: list[int]) -> list[tuple[int, int]]:
        window = self._window(kind)
        return [(0 if window is None else max(0, place + 1 - window), place + 1) for place in places]

    def _window(self, kind: str) -> int | None:
        return self.spec.window if kind == "sliding_attention" else None

    def _workspace(self, batch: int, count: int) -> Workspace:
        """Kept for the calls that decoding repeats; those over a prompt are not."""
        space = self._spaces.get((batch, count))
        if space is None:
            space = Workspace(batch, count, self._layers[0], self._embedding)
            if batch * count <= _CHUNK // 2:
                if len(self._spaces) >= _WORKSPACES:
                    self._spaces.pop(next(iter(self._spaces)))
                self._spaces[batch, count] = space
        return space

    def _mask(self, kind: str, writer: SpanWriter, places: Tensor, keys: int, always: bool) -> Tensor | None:
        """What is added to the scores of `keys` places, (B or 1, 1, T, 1, S) or, for one token, (S,).

        None where each of them may be seen, unless there is to be a mask `always`.
        """
        window = self._window(kind)
        if writer.contiguous and places.shape[1] == 1 and (window is None or writer.stop <= window):
            return self._mask_behind(writer.stop, keys) if always else None
        queries = (places[:1] if writer.contiguous else places)[:, None, :, None, None]
        order = torch.arange(keys, device=places.device)
        hidden = order > queries
        if window is not None:
            hidden |= order <= queries - window
        return torch.zeros(hidden.shape, dtype=self.dtype, device=places.device).masked_fill_(hidden, -math.inf)

    def _mask_behind(self, stop: int, keys: int) -> Tensor:
        """A part of zeros that infinities follow: nothing is made for one token."""
        half = len(self._ahead) // 2
        if half < keys:
            half = 2 * keys
            self._ahead = self._embedding.new_zeros(2 * half)
            self._ahead[half:] = -math.inf
        return self._ahead[half - stop : half - stop + keys]
