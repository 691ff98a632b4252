"""The output of decoding: counts and seconds, where it ends, its text, and the whole answer."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import LayerSkipError, require

# `stop`: a stop string; `length`: max_new_tokens; `context`: the model's context is full; `error`:
# the output cannot match its grammar, because no token may follow.
StopReason = Literal["eos", "stop", "length", "context", "error"]
Detokenize = Callable[[list[int]], str]

PLAIN = "plain"  # steps without drafts, in DecodeStats.steps_by_drafter
_INCOMPLETE = "\ufffd"  # decoded from a character whose last bytes are missing


@dataclass(frozen=True)
class DecodeStats:
    """Counts and seconds of one output, or of many added up; `DecodeStats()` is zero. Ratios are
    properties.
    """

    sequences: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0  # drafts that the target verified
    accepted: int = 0  # drafts in the output: accepted ones after its end do not count
    rounds: int = 0  # passes that verified drafts
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0  # also of steps without drafts; not of prefills
    total_seconds: float = 0.0
    # Rounds that reached draft j+1: all before it were accepted, and none was last
    tested_by_position: tuple[int, ...] = ()
    accepted_by_position: tuple[int, ...] = ()  # rounds that accepted draft j+1
    # Empty without a drafter; `plain`: steps without drafts
    steps_by_drafter: dict[str, int] = field(default_factory=dict)
    tokens_by_layers: tuple[int, ...] = ()  # new tokens chosen after j+1 layers
    replayed: int = 0  # passes that ran as CUDA graphs

    @property
    def acceptance_rate(self) -> float:
        return _ratio(self.accepted, self.drafted)

    @property
    def mean_accepted_tokens(self) -> float:
        """Accepted drafts per round, without the target's own token."""
        return _ratio(self.accepted, self.rounds)

    @property
    def mean_layers(self) -> float:
        """The mean number of layers after which a new token was chosen."""
        layers = sum(
            layers * tokens for layers, tokens in enumerate(self.tokens_by_layers, start=1)
        )
        return _ratio(layers, sum(self.tokens_by_layers))

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, prefill included."""
        return _ratio(self.new_tokens, self.total_seconds)

    def __add__(self, other: "DecodeStats") -> "DecodeStats":
        def added(left: Any, right: Any) -> Any:
            if isinstance(left, tuple):
                return tuple(a + b for a, b in itertools.zip_longest(left, right, fillvalue=0))
            if isinstance(left, dict):
                return {name: left.get(name, 0) + right.get(name, 0) for name in {**left, **right}}
            return left + right

        return DecodeStats(
            *(
                added(getattr(self, field.name), getattr(other, field.name))
                for field in fields(self)
            )
        )


@dataclass
class Timings:
    """What an engine adds up over its steps; the names are those of DecodeStats."""

    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float = 0.0
    replayed: int = 0


@lru_cache  # most steps are alike
def step_counts(
    drafted: int,
    accepted: int,
    new_tokens: int,
    drafter: str | None = None,
    layers: int | None = None,
) -> DecodeStats:
    """The counts of a step that added `new_tokens` to the output, when `accepted` of its drafts
    agreed with the target.

    `drafter`: of the step, even without drafts; None: no drafter, or a prefill. `layers`: of the
    target; None: unknown.
    """
    accepted = min(accepted, new_tokens)
    by_layers = list[int]()
    if layers is not None:
        by_layers = [0] * (layers - 1) + [new_tokens]
    steps = {}
    if drafter is not None:
        steps[drafter if drafted else PLAIN] = 1
    return DecodeStats(
        new_tokens=new_tokens,
        drafted=drafted,
        accepted=accepted,
        rounds=int(drafted > 0),
        tested_by_position=(1,) * min(drafted, new_tokens),
        accepted_by_position=(1,) * accepted,
        tokens_by_layers=tuple(by_layers),
        steps_by_drafter=steps,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class TokenLogprobs(NamedTuple):
    """A token's log probability by the target's own logits, before temperature, penalties and bias.

    `top`: the most probable tokens in its place with their log probabilities, best first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Answer:
    """A complete answer, with log probabilities if options ask for them."""

    text: str  # without the EOS token or the stop string that ended it
    finish_reason: StopReason
    stats: DecodeStats  # counts; all seconds only if it was decoded alone
    # The new tokens, including those that ended the answer
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of `ids`
    # Of the prompt's tokens after the first
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: LayerSkipError | None = None  # why `finish_reason` is `error`


