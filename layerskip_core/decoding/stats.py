"""Counts and seconds of decoding. Ratios are derived from them once, at the end."""

from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class DecodeStats:
    """Counts and seconds of one output, or of many added up; `DecodeStats()` is zero. Ratios are properties.

    `drafted` counts the drafts that the target verified. `accepted` counts those that it accepted and that are part of the
    output: a draft after an EOS, a stop string or the last token allowed is drafted but not accepted. `rounds` counts the
    passes that verified drafts. `tested_by_position[j]`: in how many rounds draft j+1 was compared, because all drafts before
    it were accepted and none of them ended the output. `accepted_by_position[j]`: in how many of these rounds it was accepted.
    Steps without drafts count in `verify_seconds`. The first token comes from the prefill. `steps_by_drafter`: the steps of a
    strategy that drafts, by what drafted; `plain` are those without drafts. `tokens_by_layers[j]`: how many of the new tokens
    were chosen after j+1 layers.
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
    steps_by_drafter: dict[str, int] = field(default_factory=dict)
    tokens_by_layers: tuple[int, ...] = ()

    @property
    def acceptance_rate(self) -> float:
        return _ratio(self.accepted, self.drafted)

    @property
    def mean_accepted_tokens(self) -> float:
        """Accepted drafts per round, without the target's own token."""
        return _ratio(self.accepted, self.rounds)

    @property
    def mean_layers(self) -> float:
        """Layers that a new token was chosen after, on average."""
        layers = sum(layers * tokens for layers, tokens in enumerate(self.tokens_by_layers, start=1))
        return _ratio(layers, sum(self.tokens_by_layers))

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, prefill included."""
        return _ratio(self.new_tokens, self.total_seconds)

    def __add__(self, other: "DecodeStats") -> "DecodeStats":
        return DecodeStats(*(_sum(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)))


def step_counts(
    drafted: int, accepted: int, new_tokens: int, drafter: str | None = None, layers: int | None = None
) -> DecodeStats:
    """The counts of a step that added `new_tokens` to the output, when `accepted` of its drafts agreed with the target.

    `drafter` names what drafted, or would have; None where nothing could. `layers` of the target; None where they are unknown.
    """
    accepted = min(accepted, new_tokens)
    return DecodeStats(
        new_tokens=new_tokens,
        drafted=drafted,
        accepted=accepted,
        rounds=int(drafted > 0),
        tested_by_position=(1,) * min(drafted, new_tokens),
        accepted_by_position=(1,) * accepted,
        tokens_by_layers=() if layers is None else (0,) * (layers - 1) + (new_tokens,),
        steps_by_drafter={} if drafter is None else {drafter if drafted else "plain": 1},
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _sum(left: Any, right: Any) -> Any:
    if isinstance(left, tuple):
        return tuple(a + b for a, b in zip_longest(left, right, fillvalue=0))
    if isinstance(left, dict):
        return {name: left.get(name, 0) + right.get(name, 0) for name in {**left, **right}}
    return left + right
