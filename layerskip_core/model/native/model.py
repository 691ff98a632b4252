"""PackedModel by the C kernels, where they were built and the CPU has what they need."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...config import PackingConfig, Quantization
from ..cache import DepthCache
from ..packed import PackedModel, can_pack
from ..quantized import GROUP_SIZE
from ..weights import Weights, head_dim
from .compiled import CCall, CDraft, CLayer, CShape, Kernels, kernels
from .weights import NativeMatrix

_LARGEST_HEAD = 256
_KEPT_ROWS = 64  # calls of up to so many rows keep their buffers
_KEPT = 16  # of so many row counts


def can_run_native(config: Any, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None) -> bool:
    """Whether there are kernels here for every part of this architecture in this precision."""
    if not can_pack(config) or device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * head_dim(config))
    low_bit = packing is not None and (packing.quantize or packing.draft_weights) is not None
    divisor = GROUP_SIZE if low_bit else 2
    size = head_dim(config)
    if any(width % divisor for width in widths) or size % 2 or size > _LARGEST_HEAD:
        return False
    found = kernels()
    return found is not None and found.has_threads


class NativeModel(PackedModel):
    """The same operations; hidden states are fp32 whatever the weights are. Always exact, see `PackingConfig.exact`."""

    _layers: list["_Layer"]  # type: ignore[assignment]
    _head: NativeMatrix  # type: ignore[assignment]
    _norm: Tensor  # type: ignore[assignment]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.exact = False  # nothing has to be done for it
        found = kernels()
        assert found is not None
        config, size = self.config, head_dim(self.config)
        shape = CShape(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            size,
            config.intermediate_size,
            int(self.dtype == torch.bfloat16),
            float(config.rms_norm_eps),
            size**-0.5,
        )
        for model in (self, self.draft):
            if isinstance(model, NativeModel):
                model._ready(found, shape)

    def _ready(self, found: Kernels, shape: CShape) -> None:
        self._kernels, self._shape = found, shape
        self._array = (CLayer * self.num_layers)(*(layer.structure for layer in self._layers))
        self._calls: dict[tuple[int, int], _Buffers] = {}
        self._cos = self._sin = torch.empty(0, 1)

    @property
    def implementation(self) -> str:
        kinds = ", ".join(filter(None, (self._kernels.variant, self._quantize)))
        return f"native ({kinds})" + (f", {self._draft_weights} drafts" if self._draft_weights else "")

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids).float()

    def _pack_layer(self, weights: Weights, index: int, quantization: Quantization | None, exact: bool) -> "_Layer":  # type: ignore[override]
        window = self._window(self._kinds[index])
        return _Layer(weights, self.config, index, quantization, window)

    def _pack_head(  # type: ignore[override]
        self, norm: Tensor, weight: Tensor, bias: Tensor | None, quantization: Quantization | None, exact: bool
    ) -> tuple[Tensor, NativeMatrix]:
        return norm.float(), NativeMatrix([weight], None if bias is None else [bias], quantization)

    def _run(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: DepthCache) -> Tensor:
        batch, count, size = hidden.shape
        buffers = self._buffers(batch * count)
        places = positions.contiguous()
        self._place(buffers.call, cache, cache.writer(positions).stop, places, start)
        buffers.call.rows_per_sequence = count
        rows = hidden.reshape(-1, size).to(torch.float32, copy=True)
        buffers.call.hidden = rows.data_ptr()
        first = ctypes.addressof(self._array) + start * ctypes.sizeof(CLayer)
        self._kernels.span(self._shape, first, stop - start, buffers.call, buffers.threads)
        return rows.view(batch, count, size)

    def draft_greedily(
        self, token: int, layers: int, positions: Tensor, cache: DepthCache, ends: frozenset[int]
    ) -> tuple[Tensor, Tensor]:
        """A draft in one call: `token`, which stands at the first of `positions` (1, d), and what is most probable after it by
        the first `layers` layers, until one of `ends` or d drafts.

        Returns the tokens (1, K+1) and their hidden states (1, K+1, D). Needs a place behind the positions for the last state.
        """
        most = positions.shape[1]
        places = torch.arange(int(positions[0, 0]), int(positions[0, 0]) + most + 1)
        buffers = self._buffers(1)
        self._place(buffers.call, cache, cache.writer(places[None]).stop, places, 0)
        buffers.call.rows_per_sequence = 1
        tokens = torch.empty(1, most + 1, dtype=torch.long)
        tokens[0, 0] = token
        states = torch.empty(1, most + 1, self.hidden_size)
        logits = torch.empty(self._head.outputs)
        vocabulary = None if self.vocabulary is None else self.vocabulary.ids
        end_ids = (ctypes.c_int64 * len(ends))(*ends)
        draft = CDraft(
            self._embedding.data_ptr(),
            None if vocabulary is None else vocabulary.data_ptr(),
            ctypes.addressof(end_ids),
            len(ends),
            most,
            *(tensor.data_ptr() for tensor in (tokens, states, logits)),
        )
        self._kernels.draft(
            *(self._shape, ctypes.addressof(self._array), layers, self._norm.data_ptr(), self._head.structure),
            *(buffers.call, draft, buffers.threads),
        )
        count = draft.drafted + 1
        return tokens[:, :count], states[:, :count]

    def _place(self, call: CCall, cache: DepthCache, stop: int, positions: Tensor, start: int) -> None:
        """Where the call's rows stand, and where the keys and values of its layers from `start` on are."""
        held = cache.room(stop, self._shape.kv_heads, self._shape.head_dim, self._embedding)
        self._grow_rope(stop)
        call.positions = positions.data_ptr()
        call.cos, call.sin = self._cos.data_ptr(), self._sin.data_ptr()
        call.cache = held.data_ptr() + start * held.stride(0) * held.element_size()
        call.sequences, call.places = held.shape[2], held.shape[4]

    def _logits(self, rows: Tensor) -> Tensor:
        rows = rows.to(torch.float32).contiguous()
        buffers = self._buffers(len(rows))
        buffers.call.hidden = rows.data_ptr()
        logits = torch.empty(len(rows), self._head.outputs)
        self._kernels.score(
            self._shape, self._norm.data_ptr(), self._head.structure, buffers.call, logits.data_ptr(), buffers.threads
        )
        return logits

    def _grow_rope(self, stop: int) -> None:
        if len(self._cos) < stop:
            angles = self._rope.angles(2 * stop)
            self._cos, self._sin = angles.real.float().contiguous(), angles.imag.float().contiguous()

    def _buffers(self, rows: int) -> "_Buffers":
        threads = torch.get_num_threads()
        found = self._calls.get((rows, threads))
        if found is None:
            found = _Buffers(rows, threads, self._shape, self.max_positions)
            if rows <= _KEPT_ROWS:
                if len(self._calls) >= _KEPT:
                    self._calls.pop(next(iter(self._calls)))
                self._calls[rows, threads] = found
        return found


