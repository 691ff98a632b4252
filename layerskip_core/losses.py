"""Losses through an exit in chunks of tokens, used by training and evaluation."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label without a loss
CHUNK_LOGITS = 1 << 24  # logits of one exit alive at once: 64 MB in fp32
_SHARE_OF_HEAD = 0.5
_CACHED_LOGITS = 1 << 18  # logits at a time on a CPU: 1 MB in fp32


class CandidateHead:
    """A head of early exits that scores C of the V tokens in training: frequent ones, the targets,
    and a random sample that stands for all others.

    The softmax of its logits estimates that over all tokens (sampled softmax: Jean et al., 2015).
    Its weights are not trained: with estimated gradients in the head exact match was 1.4 points
    lower after 100 steps of SmolLM2 (one run each, examples/LOG.md), and exits agreed as often.
    """

    def __init__(
        self, weight: Tensor, frequent: Tensor, targets: Tensor, count: int, seed: int
    ) -> None:
        """`weight`: of the whole head, (V, D). `frequent` (F,) and `targets` (N,): ids. `count`:
        size of the sample, which `seed` alone decides.
        """
        is_other = torch.ones(len(weight), dtype=torch.bool)
        is_other[frequent.cpu()] = False
        is_other[targets.cpu()] = False
        others = is_other.nonzero().flatten()
        known = (~is_other).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed)
        sampled = others[torch.randperm(len(others), generator=generator)[:count]]
        offsets = torch.zeros(len(known) + len(sampled))
        if len(sampled):  # each stands for so many tokens
            offsets[len(known) :] = math.log(len(others) / len(sampled))
        ids = torch.cat((known, sampled))
        places = torch.zeros(len(weight), dtype=torch.long)
        places[ids] = torch.arange(len(ids))

        self._ids = ids.to(weight.device)
        self._places = places.to(weight.device)
        self._offsets = offsets.to(weight.device)
        self._weight = weight.detach()[self._ids]

    def __call__(self, states: Tensor) -> Tensor:
        """The head's inputs (N, D) to logits (N, C)."""
        return F.linear(states, self._weight) + self._offsets

    def part_of(self, logits: Tensor) -> Tensor:
        """From logits (N, V) those (N, C) of the candidates."""
        return logits[:, self._ids] + self._offsets

    def places(self, targets: Tensor) -> Tensor:
        """The index of each of the targets (N,) among the candidates."""
        return self._places[targets]


def target_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states (N, D) that predict a target, and the targets (N,), of (B, T, D) and (B,
    T).
    """
    shifted = labels[:, 1:]
    is_target = shifted != IGNORED
    return hidden[:, :-1][is_target], shifted[is_target]


def summed_losses(
    unembed: Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]],
    hidden: Sequence[Tensor],
    targets: Tensor | None,
    vocab_size: int,
    weights: Sequence[tuple[float, float]],
    teacher: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(weighted loss, sums (K, 3) of cross-entropy, divergence and agreement) of K exits, summed
    over N tokens, in fp32.

    `hidden`: the states (N, D) of each exit. `targets` (N,). `unembed`: a head for all exits, or
    one for each; in training a CandidateHead may estimate the sums of early ones, and with a
    teacher of all. `weights`: by exit, the factors in the loss of its cross-entropy and of its
    divergence KL(reference || exit).

    The reference is the last head's logits for the states `teacher` (N, D). Without a teacher it is
    the last exit, for earlier ones, if any of these weights its divergence; else the divergence is
    0. Gradients reach these states and the head's weights, not the reference. Agreement counts the
    tokens whose argmax is the reference's, only where gradients are disabled.

    Each chunk of tokens computes its gradient at once: no logits are kept for the backward pass,
    and none are computed twice.
    """
    unembeds = unembed if isinstance(unembed, Sequence) else [unembed] * len(hidden)
    trains = [torch.is_grad_enabled() and any(pair) for pair in weights]
    sums = torch.zeros(len(hidden), 3, device=hidden[0].device)
    gradients = {}  # of the hidden states, by index of the exit
    for index, states in enumerate(hidden):
        if trains[index]:
            gradients[index] = torch.zeros_like(states)
    head_gradients: dict[Tensor, Tensor] = {}  # by weight, summed over exits and chunks
    last = len(hidden) - 1
    distils = any(share for _, share in weights[:-1])
    tokens, width = hidden[0].shape
    for chunk in _chunks(tokens, width, vocab_size):
        reference = None
        if teacher is not None:
            with torch.no_grad():
                reference = unembeds[last](teacher[chunk])
        for index in range(last, -1, -1):  # the last exit is the reference of those before it
            part = hidden[index].detach()[chunk].requires_grad_(trains[index])
            head = unembeds[index]
            with torch.set_grad_enabled(trains[index]):
                logits = head(part)
            detached = logits.detach()
            wanted = None if targets is None else targets[chunk]
            aim = reference
            if isinstance(head, CandidateHead):
                wanted = None if wanted is None else head.places(wanted)
                if aim is not None and head is not unembeds[last]:
                    aim = head.part_of(aim)
            losses, slope = _losses(detached, wanted, aim, weights[index], trains[index])
            sums[index, :2] += losses
            if reference is not None and not torch.is_grad_enabled():
                sums[index, 2] += (detached.argmax(-1) == reference.argmax(-1)).sum()
            if slope is not None:
                gradients[index][chunk], of_weights = _backward(logits, slope, part)
                for weight, gradient in of_weights.items():
                    if weight not in head_gradients:
                        head_gradients[weight] = torch.zeros_like(weight)
                    head_gradients[weight] += gradient
            if index == last and distils and teacher is None:
                reference = detached
    loss = (sums[:, :2] * torch.tensor(weights, device=sums.device)).sum()
    if gradients:
        precomputed: Any = _Precomputed  # releases of PyTorch differ in whether `apply` is typed
        values = [*gradients.values(), *head_gradients.values()]
        inputs = [hidden[index] for index in gradients]
        loss = precomputed.apply(loss, values, *inputs, *head_gradients)
    return loss, sums


