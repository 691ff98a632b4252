"""Gumbel noise by the C kernels: as in model/noise.py, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .compiled import CPerturbation, kernels


def can_perturb(scores: Tensor) -> bool:
    """Whether the C kernels run here, and read these scores."""
    is_readable = scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.is_contiguous()
    return is_readable and kernels() is not None


def perturb(scores: Tensor, temperature: float, keys: Sequence[int], ids: Tensor | None) -> None:
    """`model.noise.perturbed` for scores (N, C), in place."""
    found = kernels()
    assert found is not None
    rows, columns = scores.shape
    words = words_of(keys)
    most = torch.empty(rows)
    ids = None if ids is None else ids.contiguous()
    call = CPerturbation(
        scores=scores.data_ptr(),
        most=most.data_ptr(),
        keys=words.data_ptr(),
        ids=None if ids is None else ids.data_ptr(),
        of_row=ids is not None and ids.dim() == 2,
        rows=rows,
        columns=columns,
        temperature=temperature,
    )
    found.perturb(call, torch.get_num_threads())


def words_of(keys: Sequence[int]) -> Tensor:
    """Keys of 64 bits as int64, which has no unsigned conversion."""
    return torch.tensor([key - (1 << 64) if key >> 63 else key for key in keys], dtype=torch.int64)