class _Buffers:
    """What the threads of a call over so many rows write to, and the call's structure with all that does not change."""

    def __init__(self, rows: int, threads: int, shape: CShape, places: int) -> None:
        mixed = shape.heads * shape.head_dim
        slots = mixed + 2 * shape.kv_heads * shape.head_dim
        widest = max(shape.hidden, mixed, shape.inner)
        own = 4 * (max(places, shape.hidden) + 16) + rows * (4 * widest + 64)
        own = -(-own // 64) * 64
        self._held = [torch.empty(rows, width) for width in (slots, mixed, shape.inner)]
        self._scratch = torch.empty(threads * own, dtype=torch.uint8)
        self.threads = threads
        self.call = CCall(rows=rows, rows_per_sequence=rows, scratch=self._scratch.data_ptr(), scratch_bytes=own)
        self.call.qkv, self.call.mixed, self.call.inside = (held.data_ptr() for held in self._held)


class _Layer:
    """A layer's weights and the C structure that says where they are."""

    def __init__(
        self, weights: Weights, config: Any, index: int, quantization: Quantization | None, window: int | None
    ) -> None:
        attention, mlp = weights.below("self_attn."), weights.below("mlp.")
        qkv, qkv_bias = attention.together(("q_proj", "k_proj", "v_proj"))
        gate_up, gate_up_bias = mlp.together(("gate_proj", "up_proj"))
        self.matrices = [
            NativeMatrix([torch.cat(qkv)], None if qkv_bias is None else [torch.cat(qkv_bias)], quantization),
            _single(attention, "o_proj", quantization),
            NativeMatrix(gate_up, gate_up_bias, quantization),
            _single(mlp, "down_proj", quantization),
        ]
        self.norms = [
            None if norm is None else norm.float()
            for norm in (
                weights.of("input_layernorm.weight"),
                weights.of("post_attention_layernorm.weight"),
                attention.get("q_norm.weight"),
                attention.get("k_norm.weight"),
            )
        ]
        rotates = bool(config.no_rope_layers[index]) if config.model_type == "smollm3" else True
        self.structure = CLayer(
            *(matrix.structure for matrix in self.matrices),
            *(None if norm is None else norm.data_ptr() for norm in self.norms),
            int(rotates),
            window or 0,
        )


def _single(weights: Weights, name: str, quantization: Quantization | None) -> NativeMatrix:
    bias = weights.get(f"{name}.bias")
    return NativeMatrix([weights.of(f"{name}.weight")], None if bias is None else [bias], quantization)