def _chunks(tokens: int, width: int, vocab_size: int) -> list[slice]:
    """Slices of at most CHUNK_LOGITS logits, or as many as half the head's weights; at least one,
    maybe empty, so that every process runs the head (DDP, FSDP2).

    Each chunk adds a gradient as large as the head's weights to their sum: the fewer, the faster.
    """
    rows = max(CHUNK_LOGITS // vocab_size, int(width * _SHARE_OF_HEAD), 1)
    return [slice(at, at + rows) for at in range(0, max(1, tokens), rows)]


def _losses(
    logits: Tensor,
    targets: Tensor | None,
    reference: Tensor | None,
    weights: tuple[float, float],
    trains: bool,
) -> tuple[Tensor, Tensor | None]:
    """((2,) cross-entropy and divergence from the reference, summed over tokens; gradient of their
    weighted sum).

    `logits` and `reference` are (N, V), with probabilities q and p. The gradient with respect to
    `logits` is q - one_hot(target) for the cross-entropy, q - p for KL(p || q). On a CPU a few
    tokens at a time stay in its cache.
    """
    sums = torch.zeros(2, device=logits.device)
    gradient = torch.empty_like(logits) if trains else None
    rows = max(1, len(logits))
    if logits.device.type == "cpu":
        rows = max(1, _CACHED_LOGITS // logits.shape[1])
    hard, soft = weights
    wide = torch.promote_types(logits.dtype, torch.float32)
    for at in range(0, len(logits), rows):
        block = slice(at, at + rows)
        logs = logits[block].log_softmax(-1, dtype=wide)
        if targets is not None:
            wanted = targets[block, None]
            sums[0] -= logs.gather(1, wanted).sum()
        if reference is not None:
            reference_logs = reference[block].log_softmax(-1, dtype=wide)
            probabilities = reference_logs.exp()
            sums[1] += torch.dot(probabilities.flatten(), (reference_logs - logs).flatten())
        slope = logs.exp_()
        if gradient is not None:
            slope.mul_(hard + soft)
            if reference is not None:
                slope.sub_(probabilities, alpha=soft)
            if targets is not None:
                slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -hard))
            gradient[block] = slope
    return sums, gradient


def _backward(
    logits: Tensor, gradient: Tensor, states: Tensor
) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """From the gradient of a head's logits: that of the states that it read, and those of its
    weights.
    """
    leaves = _leaves(logits)
    with torch.autocast(logits.device.type, enabled=False):  # as a backward pass runs
        found = torch.autograd.grad(logits, leaves, gradient)
    by_leaf = dict(zip(leaves, found, strict=True))
    return by_leaf.pop(states), by_leaf


def _leaves(output: Tensor) -> list[Tensor]:
    """The leaf tensors of an output's autograd graph."""
    leaves = list[Tensor]()
    seen = set[Any]()
    open_nodes = [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            open_nodes += [following for following, _ in node.next_functions]
    return leaves


class _Precomputed(torch.autograd.Function):
    """A value with precomputed gradients with respect to `tensors`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        return None, None, *(scale * gradient for gradient in ctx.saved_tensors)
