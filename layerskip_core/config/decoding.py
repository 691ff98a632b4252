"""How tokens are decoded."""

from dataclasses import dataclass, field

from .checks import require, require_choice, require_unicode
from .ranges import require_ranges

# Each strategy that drafts, and the module whose `drafter(setup)` drafts for it.
DRAFTERS = {"self-speculative": "layerskip_core.decoding.drafters.exit"}


def strategies() -> tuple[str, ...]:
    """The names of all strategies: those that draft, and those that do not."""
    return (*DRAFTERS, "early-exit", "autoregressive")


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
    """One way of decoding. `exit_layer` is a count of layers, 1..L; `num_draft_tokens` is the draft length of a round.

    `draft_confidence`: a round stops drafting where the draft's most probable token has less than this probability (0: never).
    """

    strategy: str = "self-speculative"
    exit_layer: int | None = None
    num_draft_tokens: int = 6
    max_new_tokens: int = 256
    draft_confidence: float = 0.0
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require_choice(self.strategy, "strategy", strategies())
        if self.strategy != "autoregressive":
            require(self.exit_layer is not None, "exit_layer", f"given for `strategy` {self.strategy}", "none")
        require_ranges(
            num_draft_tokens=self.num_draft_tokens, max_new_tokens=self.max_new_tokens, draft_confidence=self.draft_confidence
        )
        require(all(self.stop), "stop", "a text that is not empty", "an empty one")
        for text in self.stop:
            require_unicode("stop", text)
