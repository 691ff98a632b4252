"""The early-exit loss: cross-entropy of every exit through one shared LM head (LayerSkip section 4.2)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..config import ExitWeights

IGNORED = -100  # a label that takes no part in the loss
_CHUNK_LOGITS = 1 << 24  # logits of one exit alive at once: 64 MB in fp32


def exit_scales(num_layers: int, e_scale: float, kind: ExitWeights = "paper") -> list[float]:
    """e(l) for layer index l.

    paper: e_scale * (0 + 1 + ... + l), and (L-1) + e_scale * (0 + ... + L-2) for the last layer. Ours: e_scale * w(l + 1), and
    w(L) for the last layer, with w(n) = n (linear), sqrt(n) or 1 (uniform).
    """
    if kind != "paper":
        power = {"linear": 1.0, "sqrt": 0.5, "uniform": 0.0}[kind]
        return [*(e_scale * math.pow(layer, power) for layer in range(1, num_layers)), math.pow(num_layers, power)]
    scales = [e_scale * layer * (layer + 1) / 2 for layer in range(num_layers - 1)]
    last = num_layers - 1
    return [*scales, last + e_scale * last * (last - 1) / 2]


def exit_weights(exit_layers: Sequence[int], num_layers: int, e_scale: float, kind: ExitWeights = "paper") -> list[float]:
    """Normalised e~ of the exits that are on, in the order given; they sum to 1. A single layer has weight 1."""
    scales = exit_scales(num_layers, e_scale, kind)
    chosen = [scales[exit_layer - 1] for exit_layer in exit_layers]
    total = sum(chosen)
    return [scale / total for scale in chosen] if total else [1.0 / len(chosen)] * len(chosen)


def target_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states (N, D) that predict an unmasked label, and those labels (N,), of (B, T, D) and (B, T)."""
    shifted = labels[:, 1:]
    wanted = shifted != IGNORED
    return hidden[:, :-1][wanted], shifted[wanted]


def summed_cross_entropy(unembed: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Sum of the cross-entropy over N tokens, hidden (N, D), in fp32; in chunks as `summed_losses`."""
    return summed_losses(unembed, hidden, targets, vocab_size)[1]


def summed_losses(
    unembed: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int,
    teacher: Tensor | None = None,
    distill: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss to train on, cross-entropy) of an exit, each summed over N tokens, in fp32; hidden (N, D), targets (N,).

    With the last layer's hidden states as `teacher` (N, D) the loss is (1 - distill) * cross-entropy + distill * KL(last layer
    || exit), in which the last layer is a constant. Above _CHUNK_LOGITS logits all goes chunk by chunk and is recomputed in
    the backward pass, so that (N, V) is never alive.
    """

    def chunk_losses(part: Tensor, wanted: Tensor, taught: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = unembed(part).float()
        cross_entropy = functional.cross_entropy(logits, wanted, reduction="sum")
        if taught is None:
            return cross_entropy, cross_entropy
        with torch.no_grad():
            aim = unembed(taught).float().log_softmax(-1)
        divergence = functional.kl_div(logits.log_softmax(-1), aim, reduction="sum", log_target=True)
        return (1 - distill) * cross_entropy + distill * divergence, cross_entropy

    rows = max(1, _CHUNK_LOGITS // vocab_size)
    constant = None if teacher is None else teacher.detach()
    if hidden.shape[0] <= rows:
        return chunk_losses(hidden, targets, constant)
    wanted = torch.split(targets, rows)
    taught = [None] * len(wanted) if constant is None else torch.split(constant, rows)
    parts = zip(torch.split(hidden, rows), wanted, taught, strict=True)
    losses = [checkpoint(chunk_losses, *part, use_reentrant=False) for part in parts]
    trained, seen = zip(*losses, strict=True)
    return torch.stack(trained).sum(), torch.stack(seen).sum()
