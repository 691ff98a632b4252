"""How tokens are decoded: what was asked for, and what it means for a checkpoint."""

from dataclasses import dataclass, field

from .checks import require, require_choice, require_exit_layer, require_unicode
from .ranges import require_ranges

# Each strategy that drafts, and the module whose `drafter(setup)` drafts for it.
DRAFTERS = {"self-speculative": "layerskip_core.decoding.drafters.exit"}


def strategies() -> tuple[str, ...]:
    """The names of all strategies: those that draft, and those that do not."""
    return (*DRAFTERS, "early-exit", "autoregressive")


_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen from logits. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True)
class DecodingConfig:
    """A strategy with all that it needs. `exit_layer` counts layers, 1..L; `num_draft_tokens` is the draft length per round.

    `draft_confidence`: a round stops drafting when the draft's most probable token has less than this probability (0: never).
    """

    strategy: str = "self-speculative"
    exit_layer: int | None = None  # None for autoregressive decoding only
    num_draft_tokens: int = 6
    max_new_tokens: int = _MAX_NEW_TOKENS
    draft_confidence: float = 0.0
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require_choice(self.strategy, "strategy", strategies())
        if self.strategy != "autoregressive":
            require(self.exit_layer is not None, "exit_layer", f"given for `strategy` {self.strategy}", "none")
        require_ranges(num_draft_tokens=self.num_draft_tokens, max_new_tokens=self.max_new_tokens)
        _require_generation(self.draft_confidence, self.stop)


@dataclass(frozen=True)
class GenerationSettings:
    """What is asked of an answer, whatever the strategy; the fields are those of DecodingConfig. None: the caller's default."""

    max_new_tokens: int | None = None
    draft_confidence: float = 0.0
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require_ranges(max_new_tokens=self.max_new_tokens)
        _require_generation(self.draft_confidence, self.stop)

    def decoding(
        self,
        strategy: str,
        exit_layer: int | None = None,
        num_draft_tokens: int = 6,
        max_new_tokens: int = _MAX_NEW_TOKENS,
    ) -> DecodingConfig:
        """A strategy with these settings; `max_new_tokens` is the default."""
        settings = vars(self) | {"max_new_tokens": self.max_new_tokens or max_new_tokens}
        return DecodingConfig(strategy, exit_layer, num_draft_tokens, **settings)


@dataclass(frozen=True)
class ExitChoice:
    """An exit and a draft length, as a checkpoint recommends them. No `strategy`: its exits were not trained or measured."""

    exit_layer: int
    num_draft_tokens: int
    strategy: str | None = None


@dataclass(frozen=True)
class DecodingSettings:
    """What is asked of decoding. None: not said, so that the checkpoint decides."""

    strategy: str | None = None
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    def __post_init__(self) -> None:
        if self.strategy is not None:
            require_choice(self.strategy, "strategy", strategies())
        require_ranges(num_draft_tokens=self.num_draft_tokens)

    def leaves_strategy_open(self, drafts_apart: bool = False) -> bool:
        """Whether nothing was said that implies a strategy. `drafts_apart`: weights for drafting were asked for."""
        drafting = (self.exit_layer, self.num_draft_tokens) != (None, None) or self.generation.draft_confidence > 0
        return self.strategy is None and not drafting and not drafts_apart

    def resolve(self, recommended: ExitChoice, num_layers: int, drafts_apart: bool = False) -> DecodingConfig:
        """What was asked, completed by what the checkpoint of `num_layers` layers recommends.

        Where the strategy is left open, it is self-speculative for a checkpoint whose exits were trained or measured, and
        autoregressive for any other. Raises ConfigError for an exit outside the model.
        """
        strategy: str = self.strategy or "self-speculative"
        if self.leaves_strategy_open(drafts_apart):
            strategy = recommended.strategy or "autoregressive"
        exit_layer = recommended.exit_layer if self.exit_layer is None else self.exit_layer
        if strategy != "autoregressive":
            require_exit_layer(exit_layer, num_layers, strategy)
        drafts = recommended.num_draft_tokens if self.num_draft_tokens is None else self.num_draft_tokens
        return self.generation.decoding(strategy, exit_layer, drafts)


def _require_generation(draft_confidence: float, stop: tuple[str, ...]) -> None:
    require_ranges(draft_confidence=draft_confidence)
    require(all(stop), "stop", "a text that is not empty", "an empty one")
    for text in stop:
        require_unicode("stop", text)
