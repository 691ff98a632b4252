"""What a verification found: one result for each check on each kernel and precision."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

# From the strongest: logits with the same bits; the same tokens; the same tokens except where two are almost equally likely;
# the same distribution of sampled tokens; nothing, which is information.
Promise = Literal["bits", "tokens", "near-ties", "distribution", "none"]
LEAST_P = 1e-6  # of a chi-square test, below which the distributions differ: one in a million tests of equal ones


@dataclass(frozen=True)
class Mismatch:
    """Where a prompt's output first differs from what was expected; for logits, where the most probable tokens differ.

    `expected` and `found` are token ids, None past the end of an output. `gap`: by how much the model prefers the expected one,
    in logits; 0 if the tokens are equal and only bits differ, None past an end. `text`: the two tokens.
    """

    prompt: int
    position: int
    expected: int | None
    found: int | None
    gap: float | None
    near_tie: bool
    text: tuple[str, str]


@dataclass(frozen=True)
class CheckResult:
    """One check with one setting. `prompts` were compared, `identical` of them have no difference.

    `tokens`: how many places were compared. `largest_deviation`: of any logit, where logits were compared. `p_value`: of
    sampled tokens. A check `passed` if its promise was kept; one that promises nothing always does. `note`: other findings.
    """

    check: str
    setting: str
    kernels: str
    precision: str
    implementation: str
    promise: Promise
    prompts: int
    identical: int
    tokens: int
    passed: bool
    mismatches: tuple[Mismatch, ...] = ()
    largest_deviation: float | None = None
    p_value: float | None = None
    note: str = ""

    @property
    def misses(self) -> tuple[Mismatch, ...]:
        """The mismatches that break the promise."""
        if self.promise == "none":
            return ()
        return tuple(place for place in self.mismatches if self.promise != "near-ties" or not place.near_tie)


def is_kept(promise: Promise, mismatches: Sequence[Mismatch], deviation: float | None, p_value: float | None) -> bool:
    """Whether what was found keeps a promise."""
    if promise == "none":
        return True
    if promise == "distribution":
        return p_value is not None and p_value >= LEAST_P
    if promise == "near-ties":
        return all(place.near_tie for place in mismatches)
    return not mismatches and not (promise == "bits" and deviation)


@dataclass(frozen=True)
class VerifyRecord:
    """One run of `verify`; `config` holds the value that each default took."""

    config: dict[str, Any]
    environment: dict[str, Any]
    results: tuple[CheckResult, ...]

    def document(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self)
