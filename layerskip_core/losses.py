"""Cross-entropy through an exit in chunks of tokens, used by training and evaluation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a label that takes no part in the loss
CHUNK_LOGITS = 1 << 24  # logits of one exit alive at once: 64 MB in fp32


def summed_cross_entropy(unembed: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Sum of the cross-entropy over N tokens, hidden (N, D), in fp32, in chunks like `summed_losses`."""
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
    || exit); no gradient flows into the teacher. Above CHUNK_LOGITS logits the tokens are taken in chunks whose logits are
    recomputed in the backward pass, so that (N, V) never exists as a whole.
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

    rows = max(1, CHUNK_LOGITS // vocab_size)
    constant = None if teacher is None else teacher.detach()
    if hidden.shape[0] <= rows:
        return chunk_losses(hidden, targets, constant)
    wanted = torch.split(targets, rows)
    taught = [None] * len(wanted) if constant is None else torch.split(constant, rows)
    parts = zip(torch.split(hidden, rows), wanted, taught, strict=True)
    losses = [checkpoint(chunk_losses, *part, use_reentrant=False) for part in parts]
    trained, seen = zip(*losses, strict=True)
    return torch.stack(trained).sum(), torch.stack(seen).sum()
