"""Policies: settings of decoding that a sweep saved with a model, under names."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace

from ..errors import ConfigError
from .checks import require, require_choice
from .decoding import DecodingSettings, GenerationSettings, strategies
from .packing import PackingConfig, Quantization
from .ranges import require_ranges

EXACT = "exact"  # the fastest setting with the outputs of plain decoding; used where nothing is said
FAST = "fast"  # the fastest early exit that keeps a share of the quality


@dataclass(frozen=True)
class Measured:
    """What a sweep measured of a policy: the task's metric, its value at full depth, and the speed over plain decoding."""

    task: str
    metric: str
    value: float
    full_depth: float
    speedup: float


@dataclass(frozen=True)
class Policy:
    """How to decode. Limit, stop strings and sampling are left to the request.

    `draft_copies`, `draft_head` and `draft_vocab` are how drafts were stored when this was measured, as in PackingConfig; the
    other fields are those of DecodingConfig. `draft_copies`: those that adaptive drafting chooses among; none: the one that it
    gets without being asked for.
    """

    strategy: str
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    draft_weights: Quantization | None = None
    draft_confidence: float = 0.0
    lookup: int = 0
    exit_confidence: float = 0.0
    exits: tuple[int, ...] = ()  # none: those that were trained
    skip: tuple[int, ...] = ()  # none: those of a search
    draft_copies: tuple[Quantization, ...] = ()
    draft_head: Quantization | None = None
    draft_vocab: int = 0
    measured: Measured | None = None

    def __post_init__(self) -> None:
        require_choice(self.strategy, "strategy", strategies())
        if self.strategy in ("self-speculative", "early-exit") and not self.exit_confidence:
            require(self.exit_layer is not None, "exit_layer", f"given for `strategy` {self.strategy}", "none")
        require(bool(self.exit_confidence) or not self.exits, "exits", "given with `exit_confidence`", "none")
        layers = (*self.exits, *self.skip, *(() if self.exit_layer is None else (self.exit_layer,)))
        require(all(layer >= 1 for layer in layers), "exit_layer", "at least 1", min(layers, default=1))
        chosen = self.strategy == "adaptive" or not self.draft_copies
        require(chosen, "draft_copies", "given for `strategy` adaptive", f"`strategy` {self.strategy}")
        _ = self.packing  # checks what it is made of
        require_ranges(
            num_draft_tokens=self.num_draft_tokens, draft_confidence=self.draft_confidence, lookup=self.lookup,
            exit_confidence=self.exit_confidence,
        )  # fmt: skip

    def __str__(self) -> str:
        """`exit 8 with 6 draft tokens`, as reports name it."""
        if self.strategy == "early-exit":
            return f"exits by confidence {self.exit_confidence:g}" if self.exit_confidence else f"exit {self.exit_layer}"
        name = "plain decoding" if self.strategy == "autoregressive" else self.strategy
        if self.strategy == "self-speculative":
            name = f"exit {self.exit_layer}" + (f" of the {self.draft_weights} copies" if self.draft_weights else "")
        return name if self.num_draft_tokens is None else f"{name} with {self.num_draft_tokens} draft tokens"

    @property
    def is_exit_drafting(self) -> bool:
        """Whether an exit and a draft length say it all."""
        return self == Policy(
            "self-speculative", self.exit_layer, self.num_draft_tokens, draft_confidence=self.draft_confidence,
            measured=self.measured,
        )  # fmt: skip

    @property
    def packing(self) -> PackingConfig:
        """How the weights that it drafts with are stored."""
        copies = self.draft_copies if self.draft_weights is None else (self.draft_weights,)
        return PackingConfig(draft_weights=copies, draft_head=self.draft_head, draft_vocab=self.draft_vocab)

    def settings(self, generation: GenerationSettings) -> DecodingSettings:
        """The policy for a request, of which it keeps limit, stop strings and sampling."""
        own = replace(
            generation, draft_confidence=self.draft_confidence, lookup=self.lookup, exit_confidence=self.exit_confidence,
            skip=self.skip,
        )  # fmt: skip
        return DecodingSettings(self.strategy, self.exit_layer, self.num_draft_tokens, own, exits=self.exits)

    def document(self) -> dict[str, object]:
        """The policy as plain values, without what is not set."""
        unset = {field.name: None if field.default is MISSING else field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != unset[name]}


def require_lossless(policies: Mapping[str, Policy]) -> None:
    """Raises ConfigError if `exact`, which is used where nothing is said, is an early exit: its output would be another one."""
    if EXACT in policies and policies[EXACT].strategy == "early-exit":
        raise ConfigError(f"policies.{EXACT} must have the output of plain decoding, got the strategy early-exit")


def policy_named(policies: Mapping[str, Policy], name: str) -> Policy:
    """Raises ConfigError, which names those that are there, for another name."""
    there = ", ".join(policies) or "there are none"
    how = f"`layerskip sweep-exits --save` saves {EXACT}, and {FAST} where an early exit keeps the quality"
    require(name in policies, "policy", f"one that is saved with the model ({there}; {how})", name)
    return policies[name]
