"""The decoding loop: one step is a draft (empty for plain decoding), a pass of the target, and the tokens that it verified."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..config.checks import require, require_exit_layer
from ..config.decoding import DecodingConfig
from ..errors import ConfigError
from ..model.backend import Backend
from ..model.cache import KVCache
from .drafters.base import Draft, Drafter
from .drafters.exit import ExitDrafter, drafter_for
from .sampling import Sampler, sampler_for
from .stopping import Detokenize, Stopping, StopReason, StopScanner


@dataclass(frozen=True)
class Token:
    """A verified token of the output; `from_draft` when it was an accepted draft."""

    id: int
    from_draft: bool


@dataclass(frozen=True)
class DecodeStats:
    """Counts and seconds of one output, or of many added up; `DecodeStats()` is the zero. Ratios are properties.

    `drafted` counts every draft that the target verified, `accepted` those it accepted that are also part of the output: what
    stands behind an EOS, a stop string or the last token allowed is drafted but not accepted. `rounds` counts the passes that
    verified drafts. `tested_by_position[j]`: in how many rounds draft j+1 was compared, all drafts before it being accepted
    and not ending the output; `accepted_by_position[j]`: in how many of these it was accepted. Steps without drafts count in
    `verify_seconds`; the first token is the prefill's.
    """

    sequences: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float = 0.0
    tested_by_position: tuple[int, ...] = ()
    accepted_by_position: tuple[int, ...] = ()

    @property
    def acceptance_rate(self) -> float:
        return _ratio(self.accepted, self.drafted)

    @property
    def mean_accepted_tokens(self) -> float:
        """Accepted drafts a round, without the target's own token."""
        return _ratio(self.accepted, self.rounds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, prefill included."""
        return _ratio(self.new_tokens, self.total_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """The same behind the prefill, which gives the first token of each output."""
        return _ratio(self.new_tokens - self.sequences, self.total_seconds - self.prefill_seconds)

    def __add__(self, other: "DecodeStats") -> "DecodeStats":
        return DecodeStats(*(_sum(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)))


class Decoding:
    """Iterates over the lists of newly verified tokens, one list a step; afterwards says why it ended.

    Each step is complete in itself, so a Decoding may be abandoned at any point: it changes nothing but its own cache.
    """

    def __init__(
        self,
        model: Backend,
        prompt_ids: list[int],
        stopping: Stopping,
        sampler: Sampler,
        target_layers: int,
        drafter: Drafter | None = None,
        num_draft_tokens: int = 0,
        detokenize: Detokenize | None = None,
    ) -> None:
        """The target is layers 0..backend-1 of the model. Raises ConfigError for a prompt that is empty or leaves no room."""
        limit = model.max_positions
        check_prompt(prompt_ids, limit)
        self.finish_reason: StopReason | None = None
        self._model = model
        self._sampler = sampler
        self._target_layers = target_layers
        self._drafter = drafter
        self._num_draft_tokens = num_draft_tokens if drafter else 0
        self._scanner = StopScanner(stopping, limit - len(prompt_ids), detokenize)
        end = len(prompt_ids) + self._scanner.room
        self._cache = model.new_cache(1, end)
        self._positions = torch.arange(end)[None]  # (1, end), on the host
        self._prompt_tokens = len(prompt_ids)
        self._pending = torch.tensor([prompt_ids], device=model.device)  # (1, T), committed tokens without KV
        self._cached = 0  # committed positions in the cache
        self._steps: list[DecodeStats] = []

    @property
    def stats(self) -> DecodeStats:
        """Counts and seconds of the steps so far. The time between two steps is the caller's and not counted."""
        return sum(self._steps, DecodeStats())

    def __iter__(self) -> Iterator[list[Token]]:
        return self

    def __next__(self) -> list[Token]:
        if self.finish_reason is not None:
            raise StopIteration
        # Entered here and not in a generator, whose caller would run in inference mode between two steps.
        with torch.inference_mode():
            return self._step()

    def _step(self) -> list[Token]:
        started = time.perf_counter()
        draft = self._draft()
        drafted_at = self._clock() if draft.num_drafts else started
        positions = self._positions[:, self._cached : self._cached + draft.tokens.shape[1]]
        logits = target_logits(self._model, draft, positions, self._cache, self._target_layers)[0]
        first_draft = draft.tokens.shape[1] - draft.num_drafts
        verdict = self._sampler.verify(draft.tokens[0, first_draft:], None if draft.probs is None else draft.probs[0], logits)
        verified_at = time.perf_counter()
        prefill = self._cached == 0
        self._commit(draft, verdict.accepted)
        self._pending = verdict.newest
        count, self.finish_reason = self._scanner.cut(verdict.ids)
        target_seconds = verified_at - drafted_at
        step = step_counts(
            draft.num_drafts,
            verdict.accepted,
            count,
            sequences=int(prefill),
            prompt_tokens=self._prompt_tokens if prefill else 0,
            prefill_seconds=target_seconds if prefill else 0.0,
            draft_seconds=drafted_at - started,
            verify_seconds=0.0 if prefill else target_seconds,
            total_seconds=time.perf_counter() - started,
        )
        self._steps.append(step)
        return [Token(token, place < step.accepted) for place, token in enumerate(verdict.ids[:count])]

    def _draft(self) -> Draft:
        """No drafts for the prompt, nor where only the target's own token has room."""
        room = min(self._num_draft_tokens, self._scanner.room - 1)
        if self._drafter is None or self._cached == 0 or room == 0:
            return Draft(self._pending)
        return self._drafter.draft(self._pending, self._positions[:, self._cached : self._cached + room], self._cache)

    def _commit(self, draft: Draft, accepted: int) -> None:
        """The pass wrote every token's KV; a rejected draft's is forgotten by length alone."""
        written = draft.tokens.shape[1]
        rejected = draft.num_drafts - accepted
        self._cache.lengths += written
        if rejected:
            self._cache.rollback(self._cache.lengths - rejected)
        self._cached += written - rejected

    def _clock(self) -> float:
        """Now, with the device's work done. Only between draft and target: after the target, verifying has waited for it."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter()


def decode(
    model: Backend,
    prompt_ids: list[int],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
    *,
    reuse_exit_states: bool = True,
) -> Decoding:
    """Decodes a prompt by the config's strategy. All strategies are one loop; greedy self-speculation gives the tokens of
    autoregressive decoding, sampled self-speculation its distribution.

    `detokenize` (ids to text) is needed for stop strings only. `reuse_exit_states` off makes the target recompute the layers
    below the exit, for measuring. Raises ConfigError for an exit that the model does not have and a prompt that does not fit.
    """
    sampler = sampler_for(config.sampling, model.device)
    target_layers, drafter = target_and_drafter(model, config, sampler, eos_ids, reuse_exit_states)
    stopping = Stopping(eos_ids, config.stop, config.max_new_tokens)
    return Decoding(model, prompt_ids, stopping, sampler, target_layers, drafter, config.num_draft_tokens, detokenize)


def check_prompt(prompt_ids: list[int], limit: int) -> None:
    """Raises ConfigError for a prompt that is empty or leaves no room for a token in a context of `limit` tokens."""
    require(bool(prompt_ids), "the prompt", "at least 1 token", "none")
    if len(prompt_ids) >= limit:
        raise ConfigError(
            f"the prompt must be at most {limit - 1} tokens, got {len(prompt_ids)} (the model's context is {limit} tokens)"
        )


def target_and_drafter(
    model: Backend, config: DecodingConfig, sampler: Sampler, eos_ids: frozenset[int], reuse_exit_states: bool = True
) -> tuple[int, ExitDrafter | None]:
    """How many layers the config's strategy takes for its target, and what drafts for them, if anything does."""
    if config.exit_layer is None or config.strategy == "autoregressive":
        return model.num_layers, None
    require_exit_layer(config.exit_layer, model.num_layers, config.strategy)
    if config.strategy == "early-exit":
        return config.exit_layer, None
    return model.num_layers, drafter_for(model, sampler, config, eos_ids, reuse_exit_states)


def target_logits(model: Backend, draft: Draft, positions: Tensor, cache: KVCache, target_layers: int) -> Tensor:
    """Logits (B, K+1, V) of the draft's last K+1 tokens: the layers that its exit states leave, once over all tokens."""
    tokens, hidden = draft.tokens, draft.exit_states
    if hidden is None:
        hidden = model.run_layers(model.embed(tokens), 0, target_layers, positions, cache)
    else:
        known = hidden.shape[1]
        if known < tokens.shape[1]:
            last = model.run_layers(model.embed(tokens[:, known:]), 0, draft.exit_layer, positions[:, known:], cache)
            hidden = torch.cat((hidden, last), dim=1)
        hidden = model.run_layers(hidden, draft.exit_layer, target_layers, positions, cache)
    return model.unembed(hidden[:, -(draft.num_drafts + 1) :])


def step_counts(drafted: int, accepted: int, count: int, **more: float) -> DecodeStats:
    """The counts of a step that gave `count` tokens, when `accepted` of its drafts were the target's; `more` of its fields."""
    accepted = min(accepted, count)
    return DecodeStats(
        new_tokens=count,
        drafted=drafted,
        accepted=accepted,
        rounds=int(drafted > 0),
        tested_by_position=(1,) * min(drafted, count),
        accepted_by_position=(1,) * accepted,
        **more,  # type: ignore[arg-type]
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _sum(mine: Any, other: Any) -> Any:
    if isinstance(mine, tuple):
        return tuple(a + b for a, b in zip_longest(mine, other, fillvalue=0))
    return mine + other
