"""From logits to tokens: greedy, or drawn after temperature, top-k and top-p; and the lossless verification of drafts.

Before that, a row's own options may change its logits: bias, penalties, forbidden tokens. The logits of each position change by
the tokens before it, drafts included, so a draft is verified against the same distribution as the token that autoregressive
decoding chooses in its place.
"""

from collections.abc import Collection, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.decoding import DecodingConfig
from ..model.vocabulary import most_probable

if TYPE_CHECKING:
    from .output import Row


class Sampler:
    """Chooses the tokens of rows, for drafts and for the target alike: greedily at temperature 0, else drawn.

    Each row draws from its own generator, so its tokens do not depend on the batch.
    """

    def __init__(self, config: DecodingConfig) -> None:
        self.is_greedy, self.processes, self._config = config.temperature == 0, config.changes_logits, config

    def processed(
        self, logits: Tensor, drafts: Sequence[Sequence[int]], places: Sequence[int], rows: Sequence["Row"]
    ) -> Tensor:
        """Applies the options of rows to logits (N, V), of which each row has `places[row]` positions, one row after another.

        A row's last position follows its drafts. `logits` may be overwritten, unless log probabilities are reported.
        """
        changed = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=self._config.logprobs is not None)
        for row, own, of_row in zip(rows, drafts, torch.split(changed, list(places)), strict=True):
            if row.processor is not None:
                row.processor.process(of_row, own)
        return changed

    def probs(self, logits: Tensor) -> Tensor | None:
        """The distribution (..., V) that `choose` draws from; None if nothing is drawn."""
        return None if self.is_greedy else probabilities(logits, self._config)

    def choose(self, logits: Tensor, probs: Tensor | None, rows: Sequence["Row"]) -> Tensor:
        """Token ids (G,) of rows, from logits (G, V) and their `probs`."""
        if self.is_greedy:
            return self._best(logits)
        probs = probabilities(logits, self._config) if probs is None else probs
        return torch.stack([draw(of_row, row.generator) for of_row, row in zip(probs, rows, strict=True)])

    def _best(self, logits: Tensor) -> Tensor:
        # NumPy's argmax is as fast as torch's on one thread, and has no barrier, at which threads stall on a busy machine.
        if self.processes and logits.device.type == "cpu":
            return torch.from_numpy(logits.numpy().argmax(-1))
        return most_probable(logits)

    def verify(
        self, tokens: Tensor, counts: Sequence[int], draft_probs: Tensor | None, logits: Tensor, rows: Sequence["Row"]
    ) -> list[list[int]]:
        """Verifies drafts by the target's logits (S, V) after tokens (S,): `counts[row]` per row, its last, then its drafts.

        Waits once for the device. `draft_probs` (S - B, V): the distributions that drafts were drawn from; None if they were
        not drawn. Returns, by row, the accepted drafts and the target's own token after them.
        """
        if self.processes:
            ids = iter(tokens.tolist())
            logits = self.processed(logits, [[*islice(ids, count)][1:] for count in counts], counts, rows)
        if self.is_greedy:
            return accepted_choices(tokens, counts, self._best(logits))
        target_probs = torch.split(probabilities(logits, self._config), list(counts))
        if max(counts) == 1:
            newest: list[list[int]]
            newest = torch.stack([draw(p, row.generator) for p, row in zip(target_probs, rows, strict=True)]).tolist()
            return newest
        drafts = [own[1:] for own in torch.split(tokens, list(counts))]
        if draft_probs is None:  # drafts have probability 1
            draft_probs = F.one_hot(torch.cat(drafts), logits.shape[-1]).to(target_probs[0].dtype)
        parts = zip(drafts, torch.split(draft_probs, list(map(len, drafts))), target_probs, rows, strict=True)
        judged = [verify(ids, probs, target, row.generator) for ids, probs, target, row in parts]
        values: list[int] = torch.cat((*judged, *drafts)).tolist()
        verified, first = [], 2 * len(counts)
        for index, count in enumerate(counts):
            verified.append([*values[first : first + values[2 * index]], values[2 * index + 1]])
            first += count - 1
        return verified


