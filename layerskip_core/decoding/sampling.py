"""From logits to tokens: the most probable ones, or samples after temperature, top-k and top-p; and
verification of drafts.

Before that, a row's own options may change its logits: bias, penalties, forbidden tokens. The
logits of each position change by the tokens before it, drafts included, so a draft is verified
against the same logits as the token that autoregressive decoding chooses in its place. Noise makes
a sample of the most probable token (see model/noise.py), so drafts are verified in the same way
with and without it: those are accepted that the target chooses.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config.decoding import DecodingConfig
from ..model.native.noise import perturbed
from ..model.noise import Noise, key_of, least_temperature
from ..model.vocabulary import most_probable

if TYPE_CHECKING:
    from .output import Row

_PIECE = 1 << 21  # most logits that are copied at once: some six copies of 8 MB in fp32


class Scores(NamedTuple):
    """What tokens are chosen by: of each row of scores the largest."""

    values: Tensor  # (N, C): logits, of samples with their noise
    ids: Tensor | None = None  # token ids of the columns, (C,) or by row (N, C); None for 0..C-1


class Sampler:
    """Chooses the tokens of rows, for drafts and for the target alike: greedily at temperature 0,
    else drawn.

    A token depends on its logits, its row's seed and its position, so on neither the batch nor
    drafts.
    """

    def __init__(self, config: DecodingConfig) -> None:
        self.is_greedy = config.temperature == 0
        self.processes = config.changes_logits
        self.truncates = not self.is_greedy and truncates(config)
        self._config = config

    def processed(
        self,
        logits: Tensor,
        drafts: Sequence[Sequence[int]],
        places: Sequence[int],
        rows: Sequence["Row"],
    ) -> Tensor:
        """Applies the options of rows to logits (N, V), of which each row has `places[row]`
        positions, one row after another.

        A row's last position follows its drafts. `logits` may be overwritten, unless log
        probabilities are reported.
        """
        changed = logits.to(
            torch.promote_types(logits.dtype, torch.float32), copy=self._config.logprobs is not None
        )
        for row, own, of_row in zip(rows, drafts, torch.split(changed, list(places)), strict=True):
            if row.processor is not None:
                row.processor.process(of_row, own)
        return changed

    def noise(
        self, rows: Sequence["Row"], ahead: Sequence[int], counts: Sequence[int]
    ) -> Noise | None:
        """Of the choices of `counts[row]` tokens per row, the first of them `ahead[row]` tokens
        after its next one.

        None if nothing is drawn.
        """
        if self.is_greedy:
            return None
        keys = []
        for row, first, count in zip(rows, ahead, counts, strict=True):
            start = len(row.ids) + first
            keys += [key_of(row.seed, position) for position in range(start, start + count)]
        return Noise(self._config.temperature, keys)

    def scores(self, logits: Tensor, noise: Noise | None, ids: Tensor | None = None) -> Scores:
        """The scores to choose by, from logits (N, C), which may be overwritten. `ids` (C,): None
        for 0..C-1.
        """
        if noise is None:
            return Scores(logits, ids)
        if self.truncates:
            logits, places = candidates(logits, self._config)
            ids = places if ids is None else ids[places]
        return Scores(perturbed(logits, noise, ids), ids)

    def best(self, scores: Scores) -> Tensor:
        """The token ids (N,) of the largest scores."""
        values, ids = scores
        # NumPy's argmax is as fast as torch's on one thread, and has no barrier, at which threads
        # stall on a busy machine.
        if self.processes and values.device.type == "cpu":
            found = torch.from_numpy(values.numpy().argmax(-1))
        else:
            found = most_probable(values)
        if ids is None:
            return found
        return ids[found] if ids.dim() == 1 else ids.gather(-1, found[:, None])[:, 0]

    def verify(
        self,
        tokens: Tensor,
        counts: Sequence[int],
        logits: Tensor,
        noise: Noise | None,
        rows: Sequence["Row"],
    ) -> list[list[int]]:
        """Verifies drafts by the target's logits (S, V) after tokens (S,): `counts[row]` per row,
        its last, then its drafts.

        Waits once for the device, with options of rows twice. `noise`: of S choices. The logits may
        be overwritten, unless log probabilities are reported. Returns, by row, the accepted drafts
        and the target's own token after them.
        """
        if noise is None and not self.processes:
            return accepted_choices(tokens, counts, self.best(Scores(logits)))
        ids = tokens.tolist() if self.processes else []
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        choices = []
        for start, stop in _pieces(len(logits), logits.shape[-1]):
            part = logits[start:stop]
            part = part.to(
                torch.promote_types(part.dtype, torch.float32),
                copy=self._config.logprobs is not None,
            )
            if self.processes:
                for row, (first, end) in zip(rows, pairwise(bounds), strict=True):
                    begin = max(first, start)
                    last = min(end, stop)
                    if begin < last and row.processor is not None:
                        row.processor.process(
                            part[begin - start : last - start], ids[first + 1 : last]
                        )
            own = None if noise is None else Noise(noise.temperature, noise.keys[start:stop])
            choices.append(self.best(self.scores(part, own)))
        return accepted_choices(tokens, counts, torch.cat(choices))


def _pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Spans of rows with at most `_PIECE` numbers each, at least one row."""
    most = max(1, _PIECE // columns)
    for start in range(0, rows, most):
        yield start, min(start + most, rows)


def accepted_choices(tokens: Tensor, counts: Sequence[int], choices: Tensor) -> list[list[int]]:
    """Accepts each row's longest prefix of drafts that equal the target's choices (S,); else as
    `Sampler.verify`.
    """
    if max(counts) == 1:
        return [[chosen] for chosen in choices.tolist()]
    (given, chosen), verified, first = torch.stack((tokens, choices)).tolist(), [], 0
    for count in counts:
        drafts = given[first + 1 : first + count]
        own = chosen[first : first + count]
        accepted = next(
            (index for index, draft in enumerate(drafts) if draft != own[index]), count - 1
        )
        verified.append(own[: accepted + 1])
        first += count
    return verified


def truncates(config: DecodingConfig) -> bool:
    """Whether some tokens can never be drawn."""
    return bool(config.min_p or config.top_k) or config.top_p < 1


def probabilities(logits: Tensor, config: DecodingConfig) -> Tensor:
    """Distribution (..., V), in at least fp32, from logits (..., V): temperature, min-p, top-k,
    then top-p, renormalised.
    """
    if not truncates(config):
        return _softmax(logits, config.temperature)
    kept, ids = candidates(logits, config)
    probs = _softmax(kept, config.temperature)
    return torch.zeros(logits.shape, dtype=probs.dtype, device=probs.device).scatter(-1, ids, probs)


def candidates(logits: Tensor, config: DecodingConfig) -> tuple[Tensor, Tensor]:
    """The logits (..., C), in at least fp32, of the C most probable tokens, and their ids (..., C).

    They are -inf for those that min-p, top-k, then top-p leave out, which includes all other
    tokens. top-p keeps the smallest set of most probable tokens whose mass reaches it (Holtzman et
    al., 2020), never less than one.
    """
    probs = _softmax(logits, config.temperature)
    count = vocabulary = probs.shape[-1]
    if config.top_k:
        count = min(config.top_k, vocabulary)
    elif probs.device.type == "cpu":
        # A count saves the CPU a full sort. Other devices sort fast, and reading it would wait for
        # them. Tokens under (1 - top_p) / V have less than 1 - top_p together, so the others reach
        # top_p without them.
        least = (
            config.min_p * probs.amax(-1, keepdim=True)
            if config.min_p
            else (1 - config.top_p) / vocabulary
        )
        # 0 if all tokens are equally probable and rounded down
        count = max(1, int((probs >= least).sum(-1).max()))
    top_probs, ids = probs.topk(count)
    if config.min_p:
        top_probs = top_probs.masked_fill(top_probs < config.min_p * top_probs[..., :1], 0)
    if config.top_p < 1:
        top_probs = (
            top_probs / top_probs.sum(-1, keepdim=True)
            if config.top_k or config.min_p
            else top_probs
        )
        mass_before = top_probs.cumsum(-1) - top_probs
        # A smaller top-p would round to 0 and keep no token.
        top_probs = top_probs.masked_fill(
            mass_before >= max(config.top_p, torch.finfo(probs.dtype).tiny), 0
        )
    return logits.to(probs.dtype).gather(-1, ids).masked_fill(top_probs == 0, -torch.inf), ids


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The maximum is subtracted first, because division by a small temperature could overflow.
    return (
        (logits - logits.amax(-1, keepdim=True)) / least_temperature(temperature, logits.dtype)
    ).softmax(-1)


class LogitsProcessor:
    """Changes the logits of one row."""

    def __init__(
        self, config: DecodingConfig, ids: list[int], prompt_tokens: int, ends: Collection[int]
    ) -> None:
        """`ids`: the row's, which grow while it is decoded. `ends`: the tokens that end it."""
        self._config = config
        self._ids = ids
        self._prompt_tokens = prompt_tokens
        self._ends = ends
        self._matcher = None if config.guide is None else config.guide.matcher()
        # Token ids, and what their logits get; from the first call on
        self._bias: tuple[Tensor, Tensor] | None = None
        self._end_ids: Tensor | None = None  # those in the vocabulary
        self._counted = prompt_tokens  # how many of `ids` are in `_counts`
        # Occurrences in the output, by token; with a repetition penalty also the prompt's tokens,
        # from 0.
        self._counts = dict.fromkeys(
            ids[:prompt_tokens] if config.repetition_penalty != 1 else (), 0
        )

    def process(self, logits: Tensor, drafts: Sequence[int]) -> None:
        """Changes the logits (T, V) of the last T positions after the row's tokens and the drafts
        that follow them.

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
                self._end_ids = _tensor_on(
                    logits, [token for token in self._ends if token < logits.shape[-1]]
                )
            logits[:early].index_fill_(1, self._end_ids, -torch.inf)
        if self._matcher is not None:
            for place, scores in enumerate(logits, start=first):
                forbidden = self._matcher.forbidden(self._output, drafts[:place])
                if forbidden is not None and scores.device.type == "cpu":
                    # By one thread, see Sampler
                    np.copyto(scores.numpy(), -np.inf, where=forbidden[: len(scores)])
                elif forbidden is not None:
                    hidden = torch.from_numpy(forbidden[: len(scores)]).to(
                        scores.device, non_blocking=True
                    )
                    scores.masked_fill_(hidden, -torch.inf)

    def permitted(self, drafts: list[int]) -> list[int]:
        """The drafts up to the first that the row's grammar forbids."""
        return (
            drafts
            if self._matcher is None
            else drafts[: self._matcher.permitted(self._output, drafts)]
        )

    def forced(self, drafts: Sequence[int] = ()) -> list[int]:
        """The tokens that the row's grammar forces after the drafts."""
        return [] if self._matcher is None else self._matcher.forced([*self._output, *drafts])

    @property
    def mismatch(self) -> str | None:
        """Why the finished output does not match the row's grammar; None if it matches, or was
        cut.
        """
        return None if self._matcher is None else self._matcher.mismatch(self._output)

    @property
    def _output(self) -> list[int]:
        return self._ids[self._prompt_tokens :]

    def _penalise(self, logits: Tensor, drafts: Sequence[int], first: int) -> None:
        """As transformers (Keskar et al., 2019) and OpenAI's API define the penalties."""
        config = self._config
        for token in self._ids[self._counted :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._counted = len(self._ids)
        ids = [
            *self._counts,
            *(token for token in dict.fromkeys(drafts) if token not in self._counts),
        ]
        columns = {token: column for column, token in enumerate(ids)}
        counts = torch.zeros(len(logits), len(ids), dtype=logits.dtype)
        counts[:, : len(self._counts)] = torch.tensor(
            list(self._counts.values()), dtype=logits.dtype
        )
        for place, token in enumerate(drafts):
            counts[max(place + 1 - first, 0) :, columns[token]] += 1
        counts = counts.to(logits.device, non_blocking=True)
        places = _tensor_on(logits, ids)
        found = counts > 0
        scores = logits[:, places]
        if config.repetition_penalty != 1:
            seen = found.clone()
            seen[:, : len(self._counts)] = True
            penalised = torch.where(
                scores > 0, scores / config.repetition_penalty, scores * config.repetition_penalty
            )
            scores = torch.where(seen, penalised, scores)
        logits[:, places] = (
            scores - config.frequency_penalty * counts - config.presence_penalty * found
        )


def _tensor_on(logits: Tensor, values: Sequence[float], dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers on the device of the logits, copied without waiting."""
    return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)
