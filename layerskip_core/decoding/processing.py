"""Changes of a row's logits before a token is chosen: bias, penalties, forbidden tokens."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config.decoding import DecodingConfig


class LogitsProcessor:
    """Changes the logits of one row."""

    def __init__(
        self, config: DecodingConfig, ids: list[int], num_prompt_tokens: int, ends: Collection[int]
    ) -> None:
        """`ids`: the row's, which grow while it is decoded. `ends`: the tokens that end it."""
        self._config = config
        self._ids = ids
        self._num_prompt_tokens = num_prompt_tokens
        self._ends = ends
        self._matcher = None if config.guide is None else config.guide.matcher()
        # Token ids, and what their logits get; from the first call on
        self._bias: tuple[Tensor, Tensor] | None = None
        self._end_ids: Tensor | None = None  # those in the vocabulary
        self._counted = num_prompt_tokens  # how many of `ids` are in `_counts`
        # Occurrences in the output, by token. A repetition penalty is of the prompt's tokens, too
        self._counts = dict[int, int]()
        if config.repetition_penalty != 1:
            self._counts = dict.fromkeys(ids[:num_prompt_tokens], 0)

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
        early = config.min_tokens - (len(self._ids) - self._num_prompt_tokens) - first
        if early > 0:
            if self._end_ids is None:
                self._end_ids = _tensor_on(
                    logits, [token for token in self._ends if token < logits.shape[-1]]
                )
            logits[:early].index_fill_(1, self._end_ids, -torch.inf)
        if self._matcher is not None:
            for num_drafts, scores in enumerate(logits, start=first):
                forbidden = self._matcher.forbidden(self._output, drafts[:num_drafts])
                if forbidden is not None and scores.device.type == "cpu":
                    # By one thread, see `sampling.best_of`
                    np.copyto(scores.numpy(), -np.inf, where=forbidden[: len(scores)])
                elif forbidden is not None:
                    hidden = torch.from_numpy(forbidden[: len(scores)]).to(
                        scores.device, non_blocking=True
                    )
                    scores.masked_fill_(hidden, -torch.inf)

    def permitted(self, drafts: list[int]) -> list[int]:
        """The drafts up to the first that the row's grammar forbids."""
        if self._matcher is None:
            return drafts
        return drafts[: self._matcher.permitted(self._output, drafts)]

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
        return self._ids[self._num_prompt_tokens :]

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
        for index, token in enumerate(drafts, start=1):
            counts[max(index - first, 0) :, columns[token]] += 1
        counts = counts.to(logits.device, non_blocking=True)
        changed = _tensor_on(logits, ids)
        is_counted = counts > 0
        scores = logits[:, changed]
        if config.repetition_penalty != 1:
            seen = is_counted.clone()
            seen[:, : len(self._counts)] = True
            penalised = torch.where(
                scores > 0, scores / config.repetition_penalty, scores * config.repetition_penalty
            )
            scores = torch.where(seen, penalised, scores)
        logits[:, changed] = (
            scores - config.frequency_penalty * counts - config.presence_penalty * is_counted
        )


def _tensor_on(logits: Tensor, values: Sequence[float], dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers on the device of the logits, copied without waiting."""
    return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)