def accepted_choices(tokens: Tensor, counts: Sequence[int], choices: Tensor) -> list[list[int]]:
    """Accepts each row's longest prefix of drafts that equal the target's choices (S,); else as `Sampler.verify`."""
    if max(counts) == 1:
        return [[chosen] for chosen in choices.tolist()]
    (given, chosen), verified, first = torch.stack((tokens, choices)).tolist(), [], 0
    for count in counts:
        drafts, own = given[first + 1 : first + count], chosen[first : first + count]
        accepted = next((index for index, draft in enumerate(drafts) if draft != own[index]), count - 1)
        verified.append(own[: accepted + 1])
        first += count
    return verified


def probabilities(logits: Tensor, config: DecodingConfig) -> Tensor:
    """Distribution (..., V), in at least fp32, from logits (..., V): temperature, min-p, top-k, then top-p, renormalised.

    top-p keeps the smallest set of most probable tokens whose mass reaches it (Holtzman et al., 2020), never less than one.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # A smaller temperature or top-p would round to 0 in the logits' precision, and give 0 / 0 or keep no token.
    least = torch.finfo(logits.dtype).tiny
    # The maximum is subtracted first, because division by a small temperature could overflow.
    probs = ((logits - logits.amax(-1, keepdim=True)) / max(config.temperature, least)).softmax(-1)
    if config.min_p:
        probs = probs.masked_fill(probs < config.min_p * probs.amax(-1, keepdim=True), 0)
        probs = probs / probs.sum(-1, keepdim=True)
    if config.top_k:
        top_probs, top_ids = probs.topk(min(config.top_k, probs.shape[-1]))
        top_probs = top_probs / top_probs.sum(-1, keepdim=True)
    elif config.top_p < 1:
        # Tokens under (1 - top_p) / V have less than 1 - top_p together, so the others reach top_p without them. Counting
        # the others saves the CPU a full sort. Other devices sort fast, and reading a count would wait for them.
        kept = vocabulary = probs.shape[-1]
        if probs.device.type == "cpu":  # the count is 0 if all tokens are equally probable and rounded down
            kept = max(1, int((probs >= (1 - config.top_p) / vocabulary).sum(-1).max()))
        top_probs, top_ids = probs.topk(kept)
    else:
        return probs
    if config.top_p < 1:
        mass_before = top_probs.cumsum(-1) - top_probs
        top_probs = top_probs.masked_fill(mass_before >= max(config.top_p, least), 0)
        top_probs = top_probs / top_probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, top_ids, top_probs)


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One token id (...) from each row of weights (..., V), which need not sum to 1; never one of weight 0.

    By the inverse of the cumulative distribution: one random number per row, and no wait for the device as in
    torch.multinomial.
    """
    # A parallel sum may round so that it grows over a weight of 0: multiplying by the sign removes such tokens.
    edges = probs.cumsum(-1) * probs.sign()
    chance = torch.rand((*probs.shape[:-1], 1), generator=generator, dtype=probs.dtype, device=probs.device)
    return (edges > chance * edges.amax(-1, keepdim=True)).byte().argmax(-1)


def verify(draft_ids: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator) -> Tensor:
    """Lossless speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

    A draft is accepted with probability min(1, target / draft). The first one rejected is replaced by a draw from
    max(target - draft, 0), normalised. After K accepted drafts the next token is drawn from the target.

    draft_ids (K,), draft_probs (K, V), target_probs (K+1, V); returns (accepted count, next token id), shape (2,), on device.
    """
    target_mass = target_probs[:-1].gather(1, draft_ids[:, None])[:, 0]
    draft_mass = draft_probs.gather(1, draft_ids[:, None])[:, 0]
    chance = torch.rand(draft_mass.shape, generator=generator, dtype=draft_mass.dtype, device=draft_mass.device)
    accepted = (chance * draft_mass < target_mass).cumprod(0).sum()[None]
    target_row = target_probs.index_select(0, accepted)
    # A row of zeros stands for the position after the last draft: there the residual is the target itself.
    residual = (target_row - F.pad(draft_probs, (0, 0, 0, 1)).index_select(0, accepted)).clamp_min(0)
    # Rounding can reject a draft although target and draft are equal: the residual is then all zeros.
    weights = torch.where(residual.sum() > 0, residual, target_row)
    return torch.cat((accepted, draw(weights, generator)))


