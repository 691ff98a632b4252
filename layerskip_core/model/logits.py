"""What follows the head of some architectures."""

import torch
from torch import Tensor

from .spec import ModelSpec


def scaled_logits(logits: Tensor, spec: ModelSpec) -> Tensor:
    """The output of the head after the division and the soft cap of an architecture, if it has them."""
    if spec.logits_divisor != 1:
        logits = logits / spec.logits_divisor
    if spec.logits_cap is not None:
        logits = torch.tanh(logits / spec.logits_cap) * spec.logits_cap
    return logits
