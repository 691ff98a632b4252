"""The noise of sampling: a function of seed, position and token id alone.

The largest of logit + temperature * Gumbel noise is a sample of softmax(logits / temperature)
(Gumbel, 1954). All random numbers come from a hash, so a choice does not depend on what was drawn
before, in which batch, or after which drafts. A drafter that adds the same noise to its own logits
chooses the target's token with probability (1 - d) / (1 + d) or more, where d is the distance
(total variation) of both distributions (Daliri, Musco, Suresh, 2024, arXiv 2408.07978).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_PIECE = 1 << 20  # numbers of noise that are made at once
_FACTORS = 0x7FEB352D, 0x846CA68B  # of a mixer of 32 bits (lowbias32: Wellons, 2018)
_SMALLEST = 2.0**-31  # noise has 31 bits: a token of probability below this may never be chosen
_MOST = 0x7FFFFFBF  # fp32 rounds larger numbers to 2^31


class Noise(NamedTuple):
    """The noise of N choices."""

    temperature: float
    keys: Sequence[int]  # (N,), see `key_of`


def key_of(seed: int, position: int) -> int:
    """64 bits for the choice of the token at a position of a text (splitmix64: Steele et al., 2014,
    twice).
    """
    return _mixed(_mixed(seed & _WORD) ^ position)


def least_temperature(temperature: float, dtype: torch.dtype = torch.float32) -> float:
    """The temperature, or the smallest that does not round to 0."""
    return max(temperature, torch.finfo(dtype).tiny)


def _mixed(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def perturbed(logits: Tensor, noise: Noise, ids: Tensor | None = None) -> Tensor:
    """Logits (N, C) minus the largest of their row, plus temperature * noise; in place if they are
    fp32 or fp64.

    `ids`: the token ids of the columns, (C,) or by row (N, C); None for 0..C-1. Logits of -inf stay
    so; each row needs a finite one. A row's bits do not depend on other rows. `native.noise` has
    the same function for our kernels.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperature = least_temperature(noise.temperature, scores.dtype)
    scores -= scores.amax(-1, keepdim=True)
    tokens = _mixed_tokens(ids, scores)
    # torch's logarithm rounds the rest of a vector differently: in fp64 on a CPU, no fp32 number
    # shows it.
    dtype = torch.float64 if scores.device.type == "cpu" else scores.dtype
    most = max(1, _PIECE // scores.shape[-1])
    for start in range(0, len(scores), most):
        rows = slice(start, start + most)
        part = scores[rows]
        of_rows = tokens[rows] if tokens.dim() == 2 else tokens
        part += gumbel(noise.keys[rows], of_rows, dtype).to(part.dtype).mul_(temperature)
    return scores


def gumbel(keys: Sequence[int], tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Gumbel noise (N, C), from keys (N,) and mixed token ids (C,) or (N, C)."""
    halves = [(_signed(key & 0xFFFFFFFF), _signed(key >> 32)) for key in keys]
    low, high = (
        torch.tensor(halves, dtype=torch.int32).to(tokens.device, non_blocking=True).T[..., None]
    )
    bits = tokens ^ low
    bits ^= _shifted(bits, 16)
    bits *= _signed(_FACTORS[0])
    bits ^= _shifted(bits, 15)
    bits += high
    bits *= _signed(_FACTORS[1])
    bits ^= _shifted(bits, 16)
    bits &= 0x7FFFFFFF
    uniform = bits.clamp_(max=_MOST).to(dtype).add_(0.5).mul_(_SMALLEST)
    noise: Tensor = uniform.neg_().log1p_().neg_().log_().neg_()
    return noise


def _mixed_tokens(ids: Tensor | None, scores: Tensor) -> Tensor:
    """The mixed token ids of the columns of scores (N, C), see `perturbed`."""
    if ids is None:
        return _mixed_ids(scores.shape[-1], scores.device)
    return _mixed32(ids.to(scores.device, torch.int32))


def _mixed32(ids: Tensor) -> Tensor:
    """Token ids (C,) in int32, mixed."""
    bits = ids ^ _shifted(ids, 16)
    bits *= _signed(_FACTORS[0])
    bits ^= _shifted(bits, 15)
    bits *= _signed(_FACTORS[1])
    return bits ^ _shifted(bits, 16)


@lru_cache(4)
def _mixed_ids(count: int, device: torch.device) -> Tensor:
    return _mixed32(torch.arange(count, dtype=torch.int32, device=device))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A shift to the right that fills with zeros: torch's fills with the sign."""
    return (bits >> by).bitwise_and_((1 << (32 - by)) - 1)


def _signed(word: int) -> int:
    """The int32 of the same bits."""
    return word - (1 << 32) if word >> 31 else word
