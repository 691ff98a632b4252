"""Losses through an exit in chunks of tokens, used by training and evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a label that takes no part in the loss
CHUNK_LOGITS = 1 << 24  # logits of one exit alive at once: 64 MB in fp32
_CACHED_LOGITS = 1 << 18  # of a few tokens: 1 MB in fp32


def target_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states (N, D) that predict a target, and the targets (N,), of (B, T, D) and (B, T)."""
    shifted = labels[:, 1:]
    is_target = shifted != IGNORED
    return hidden[:, :-1][is_target], shifted[is_target]


@dataclass(frozen=True)
class Teacher:
    """The reference of a divergence: constant hidden states (N, D), and the head that gives logits (N, V)."""

    states: Tensor
    unembed: Callable[[Tensor], Tensor]


def summed_losses(
    unembed: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, KL(teacher || exit)) of an exit, each summed over N tokens, in fp32; hidden (N, D), targets (N,).

    The divergence is 0 without a teacher, into which no gradient flows. Above CHUNK_LOGITS logits the tokens are taken in
    chunks whose logits are recomputed in the backward pass, so that (N, V) never exists as a whole.
    """

    def chunk_losses(part: Tensor, wanted: Tensor, taught: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = unembed(part).float()
        cross_entropy = functional.cross_entropy(logits, wanted, reduction="sum")
        if teacher is None or taught is None:
            return cross_entropy, cross_entropy.new_zeros(())
        with torch.no_grad():
            aim = teacher.unembed(taught).float().log_softmax(-1)
        divergence = functional.kl_div(logits.log_softmax(-1), aim, reduction="sum", log_target=True)
        return cross_entropy, divergence

    rows = max(1, CHUNK_LOGITS // vocab_size)
    constant = None if teacher is None else teacher.states.detach()
    if hidden.shape[0] <= rows:
        return chunk_losses(hidden, targets, constant)
    wanted = torch.split(targets, rows)
    taught = [None] * len(wanted) if constant is None else torch.split(constant, rows)
    parts = zip(torch.split(hidden, rows), wanted, taught, strict=True)
    losses = [checkpoint(chunk_losses, *part, use_reentrant=False) for part in parts]
    cross_entropies, divergences = zip(*losses, strict=True)
    return torch.stack(cross_entropies).sum(), torch.stack(divergences).sum()


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
    sums = torch.zeros(len(runs), device=teacher.device)
    gradients = [torch.zeros_like(run) for run in runs]
    agreeing = torch.zeros((), device=teacher.device)
    for at in range(0, teacher.shape[0], rows):
        chunk = slice(at, at + rows)
        with torch.no_grad():
            aim = unembed(teacher[chunk])
        parts = [run.detach()[chunk].requires_grad_(trains) for run in runs]
        with torch.set_grad_enabled(trains):
            logits = [unembed(part) for part in parts]
        values, slopes = _divergences(aim, [part.detach() for part in logits], total_variation, trains)
        sums += values
        agreeing += (logits[0].argmax(-1) == aim.argmax(-1)).sum()
        if trains:
            for gradient, one, part, slope in zip(gradients, logits, parts, slopes, strict=True):
                gradient[chunk] = torch.autograd.grad(one, part, slope)[0]
    if not trains:
        return list(sums), agreeing
    linear = [(run * gradient).sum() for run, gradient in zip(runs, gradients, strict=True)]  # has just this gradient
    return [value + (term - term.detach()) for value, term in zip(sums, linear, strict=True)], agreeing


def _divergences(aim: Tensor, found: Sequence[Tensor], total_variation: bool, trains: bool) -> tuple[Tensor, list[Tensor]]:
    """(the divergence of each of the K `found`, (K,), summed over tokens; its gradients by their logits), of logits (N, V).

    With p the probabilities of the aim and q those found, the gradient of KL(p || q) is q - p. That of the total variation is
    q (s - sum(q s)), s = sign(q - p) / 2. On a CPU a few tokens are taken at a time, which stay in its cache.
    """
    sums = torch.zeros(len(found), device=aim.device)
    slopes = [torch.empty_like(logits) for logits in found] if trains else []
    rows = max(1, _CACHED_LOGITS // aim.shape[1]) if aim.device.type == "cpu" else aim.shape[0]
    for at in range(0, aim.shape[0], rows):
        block = slice(at, at + rows)
        wanted = aim[block].float().log_softmax(-1)
        chances = wanted.exp()
        for number, logits in enumerate(found):
            logs = logits[block].float().log_softmax(-1)
            if total_variation:
                slope = logs.exp_()
                signs = (slope - chances).sign_().div_(2)
                sums[number] += ((slope - chances) * signs).sum()
                slope.mul_(signs - (slope * signs).sum(-1, keepdim=True))
            else:
                sums[number] += torch.dot(chances.flatten(), (wanted - logs).flatten())
                slope = logs.exp_().sub_(chances)
            if trains:
                slopes[number][block] = slope
    return sums, slopes
