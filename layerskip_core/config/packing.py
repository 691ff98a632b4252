"""How weights are stored for decoding."""

from dataclasses import dataclass
from typing import Literal, get_args

from .checks import require_choice
from .ranges import require_ranges

Quantization = Literal["int8", "int4"]


QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)


EXACT_TOKENS = 64  # the most in an exact call; longer calls are prompts, which every strategy runs in the same way


@dataclass(frozen=True)
class PackingConfig:
    """How the weights of a model that only decodes are stored; the embedding keeps its precision.

    `quantize`: low-bit linear layers and head. `draft_weights`: a low-bit copy of the head and of the first `draft_layers` (0:
    all but the last), for drafting only; without it `draft_layers` has no effect. `draft_vocab`: drafts are chosen among this
    many tokens (0: all): the most frequent of the training data if there is a token_order.json, else the tokenizer's first.
    `exact`: self-speculative output is bit for bit that of autoregressive decoding, in every precision.
    """

    quantize: Quantization | None = None
    draft_weights: Quantization | None = None
    draft_layers: int = 0
    draft_vocab: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        for name, value in (("quantize", self.quantize), ("draft_weights", self.draft_weights)):
            if value is not None:
                require_choice(value, name, QUANTIZATIONS)
        require_ranges(draft_vocab=self.draft_vocab)

    @property
    def drafts_apart(self) -> bool:
        """Whether drafts have a head of their own, and possibly layers."""
        return self.draft_weights is not None or self.draft_vocab > 0

    @property
    def is_plain(self) -> bool:
        """Whether the weights stay as they are; a model that is not repacked supports nothing else."""
        return self.quantize is None and not self.drafts_apart and not self.exact
