"""A row's own options and its logits: bias, penalties, and tokens that may not come.

Each place of a row has its own logits, and they are changed by what the tokens before that place say, drafts included. So a
draft that the target verifies is judged as the token that would have been chosen in its place.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config.decoding import DecodingConfig


class LogitsProcessor:
    """Changes the logits of one row."""

    def __init__(self, config: DecodingConfig, ids: list[int], prompt_tokens: int, ends: Collection[int]) -> None:
        """`ids`: the row's, which grow while it is decoded. `ends`: the tokens that end it."""
        self._config, self._ids, self._prompt_tokens, self._ends = config, ids, prompt_tokens, ends
        self._matcher = None if config.guide is None else config.guide.matcher()
        self._counted = prompt_tokens  # of `ids`
        # How often each token is in the output; with a repetition penalty those of the prompt, too.
        self._counts = dict.fromkeys(ids[:prompt_tokens] if config.repetition_penalty != 1 else (), 0)

    def process(self, logits: Tensor, drafts: Sequence[int]) -> None:
        """Changes the logits (T, V) of the last T places after the row's tokens and any of the drafts that follow them.

        In this order: bias, repetition penalty, frequency and presence penalty, tokens that may not come.
        """
        config = self._config
        first = len(drafts) + 1 - len(logits)  # drafts before the first place
        if config.logit_bias:
            ids, bias = zip(*config.logit_bias, strict=True)
            logits[:, _beside(logits, ids)] += _beside(logits, bias, logits.dtype)
        if config.penalises:
            self._penalise(logits, drafts, first)
        early = config.min_tokens - (len(self._ids) - self._prompt_tokens) - first
        if early > 0:
            ends = [token for token in self._ends if token < logits.shape[-1]]
            logits[:early].index_fill_(1, _beside(logits, ends), -torch.inf)
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
        """The tokens that the row's grammar lets follow, after drafts, as the only ones."""
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
        counts, places = counts.to(logits.device, non_blocking=True), _beside(logits, ids)
        found, scores = counts > 0, logits[:, places]
        if config.repetition_penalty != 1:
            seen = found.clone()
            seen[:, : len(self._counts)] = True
            penalised = torch.where(scores > 0, scores / config.repetition_penalty, scores * config.repetition_penalty)
            scores = torch.where(seen, penalised, scores)
        logits[:, places] = scores - config.frequency_penalty * counts - config.presence_penalty * found


def _beside(logits: Tensor, values: Sequence[float], dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers on the device of the logits, for which nobody waits."""
    return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)
