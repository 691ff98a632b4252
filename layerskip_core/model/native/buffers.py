"""What the threads of a kernel call write to, kept for the calls that decoding repeats."""

import torch
from torch import Tensor

from ..spec import ModelSpec
from .compiled import ACTIVATIONS, CCall, CShape

_KEPT_ROWS = 64  # calls of up to this many rows keep their buffers
_KEPT = 16  # row counts whose buffers are kept


class Buffers:
    """Those of a call over `rows` rows, and the call's structure with everything that stays the same."""

    def __init__(self, rows: int, threads: int, shape: CShape, norms_blocks: bool) -> None:
        self._shared = [torch.empty(rows, width) for width in _widths(shape, norms_blocks)]
        own = -(-(4 * (shape.hidden + 16) + rows * _formed_bytes(shape)) // 64) * 64  # a hidden state and all formed rows
        self._scratch = torch.empty(threads * own, dtype=torch.uint8)
        self.threads = threads
        self.call = CCall(rows=rows, rows_per_sequence=rows)
        self.call.qkv, self.call.mixed, self.call.inside, self.call.block = (part.data_ptr() for part in self._shared)
        self.call.scratch, self.call.scratch_bytes = self._scratch.data_ptr(), own
        self._logits = torch.empty(0)

    def logits(self, outputs: int) -> Tensor:
        """(rows, outputs), for a call whose caller does not see them."""
        if self._logits.shape[-1] != outputs:
            self._logits = torch.empty(self.call.rows, outputs)
        return self._logits

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self._shared, self._scratch))


class BufferPool:
    """The buffers of all calls of one model."""

    def __init__(self, shape: CShape, norms_blocks: bool) -> None:
        """`norms_blocks`: whether norms come after blocks."""
        self._shape, self._norms_blocks = shape, norms_blocks
        self._kept: dict[tuple[int, int], Buffers] = {}

    def of(self, rows: int) -> Buffers:
        """Those for this many rows and the threads of now. The next call with as many overwrites what is in them."""
        threads = torch.get_num_threads()
        buffers = self._kept.get((rows, threads))
        if buffers is None:
            buffers = Buffers(rows, threads, self._shape, self._norms_blocks)
            if rows <= _KEPT_ROWS:
                if len(self._kept) >= _KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[rows, threads] = buffers
        return buffers

    def row_bytes(self) -> int:
        """About what the activations of a row take."""
        shared = 4 * (sum(_widths(self._shape, self._norms_blocks)) + 2 * int(self._shape.hidden))
        return shared + torch.get_num_threads() * _formed_bytes(self._shape)


def shape_of(spec: ModelSpec, dtype: torch.dtype) -> CShape:
    """The sizes that the kernels need, of a model with weights in `dtype`, which is that of its cache."""
    architecture = spec.architecture
    return CShape(
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rotary=spec.rotary,
        inner=spec.inner,
        bf16_cache=dtype == torch.bfloat16,
        activation=ACTIVATIONS.index(spec.activation),
        gated=architecture.gated,
        norms_projections=architecture.query_key_norms == "projection",
        eps=spec.eps,
        attention_scale=spec.attention_scale,
        score_cap=spec.score_cap or 0.0,
        embedding_scale=float(torch.tensor(spec.embedding_scale).to(dtype)),  # as transformers rounds it
        residual_scale=spec.residual_scale,
    )


def _widths(shape: CShape, norms_blocks: bool) -> tuple[int, int, int, int]:
    """Of the rows that threads share: queries with keys and values, mixed values, the inside of the MLP, a block's output."""
    mixed = shape.heads * shape.head_dim
    return mixed + 2 * shape.kv_heads * shape.head_dim, mixed, shape.inner, shape.hidden if norms_blocks else 0


def _formed_bytes(shape: CShape) -> int:
    """At most what a row takes in the form that the kernel of a matrix reads."""
    return 4 * int(max(2 * shape.hidden, shape.heads * shape.head_dim, shape.inner)) + 64  # a block's map reads two states