class OutputText:
    """The text of an output that grows token by token.

    Each token detokenises only the end again, because its text can depend on the token before it.
    """

    def __init__(
        self,
        detokenize: Detokenize,
        eos_ids: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
    ) -> None:
        # The text of all tokens so far, without an incomplete character at its end
        self.decoded = ""
        self.text = ""  # the part that may be shown, up to a stop string; it only grows
        self._detokenize = detokenize
        self._eos_ids = eos_ids
        self._stop = stop
        self._ids: list[int] = []  # the last settled chunk (context), then unsettled ids
        self._settled = 0  # ids[:settled] are in `decoded`

    def add(self, ids: Sequence[int], finished: bool) -> str:
        """Takes new tokens; returns the newly shown text."""
        self.decode(ids, finished)
        return self.show(finished)

    def decode(self, ids: Sequence[int], finished: bool = False) -> None:
        """Takes new tokens into `decoded`; at the end of the output, invalid bytes become
        U+FFFD.
        """
        ids = [token for token in ids if token not in self._eos_ids]
        if len(ids) > 1 and _INCOMPLETE not in self._detokenize([*self._ids, *ids]):
            self._take(ids)
        else:
            # Some tokenizers turn a whole run of bytes into U+FFFD if one is wrong: those before it
            # are settled first
            for token in ids:
                self._take([token])
        if finished:
            self.decoded += self._unsettled()
            self._ids = []
            self._settled = 0

    def show(self, finished: bool) -> str:
        """Returns the newly shown part of `decoded`.

        Until the output is finished, an end that may start a stop string is held back.
        """
        visible = before_stop(self.decoded, self._stop)
        if not finished and len(visible) == len(self.decoded):
            held_back = 0
            for stop in self._stop:
                for size in range(1, len(stop)):
                    if visible.endswith(stop[:size]):
                        held_back = max(held_back, size)
            visible = visible[: len(visible) - held_back]
        piece = visible[len(self.text) :]
        self.text = visible
        return piece

    def _take(self, ids: Sequence[int]) -> None:
        self._ids += ids
        new = self._unsettled()
        if new and not new.endswith(_INCOMPLETE):  # ids without text would be no context
            self.decoded += new
            self._ids, self._settled = self._ids[self._settled :], len(self._ids) - self._settled

    def _unsettled(self) -> str:
        """The text of the ids that are not settled."""
        before = now = ""
        if self._settled:
            before = self._detokenize(self._ids[: self._settled])
        if self._ids:
            now = self._detokenize(self._ids)
        if now.startswith(before):
            return now[len(before) :]
        return self._detokenize(self._ids[self._settled :])


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first occurrence of a stop string."""
    found = [text.find(string) for string in stop if string in text]
    return text[: min(found, default=len(text))]


class StopScanner:
    """Finds the end of an output, whose tokens come one by one or several per round.

    The tokens of an output include the EOS token, or those that complete a stop string; its text
    does not.
    """

    def __init__(
        self,
        eos_ids: frozenset[int],
        stop: Sequence[str],
        max_new_tokens: int,
        context_left: int,
        detokenize: Detokenize | None = None,
    ) -> None:
        """`context_left`: how many new tokens fit into the context. Stop strings need
        `detokenize`.
        """
        require(not stop or detokenize is not None, "stop", "used with a detokenizer", "none")
        self.eos_ids = eos_ids
        self._stop = stop
        self._text = None
        if stop and detokenize is not None:
            self._text = OutputText(detokenize)
        self.num_tokens_left = min(max_new_tokens, context_left)
        self._last: StopReason = "length" if max_new_tokens <= context_left else "context"
        self.reason: StopReason | None = None  # why the output ended, once it has

    def cut(self, ids: Sequence[int]) -> tuple[int, StopReason | None]:
        """Reads new tokens up to the first that ends the output. Returns how many it read, and the
        reason if one did.
        """
        for count, token in enumerate(ids, start=1):
            self.num_tokens_left -= 1
            if token in self.eos_ids:
                self.reason = "eos"
            elif self._text is not None and self._completes_stop(self._text, token):
                self.reason = "stop"
            elif self.num_tokens_left <= 0:
                self.reason = self._last
            if self.reason is not None:
                return count, self.reason
        return len(ids), None

    def _completes_stop(self, text: OutputText, token: int) -> bool:
        before = len(text.decoded)
        text.decode([token])
        return any(
            text.decoded.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in self._stop
        )


def logprobs_of(logits: Tensor, ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Log probabilities of T tokens and of the `count` most probable ones in the place of each,
    from logits (T, V).
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(ids, device=scores.device)[:, None])[:, 0].tolist()
    values, tokens = scores.topk(count)
    rows = zip(ids, chosen, tokens.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, tuple(zip(*best, strict=True)))
        for token, logprob, *best in rows
    ]
