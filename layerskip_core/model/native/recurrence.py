"""Layers with a memory of fixed size, between their projections: short convolutions and linear recurrences (recurrence.h)."""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from .compiled import _fields

CONVOLUTION, DECAY, DELTA = range(3)  # kinds, as the C code numbers them


class CRecurrence(Structure):
    _fields_ = [
        *_fields(c_int32, "kind taps channels slots width convolved query key value factor gate"),
        *_fields(c_int32, "key_heads heads key_dim value_dim norm_size gates_first"),
        *_fields(c_float, "eps least_step most_step"),
        *_fields(c_int64, "place"),
        *_fields(c_void_p, "filter filter_bias rate rate_bias skip norm"),
    ]


class CPassage(Structure):
    _fields_ = [
        *_fields(c_void_p, "positions starts memories settled"),
        *_fields(c_int32, "texts"),
        *_fields(c_void_p, "rows steps out"),
    ]


class Recurrence:
    """What stands between the projections of such a layer, and how it is called.

    A text has a memory of `memory_bytes`, which begins as zeros. Its convolution's inputs and its changes of the state are kept
    by position, and what is not yet settled can be overwritten. So a token that was rejected costs nothing.
    """

    def __init__(self, variant: str, outputs: int, weights: Mapping[str, Tensor | None], **sizes: float) -> None:
        """`variant`: of the kernels. `weights` and `sizes`: the fields of CRecurrence."""
        self.library, self.outputs = _library(variant), outputs
        self._weights = {name: part.detach().float().contiguous() for name, part in weights.items() if part is not None}
        self.structure = CRecurrence(**sizes, **{name: part.data_ptr() for name, part in self._weights.items()})
        self.memory_bytes = int(self.library.layerskip_memory_bytes(self.structure))

    @classmethod
    def short_convolution(cls, variant: str, filters: Tensor, bias: Tensor | None, slots: int) -> "Recurrence":
        """LFM2's: rows are (B, C, x), and the output C * convolution(B * x). `filters`: (channels, taps)."""
        channels, taps = filters.shape
        sizes = {"kind": CONVOLUTION, "taps": taps, "channels": channels, "slots": slots, "width": 3 * channels}
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
        slots: int,
        most_step: float = 1.0,
    ) -> "Recurrence":
        """Gated DeltaNet's, as in Qwen3.5: rows are (q, k, v, z), steps (b, a).

        `heads` and `dims`: of keys, and of values. `norm`: (value dim,), before the gate.
        """
        keys, values = heads[0] * dims[0], heads[1] * dims[1]
        sizes = _sizes(DELTA, filters, heads, dims, slots) | {"width": 2 * keys + 2 * values}
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
        slots: int,
        step_limits: tuple[float, float] = (0.0, inf),
        norm_groups: int = 1,
        gates_first: bool = True,
    ) -> "Recurrence":
        """Mamba-2's: rows are (gate, x, B, C), steps dt.

        `heads`: groups of B and C, and heads. `dims`: of the state, and of a head. `norm`: (heads * head dim,), over each of
        `norm_groups`; None for gates alone.
        """
        keys, values = heads[0] * dims[0], heads[1] * dims[1]
        sizes = _sizes(DECAY, filters, heads, dims, slots) | {"width": 2 * values + 2 * keys}
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
        memories: Sequence[Tensor],
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
        out = rows.new_empty(len(rows), self.outputs)
        addresses = (c_void_p * len(memories))(*(memory.data_ptr() for memory in memories))
        passage = CPassage(
            positions.data_ptr(),
            ctypes.addressof(bounds := (c_int32 * len(starts))(*starts)),
            ctypes.addressof(addresses),
            ctypes.addressof(stops := (c_int64 * len(settled))(*settled)),
            len(memories),
            rows.data_ptr(),
            None if steps is None else steps.data_ptr(),
            out.data_ptr(),
        )
        assert len(bounds) == len(stops) + 1 == len(memories) + 1 and rows.is_contiguous() and bounds[-1] == len(rows)
        assert all(self._can_run(*text, positions) for text in zip(memories, bounds, bounds[1:], stops, strict=False))
        self.library.layerskip_remember(self.structure, passage, threads)
        return out

    def _can_run(self, memory: Tensor, first: int, last: int, settled: int, positions: Tensor) -> bool:
        """Whether a text's tokens follow what its state has, and there are slots for all that is not settled."""
        if self.structure.kind == CONVOLUTION or first == last:
            return True
        base, start, stop = int(memory[:8].view(torch.int64)), int(positions[first]), int(positions[last - 1]) + 1
        return base <= start and (settled >= stop or stop - base <= self.structure.slots)

    def settle(self, memories: Sequence[Tensor], settled: Sequence[int], threads: int = 1) -> None:
        """Applies the changes of tokens before the `settled` positions to the states. The next call does it as well."""
        none = torch.empty(0, self.structure.width), torch.empty(0), torch.empty(0, dtype=torch.long)
        self.run(*none, [0] * (len(memories) + 1), memories, settled, threads)


def _sizes(kind: int, filters: Tensor, heads: tuple[int, int], dims: tuple[int, int], slots: int) -> dict[str, int]:
    """Without a factor of the convolution's inputs."""
    sizes = {"kind": kind, "channels": filters.shape[0], "taps": filters.shape[1], "slots": slots, "factor": -1}
    return sizes | {"key_heads": heads[0], "heads": heads[1], "key_dim": dims[0], "value_dim": dims[1]}


@cache
def _library(variant: str) -> ctypes.CDLL:
    """The library that `compiled.kernels` loaded, with these functions."""
    library = ctypes.CDLL(str(Path(__file__).with_name(f"_{variant}.so")))
    library.layerskip_remember.argtypes = [POINTER(CRecurrence), POINTER(CPassage), c_int]
    library.layerskip_remember.restype = None
    library.layerskip_memory_bytes.argtypes, library.layerskip_memory_bytes.restype = [POINTER(CRecurrence)], c_int64
    return library