class LogitsProcessor:
    """Changes the logits of one row."""

    def __init__(self, config: DecodingConfig, ids: list[int], prompt_tokens: int, ends: Collection[int]) -> None:
        """`ids`: the row's, which grow while it is decoded. `ends`: the tokens that end it."""
        self._config, self._ids, self._prompt_tokens, self._ends = config, ids, prompt_tokens, ends
        self._matcher = None if config.guide is None else config.guide.matcher()
        self._bias: tuple[Tensor, Tensor] | None = None  # token ids, and what their logits get; from the first call on
        self._end_ids: Tensor | None = None  # those in the vocabulary
        self._counted = prompt_tokens  # how many of `ids` are in `_counts`
        # Occurrences in the output, by token; with a repetition penalty also the prompt's tokens, from 0.
        self._counts = dict.fromkeys(ids[:prompt_tokens] if config.repetition_penalty != 1 else (), 0)

    def process(self, logits: Tensor, drafts: Sequence[int]) -> None:
        """Changes the logits (T, V) of the last T positions after the row's tokens and the drafts that follow them.

        In this order: bias, repetition penalty, frequency and presence penalty, forbidden tokens.
        """
        config = self._config
        first = len(drafts) + 1 - len(logits)  # drafts before the first position
        if config.logit_bias:
            if self._bias is None:
                ids, values = zip(*config.logit_bias, strict=True)
                self._bias = _tensor_on(logits, ids), _tensor_on(logits, values, logits.dtype)
            biased, bias = self._bias
            logits[:, biased] += bias
        if config.penalises:
            self._penalise(logits, drafts, first)
        early = config.min_tokens - (len(self._ids) - self._prompt_tokens) - first
        if early > 0:
            if self._end_ids is None:
                self._end_ids = _tensor_on(logits, [token for token in self._ends if token < logits.shape[-1]])
            logits[:early].index_fill_(1, self._end_ids, -torch.inf)
        if self._matcher is not None:
            for place, scores in enumerate(logits, start=first):
                forbidden = self._matcher.forbidden(self._output, drafts[:place])
                if forbidden is not None and scores.device.type == "cpu":
                    np.copyto(scores.numpy(), -np.inf, where=forbidden[: len(scores)])  # by one thread, see Sampler
                elif forbidden is not None:
                    hidden = torch.from_numpy(forbidden[: len(scores)]).to(scores.device, non_blocking=True)
                    scores.masked_fill_(hidden, -torch.inf)

    def permitted(self, drafts: list[int]) -> list[int]:
        """The drafts up to the first that the row's grammar forbids."""
        return drafts if self._matcher is None else drafts[: self._matcher.permitted(self._output, drafts)]

    def forced(self, drafts: Sequence[int] = ()) -> list[int]:
        """The tokens that the row's grammar forces after the drafts."""
        return [] if self._matcher is None else self._matcher.forced([*self._output, *drafts])

    @property
    def _output(self) -> list[int]:
        return self._ids[self._prompt_tokens :]

    def _penalise(self, logits: Tensor, drafts: Sequence[int], first: int) -> None:
        """As transformers (Keskar et al., 2019) and OpenAI's API define the penalties."""
        config = self._config
        for token in self._ids[self._counted :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._counted = len(self._ids)
        ids = [*self._counts, *(token for token in dict.fromkeys(drafts) if token not in self._counts)]
        columns = {token: column for column, token in enumerate(ids)}
        counts = torch.zeros(len(logits), len(ids), dtype=logits.dtype)
        counts[:, : len(self._counts)] = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
        for place, token in enumerate(drafts):
            counts[max(place + 1 - first, 0) :, columns[token]] += 1
        counts, places = counts.to(logits.device, non_blocking=True), _tensor_on(logits, ids)
        found, scores = counts > 0, logits[:, places]
        if config.repetition_penalty != 1:
            seen = found.clone()
            seen[:, : len(self._counts)] = True
            penalised = torch.where(scores > 0, scores / config.repetition_penalty, scores * config.repetition_penalty)
            scores = torch.where(seen, penalised, scores)
        logits[:, places] = scores - config.frequency_penalty * counts - config.presence_penalty * found


def _tensor_on(logits: Tensor, values: Sequence[float], dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers on the device of the logits, copied without waiting."""
    return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)
