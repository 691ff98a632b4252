"""Losses through an exit in chunks of tokens, used by training and evaluation."""

from collections.abc import Callable, Sequence

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


def summed_divergences(
    unembed: Callable[[Tensor], Tensor],
    runs: Sequence[Tensor],
    teacher: Tensor,
    vocab_size: int,
    total_variation: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """(divergence of each run from the teacher, agreement of the first), each summed over N tokens, in fp32.

    `runs` are hidden states (N, D) of which a loss can be taken, `teacher` (N, D) those that they should equal; `unembed`
    gives logits (N, V) of both, by weights that are not trained. The divergence is KL(teacher || run), or half the L1 distance
    of the probabilities (one minus the expected acceptance). Agreement counts the tokens with the same best token.

    Tokens are taken in chunks, and the gradient of each chunk is taken at once: so no logits are kept for the backward pass,
    and none are computed twice.
    """
    trains = torch.is_grad_enabled() and any(run.requires_grad for run in runs)
    rows = max(1, CHUNK_LOGITS // vocab_size)
    sums = [torch.zeros((), device=teacher.device) for _ in runs]
    gradients = [torch.zeros_like(run) for run in runs]
    agreeing = torch.zeros((), device=teacher.device)
    for at in range(0, teacher.shape[0], rows):
        with torch.no_grad():
            aim = unembed(teacher[at : at + rows]).float().log_softmax(-1)
        for number, run in enumerate(runs):
            part = run.detach()[at : at + rows].requires_grad_(trains)
            with torch.set_grad_enabled(trains):
                logits = unembed(part).float()
                loss = _divergence(aim, logits.log_softmax(-1), total_variation)
            if trains:
                gradients[number][at : at + rows] = torch.autograd.grad(loss, part)[0]
            sums[number] += loss.detach()
            if number == 0:
                agreeing += (logits.detach().argmax(-1) == aim.argmax(-1)).sum()
    if not trains:
        return sums, agreeing
    linear = [(run * gradient).sum() for run, gradient in zip(runs, gradients, strict=True)]  # has just this gradient
    return [value + (term - term.detach()) for value, term in zip(sums, linear, strict=True)], agreeing


def _divergence(aim: Tensor, found: Tensor, total_variation: bool) -> Tensor:
    """Summed over tokens, of log-probabilities (N, V)."""
    if total_variation:
        return (aim.exp() - found.exp()).abs().sum() / 2
    return functional.kl_div(found, aim, reduction="sum", log_target=True)
