"""From logits to tokens: greedy, or drawn after temperature, top-k and top-p; and the lossless verification of drafts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.decoding import SamplingConfig
from ..model.drafting import most_probable


@dataclass(frozen=True)
class Verdict:
    """What the target made of a draft: the accepted drafts, then one token of its own."""

    ids: list[int]
    newest: Tensor  # (1, 1), the last of `ids`, on the model's device

    @property
    def accepted(self) -> int:
        return len(self.ids) - 1


class Sampler(Protocol):
    """How tokens are chosen, the same way for drafts and for the target."""

    def probs(self, logits: Tensor) -> Tensor | None:
        """The distribution (..., V) that `choose` draws from, or None where nothing is drawn."""

    def choose(self, logits: Tensor, probs: Tensor | None, rows: Sequence[int]) -> Tensor:
        """Token ids (B, T) from logits (B, T, V) and their `probs`. Only `rows` of the batch need one: others may be any id."""

    def verify(self, draft_ids: Tensor, draft_probs: Tensor | None, logits: Tensor) -> Verdict:
        """Judges drafts (K,), drawn from `draft_probs` (K, V), by the target's logits (K+1, V). Waits once for the device."""


class Greedy:
    """The most probable token, by argmax of the logits."""

    def probs(self, logits: Tensor) -> None:
        return None

    def choose(self, logits: Tensor, probs: Tensor | None, rows: Sequence[int]) -> Tensor:
        return most_probable(logits)

    def verify(self, draft_ids: Tensor, draft_probs: Tensor | None, logits: Tensor) -> Verdict:
        """Accepts the longest prefix of the drafts that the target would have chosen itself."""
        choices = most_probable(logits)
        count = draft_ids.shape[0]
        ids: list[int] = torch.cat((draft_ids, choices)).tolist() if count else choices.tolist()
        drafts, chosen = ids[:count], ids[count:]
        accepted = next((place for place in range(count) if drafts[place] != chosen[place]), count)
        return Verdict(chosen[: accepted + 1], choices[None, accepted : accepted + 1])


class Stochastic:
    """Tokens drawn by a generator of their own; verification keeps the target's distribution exactly."""

    def __init__(self, config: SamplingConfig, device: torch.device) -> None:
        self._config = config
        self._generator = torch.Generator(device).manual_seed(config.seed)

    def probs(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self._config)

    def choose(self, logits: Tensor, probs: Tensor | None, rows: Sequence[int]) -> Tensor:
        return draw(self.probs(logits) if probs is None else probs, self._generator)

    def verify(self, draft_ids: Tensor, draft_probs: Tensor | None, logits: Tensor) -> Verdict:
        target_probs = self.probs(logits)
        if draft_probs is None:
            newest = draw(target_probs, self._generator)
            return Verdict(newest.tolist(), newest[None])
        judged = verify(draft_ids, draft_probs, target_probs, self._generator)
        *drafts, accepted, last = torch.cat((draft_ids, judged)).tolist()
        return Verdict([*drafts[:accepted], last], judged[None, 1:])


def sampler_for(config: SamplingConfig, device: torch.device) -> Sampler:
    """Greedy at temperature 0, else drawn with the config's seed."""
    return Greedy() if config.temperature == 0 else Stochastic(config, device)


def probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Distribution (..., V), in at least fp32, from logits (..., V): temperature, then top-k, then top-p, renormalised.

    top-p keeps the smallest set of most probable tokens whose mass reaches it (Holtzman et al., 2020), never less than one.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Below it both would become 0 in the precision of the logits: 0 / 0, and no token kept. With it only the best are left.
    least = torch.finfo(logits.dtype).tiny
    # The maximum is subtracted first, for a small temperature would overflow what it divides.
    probs = ((logits - logits.amax(-1, keepdim=True)) / max(config.temperature, least)).softmax(-1)
    if config.top_k:
        top_probs, top_ids = probs.topk(min(config.top_k, probs.shape[-1]))
        top_probs = top_probs / top_probs.sum(-1, keepdim=True)
    elif config.top_p < 1:
        top_probs, top_ids = probs.topk(_top_p_bound(probs, config.top_p))
    else:
        return probs
    if config.top_p < 1:
        mass_before = top_probs.cumsum(-1) - top_probs
        top_probs = top_probs.masked_fill(mass_before >= max(config.top_p, least), 0)
        top_probs = top_probs / top_probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, top_ids, top_probs)


def _top_p_bound(probs: Tensor, top_p: float) -> int:
    """At least as many as the tokens that top-p keeps in any row of (..., V).

    Tokens under (1 - top_p) / V have less than 1 - top_p together, so the others reach top_p without them. To count those saves
    the CPU a sort of the whole vocabulary; another device would have to be waited for, and sorts fast.
    """
    vocabulary = probs.shape[-1]
    if probs.device.type != "cpu":
        return vocabulary
    return max(1, int((probs >= (1 - top_p) / vocabulary).sum(-1).max()))  # 0 where all are alike, and rounded down


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One token id (...) from each row of weights (..., V), which need not sum to 1; never one of weight 0.

    By the inverse of the cumulative distribution: one random number a row, and no wait for the device as in torch.multinomial.
    """
    # A parallel sum may round so that it grows over a weight of 0: the sign takes such tokens out.
    edges = probs.cumsum(-1) * probs.sign()
    chance = torch.rand((*probs.shape[:-1], 1), generator=generator, dtype=probs.dtype, device=probs.device)
    return (edges > chance * edges.amax(-1, keepdim=True)).byte().argmax(-1)


def verify(draft_ids: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator) -> Tensor:
    """Lossless speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

    Draft K is accepted with probability min(1, target / draft). The first that is not is replaced by a draw from
    max(target - draft, 0), normalised; after K accepted drafts the next token is drawn from the target.

    draft_ids (K,), draft_probs (K, V), target_probs (K+1, V); returns (accepted count, next token id), shape (2,), on device.
    """
    target_mass = target_probs[:-1].gather(1, draft_ids[:, None])[:, 0]
    draft_mass = draft_probs.gather(1, draft_ids[:, None])[:, 0]
    chance = torch.rand(draft_mass.shape, generator=generator, dtype=draft_mass.dtype, device=draft_mass.device)
    accepted = (chance * draft_mass < target_mass).cumprod(0).sum()[None]
    target_row = target_probs.index_select(0, accepted)
    # A row of zeros stands for the position behind the last draft: there the residual is the target itself.
    residual = (target_row - F.pad(draft_probs, (0, 0, 0, 1)).index_select(0, accepted)).clamp_min(0)
    # Rounding can reject a draft although target and draft are equal; nothing is left to draw from then.
    weights = torch.where(residual.sum() > 0, residual, target_row)
    return torch.cat((accepted, draw(weights, generator)))
