"""How weights are stored for decoding."""

from dataclasses import dataclass
from typing import Literal, get_args

from .checks import require_choice
from .ranges import require_ranges

Quantization = Literal["int8", "int4"]


QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)


EXACT_TOKENS = 64  # an exact call has no more; longer ones are prompts, which every way of decoding runs alike


@dataclass(frozen=True)
class PackingConfig:
    """How the weights of a model that only decodes are stored; the embedding keeps its precision.

    `quantize`: low-bit linear layers and head. `draft_weights`: a low-bit copy of the head and of the first `draft_layers` (0:
    all but the last), used to draft only; without it `draft_layers` means nothing. `draft_vocab`: drafts are chosen among so
    many tokens, by token_order.json the most frequent of the training data, else the tokenizer's first (0: all). `exact`:
    self-speculative output is that of plain decoding bit for bit, in every precision.
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
        """Whether drafts have a head, and perhaps layers, of their own."""
        return self.draft_weights is not None or self.draft_vocab > 0

    @property
    def is_plain(self) -> bool:
        """Whether the weights stay as they are, which is all that a model that is not repacked can do."""
        return self.quantize is None and not self.drafts_apart and not self.exact
