"""The prediction after every layer for each generated token: figure 2 of the LayerSkip paper, as data."""

from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any


def visible(token: str) -> str:
    """A token on one line, with visible whitespace."""
    line_end, blank = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\N{OPEN BOX}"
    return token.replace("\n", line_end).replace("\t", blank).replace(" ", blank)


@dataclass(frozen=True)
class LayerPrediction:
    """The most probable next token after a layer, and its probability there."""

    token: str
    probability: float


@dataclass(frozen=True)
class TokenTrace:
    """One generated token. `settled` (1..L) is the first layer from which on every layer predicts this token."""

    token: str
    settled: int
    predictions: tuple[LayerPrediction, ...]  # after layer 1, 2, ..., L
    blocks: dict[int, LayerPrediction] = field(default_factory=dict)  # of the exit blocks, by exit


@dataclass(frozen=True)
class Inspection:
    """A prompt and its greedy answer, with the predictions of every layer."""

    model: str
    prompt: str
    num_layers: int
    tokens: tuple[TokenTrace, ...]

    @property
    def mean_layers(self) -> float:
        """Mean of `settled`: the layers per token that a perfect exit rule would need."""
        return mean(token.settled for token in self.tokens)

    def document(self) -> dict[str, Any]:
        """The inspection as plain values, for JSON."""
        return asdict(self) | {"mean_layers": self.mean_layers}
