"""Watches transformers' `generate`: counts and times its steps, and ends it where our own decoding ends."""

import time
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ...decoding import DecodeStats, StopReason
from ...decoding.stopping import StopScanner
from ..outputs import Generation
from ..results import Step


class StopString(Exception):
    """Raised in `generate` by its streamer: transformers' own handling of stop strings misses those inside a round."""


class StopRows(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch where our own decoding ends it, and collects its tokens up to there."""

    def __init__(self, scanners: list[StopScanner]) -> None:
        self.scanners = scanners
        self.ids: list[list[int]] = [[] for _ in scanners]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for ids, scanner, token in zip(self.ids, self.scanners, input_ids[:, -1].tolist(), strict=True):
            if scanner.reason is None:
                scanner.cut([token])
                ids.append(token)
        return torch.tensor([scanner.reason is not None for scanner in self.scanners], device=input_ids.device)


class StepTimer(BaseStreamer):  # type: ignore[misc]
    """Counts and times the steps of `generate`: as its streamer, and through hooks around the target's forward passes.

    A pass over K+1 tokens after those known so far verifies K drafts. A pass with fewer layers is an early-exit draft. The
    output ends where the scanner ends our own decoding.
    """

    def __init__(self, model: Any, prompt_tokens: int, scanner: StopScanner) -> None:
        self._scanner = scanner
        self._finish_reason: StopReason | None = None
        self._model = model
        self._num_layers = int(model.config.num_hidden_layers)
        self._prompt_tokens = prompt_tokens
        self._prompt_seen = False
        self._ids: list[int] = []
        self._steps: list[Step] = []
        self._stats: list[DecodeStats] = []
        self._drafted = 0
        self._started = self._target_started = self._target_ended = 0.0

    def __enter__(self) -> "StepTimer":
        self._hooks = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after),
        ]
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._model.config.num_hidden_layers = self._num_layers  # a failed early-exit draft leaves it at the exit

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt first, then the tokens of each step, on the CPU."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        now = time.perf_counter()
        prefill = not self._steps
        tokens = value.flatten().tolist()
        count, self._finish_reason = self._scanner.cut(tokens)
        tokens = tokens[:count]
        accepted = min(len(value.flatten()) - 1, count, self._drafted)
        target_seconds = self._target_ended - self._target_started
        self._stats.append(
            DecodeStats(
                sequences=int(prefill),
                prompt_tokens=self._prompt_tokens if prefill else 0,
                new_tokens=len(tokens),
                drafted=self._drafted,
                accepted=accepted,
                rounds=int(self._drafted > 0),
                prefill_seconds=target_seconds if prefill else 0.0,
                draft_seconds=self._target_started - self._started if self._drafted else 0.0,
                verify_seconds=0.0 if prefill else target_seconds,
                total_seconds=now - self._started,
                tested_by_position=(1,) * min(self._drafted, len(tokens)),
                accepted_by_position=(1,) * accepted,
            )
        )
        self._steps.append(Step(len(tokens), now - self._started))
        self._ids += tokens
        if self._finish_reason == "stop":
            raise StopString
        self._started = time.perf_counter()

    def end(self) -> None:
        """Called by `generate` after the last token."""

    def generation(self) -> Generation:
        return Generation(tuple(self._ids), tuple(self._steps), sum(self._stats, DecodeStats()), self._finish_reason)

    def _before(self, _: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._model.config.num_hidden_layers == self._num_layers:
            rows = (keywords["input_ids"] if "input_ids" in keywords else args[0]).shape[1]
            self._drafted = rows - (1 if self._steps else self._prompt_tokens)
            self._target_started = time.perf_counter()

    def _after(self, *_: Any) -> None:
        if self._model.config.num_hidden_layers == self._num_layers:
            self._target_ended = time.perf_counter()
