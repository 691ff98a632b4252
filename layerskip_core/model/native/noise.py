"""Gumbel noise by the C kernels: as in model/noise.py, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise import Noise, least_temperature
from ..noise import perturbed as perturbed_by_torch
from .compiled import CPerturbation, kernels


def can_perturb(scores: Tensor) -> bool:
    """Whether the C kernels read these scores."""
    return scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.is_contiguous()


def perturbed(logits: Tensor, noise: Noise, ids: Tensor | None = None) -> Tensor:
    """As `model.noise.perturbed`, by the C kernels where they can."""
    found = kernels()
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if found is None or not can_perturb(scores):
        return perturbed_by_torch(scores, noise, ids)
    rows, columns = scores.shape
    words = words_of(noise.keys)
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
        temperature=least_temperature(noise.temperature),
    )
    found.perturb(call, torch.get_num_threads())
    return scores


def words_of(keys: Sequence[int]) -> Tensor:
    """Keys of 64 bits as int64, which has no unsigned conversion."""
    return torch.tensor([key - (1 << 64) if key >> 63 else key for key in keys], dtype=torch.int64)
