"""Settings of every command, validated where they are made. Standard library only, so that `--help` stays fast."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from .errors import ConfigError

Strategy = Literal["self-speculative", "early-exit", "autoregressive"]
Curriculum = Literal["rotational", "gradual", "all", "none"]
Regime = Literal["finetune", "continual", "scratch", "code"]
DType = Literal["auto", "fp32", "bf16"]

STRATEGIES: tuple[str, ...] = get_args(Strategy)
CURRICULA: tuple[str, ...] = get_args(Curriculum)
REGIMES: tuple[str, ...] = get_args(Regime)
DTYPES: tuple[str, ...] = get_args(DType)


def require(condition: bool, flag: str, needed: str, found: object) -> None:
    """Raises ConfigError `flag must be needed, got found` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{flag} must be {needed}, got {found}")


def require_choice(value: str, flag: str, choices: tuple[str, ...]) -> None:
    require(value in choices, flag, f"one of {', '.join(choices)}", value)


def require_exit_layer(exit_layer: int, num_layers: int, strategy: str = "self-speculative", flag: str = "--exit") -> None:
    """An early exit may stand at any layer 1..L; a draft needs layers left to verify it, so 1..L-1."""
    last = num_layers if strategy == "early-exit" else num_layers - 1
    if not 1 <= exit_layer <= last:
        raise ConfigError(f"{flag} must be in 1..{last}, got {exit_layer} (model has {num_layers} layers)")


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen from logits. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "--temperature", "at least 0", self.temperature)
        require(self.top_k >= 0, "--top-k", "at least 0", self.top_k)
        require(0 < self.top_p <= 1, "--top-p", "in (0, 1]", self.top_p)


@dataclass(frozen=True)
class DecodingConfig:
    """One way of decoding. `exit_layer` is a count of layers, 1..L; `num_draft_tokens` is the draft length of a round.

    `draft_confidence`: a round stops drafting where the draft's most probable token has less than this probability (0: never).
    """

    strategy: Strategy = "self-speculative"
    exit_layer: int | None = None
    num_draft_tokens: int = 6
    max_new_tokens: int = 256
    draft_confidence: float = 0.0
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require_choice(self.strategy, "--strategy", STRATEGIES)
        if self.strategy != "autoregressive":
            require(self.exit_layer is not None, "--exit", f"given for --strategy {self.strategy}", "none")
        require(self.num_draft_tokens >= 1, "--spec", "at least 1", self.num_draft_tokens)
        require(self.max_new_tokens >= 1, "--max-new-tokens", "at least 1", self.max_new_tokens)
        require(0 <= self.draft_confidence < 1, "--draft-confidence", "in [0, 1)", self.draft_confidence)
        require(all(self.stop), "--stop", "a text that is not empty", "an empty one")


@dataclass(frozen=True)
class RecipeConfig:
    """The LayerSkip recipe (Elhoushi et al., ACL 2024, sections 4.1 and 4.2).

    `rotation` is R of the rotational curriculum; None picks L/3 (at least 1) up to a vocabulary of 8k and L-1 above it, where every
    extra exit costs a head.
    """

    p_max: float = 0.2
    e_scale: float = 1.0
    curriculum: Curriculum = "rotational"
    rotation: int | None = None

    def __post_init__(self) -> None:
        require(0 <= self.p_max < 1, "--pmax", "in [0, 1)", self.p_max)
        require(self.e_scale >= 0, "--escale", "at least 0", self.e_scale)
        require_choice(self.curriculum, "--curriculum", CURRICULA)
        require(self.rotation is None or self.rotation >= 1, "--rotation", "at least 1", self.rotation)
