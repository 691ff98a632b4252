"""Calls the kernels of short convolutions and linear recurrences (recurrence.h) by themselves."""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from layerskip_core.model.native import compiled
from layerskip_core.model.native.compiled import CRecurrence, _fields
from layerskip_core.model.native.recurrence import CONVOLUTION, DECAY, DELTA, LARGEST_KEY, MOST_TAPS


class CPassage(Structure):
    _fields_ = [
        *_fields(c_void_p, "positions starts states rings slots settled"),
        *_fields(c_int64, "slot_bytes"),
        *_fields(c_int32, "texts"),
        *_fields(c_void_p, "rows steps out"),
    ]


@dataclass(frozen=True)
class TextMemory:
    """What a text leaves in a layer: a state, which begins as zeros, and a ring of slots for its last positions."""

    state: Tensor  # bytes
    ring: Tensor  # (slots, bytes)

    @property
    def base(self) -> int:
        """The position that the state has reached."""
        return int(self.state[:8].view(torch.int64)) if len(self.state) else 0


class Recurrence:
    """What stands between the projections of such a layer, and how it is called.

    What tokens leave is kept by their positions, and what is not yet settled can be overwritten. So a token that is rejected
    costs nothing.
    """

    def __init__(self, variant: str, outputs: int, weights: Mapping[str, Tensor | None], **sizes: float) -> None:
        """`variant`: of the kernels. `weights` and `sizes`: the fields of CRecurrence."""
        self.loaded, self.outputs = _library(variant), outputs
        self._weights = {name: part.detach().float().contiguous() for name, part in weights.items() if part is not None}
        self.structure = CRecurrence(**sizes, **{name: part.data_ptr() for name, part in self._weights.items()})
        assert self.structure.taps <= MOST_TAPS and self.structure.key_dim <= LARGEST_KEY
        self._bytes = [int(self.loaded.layerskip_memory_bytes(self.structure, of_slot)) for of_slot in (0, 1)]

    def memory(self, slots: int) -> TextMemory:
        """Of a text that begins. `slots`: for all positions from its base to the end of a call that does not settle them, and
        for `taps` - 1 more than may be rejected.
        """
        assert slots >= self.structure.taps
        state, slot = self._bytes
        return TextMemory(torch.zeros(state, dtype=torch.uint8), torch.zeros(slots, slot, dtype=torch.uint8))

    @classmethod
    def short_convolution(cls, variant: str, filters: Tensor, bias: Tensor | None) -> "Recurrence":
        """LFM2's: rows are (B, C, x), and the output C * convolution(B * x). `filters`: (channels, taps)."""
        channels, taps = filters.shape
        sizes = {"kind": CONVOLUTION, "taps": taps, "channels": channels, "width": 3 * channels}
        columns = {"convolved": 2 * channels, "factor": 0, "gate": channels}
        return cls(variant, channels, {"filter": filters.T, "filter_bias": bias}, **sizes, **columns)

    @classmethod
    def delta_rule(
        cls,
        variant: str,
        heads: tuple[int, int],
        dims: tuple[int, int],
        filters: Tensor,
        log_rate: Tensor,
        rate_bias: Tensor,
        norm: Tensor,
        eps: float,
        most_step: float = 1.0,
    ) -> "Recurrence":
        """Gated DeltaNet's, as in Qwen3.5: rows are (q, k, v, z), steps (b, a).

        `heads` and `dims`: of keys, and of values. `norm`: (value dim,), before the gate.
        """
        keys, values = heads[0] * dims[0], heads[1] * dims[1]
        sizes = _sizes(DELTA, filters, heads, dims) | {"width": 2 * keys + 2 * values}
        columns = {"query": 0, "key": keys, "value": 2 * keys, "gate": 2 * keys + values}
        weights = {"filter": filters.T, "rate": -log_rate.float().exp(), "rate_bias": rate_bias, "norm": norm.repeat(heads[1])}
        return cls(variant, values, weights, **sizes, **columns, norm_size=dims[1], eps=eps, most_step=most_step)

    @classmethod
    def mamba2(
        cls,
        variant: str,
        heads: tuple[int, int],
        dims: tuple[int, int],
        filters: Tensor,
        bias: Tensor | None,
        log_rate: Tensor,
        rate_bias: Tensor,
        skip: Tensor,
        norm: Tensor | None,
        eps: float,
        step_limits: tuple[float, float] = (0.0, inf),
        norm_groups: int = 1,
        gates_first: bool = True,
    ) -> "Recurrence":
        """Mamba-2's: rows are (gate, x, B, C), steps dt.

        `heads`: groups of B and C, and heads. `dims`: of the state, and of a head. `norm`: (heads * head dim,), over each of
        `norm_groups`; None for gates alone.
        """
        keys, values = heads[0] * dims[0], heads[1] * dims[1]
        sizes = _sizes(DECAY, filters, heads, dims) | {"width": 2 * values + 2 * keys}
        columns = {"gate": 0, "convolved": values, "value": values, "key": 2 * values, "query": 2 * values + keys}
        weights = {"filter": filters.T, "filter_bias": bias, "rate": -log_rate.float().exp(), "rate_bias": rate_bias}
        norms = {"norm_size": 0 if norm is None else values // norm_groups, "gates_first": gates_first, "eps": eps}
        limits = {"least_step": step_limits[0], "most_step": step_limits[1]}
        return cls(variant, values, weights | {"skip": skip, "norm": norm}, **sizes, **columns, **norms, **limits)

    def run(
        self,
        rows: Tensor,
        steps: Tensor | None,
        positions: Tensor,
        starts: Sequence[int],
        memories: Sequence[TextMemory],
        settled: Sequence[int],
        threads: int = 1,
    ) -> Tensor:
        """The outputs (N, outputs) of N tokens of some texts, text after text.

        Args:
            rows: (N, width), fp32 projections, which are changed.
            steps: (N, 2, heads) fp32, which are changed: (b, a) of the delta rule; (anything, dt) of Mamba-2.
            positions: (N,) int64, consecutive in each text. A text's first one is at most where its last call ended.
            starts: where the tokens of each text begin, and N. A text may have none.
            memories: of each text.
            settled: of each text the position before which no token will be rejected. A position at or beyond it may be run
                again, with another token.
        """
        out, spans = rows.new_empty(len(rows), self.outputs), list(pairwise(starts))
        assert rows.is_contiguous() and len(spans) == len(memories) == len(settled) and starts[-1] == len(rows)
        assert all(self._can_run(*text, positions) for text in zip(memories, spans, settled, strict=True))
        arrays = (
            (c_int32 * len(starts))(*starts),
            (c_void_p * len(spans))(*(memory.state.data_ptr() for memory in memories)),
            (c_void_p * len(spans))(*(memory.ring.data_ptr() for memory in memories)),
            (c_int64 * len(spans))(*(len(memory.ring) for memory in memories)),
            (c_int64 * len(spans))(*settled),
        )
        addresses = (rows.data_ptr(), None if steps is None else steps.data_ptr(), out.data_ptr())
        passage = CPassage(
            positions.data_ptr(), *(ctypes.addressof(part) for part in arrays), self._bytes[1], len(spans), *addresses
        )
        self.loaded.layerskip_remember(self.structure, passage, threads)
        return out

    def _can_run(self, memory: TextMemory, span: tuple[int, int], settled: int, positions: Tensor) -> bool:
        """Whether a text's tokens follow what its state has, and there are slots for all that is not settled."""
        (first, last), slots = span, len(memory.ring)
        if first == last:
            return True
        start, stop = int(positions[first]), int(positions[last - 1]) + 1
        base = memory.base if len(memory.state) else start
        return base <= start <= base + slots and (settled >= stop or stop - settled + self.structure.taps - 1 <= slots)

    def settle(self, memories: Sequence[TextMemory], settled: Sequence[int], threads: int = 1) -> None:
        """Applies the changes of tokens before the `settled` positions to the states. The next call does it as well."""
        none = torch.empty(0, self.structure.width), torch.empty(0), torch.empty(0, dtype=torch.long)
        self.run(*none, [0] * (len(memories) + 1), memories, settled, threads)


def _sizes(kind: int, filters: Tensor, heads: tuple[int, int], dims: tuple[int, int]) -> dict[str, int]:
    """Without a factor of the convolution's inputs."""
    sizes = {"kind": kind, "channels": filters.shape[0], "taps": filters.shape[1], "factor": -1}
    return sizes | {"key_heads": heads[0], "heads": heads[1], "key_dim": dims[0], "value_dim": dims[1]}


@cache
def _library(variant: str) -> ctypes.CDLL:
    """The library that `compiled.kernels` loaded, with these functions."""
    library = ctypes.CDLL(str(Path(compiled.__file__).with_name(f"_{variant}.so")))
    library.layerskip_remember.argtypes = [POINTER(CRecurrence), POINTER(CPassage), c_int]
    library.layerskip_remember.restype = None
    library.layerskip_memory_bytes.argtypes = [POINTER(CRecurrence), c_int]
    library.layerskip_memory_bytes.restype = c_int64
    return library
