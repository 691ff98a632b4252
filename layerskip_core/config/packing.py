"""How weights are stored for decoding."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from .checks import require
from .options import CountOrNone, Flag

Quantization = Literal["int8", "int4"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
EXACT_TOKENS = 64  # the most in an exact call; longer calls are prompts, which every strategy runs in the same way


@dataclass(frozen=True)
class PackingConfig:
    """How the weights of a model that only decodes are stored; the embedding keeps its precision.

    `quantize`: low-bit linear layers and head. `draft_weights`: low-bit copies of the first `draft_layers` (0: all), for
    drafting only, each with a head in `draft_head`. That is int8 unless told otherwise, because an int4 head costs most of the
    agreement with the target. `adaptive`: the model gets a low-bit copy of all layers where nothing else was asked for and a
    kernel is there. `draft_vocab`: drafts are chosen among this many tokens (0: all): the most frequent of the
    training data if there is a token_order.json, else the tokenizer's first. `exact`: self-speculative output is bit for bit
    that of autoregressive decoding, in every precision.
    """

    quantize: Annotated[Quantization | None, Flag("Weights", "int8 or int4 weights (CPU only).", default="none")] = None
    draft_weights: Annotated[
        tuple[Quantization, ...],
        Flag("Weights", "Draft with low-bit copies of the weights: int8, int4 or int8,int4. The output stays the same."),
    ] = ()
    draft_layers: int = 0
    draft_head: Annotated[
        Quantization | None, Flag("Weights", "Precision of the head of these copies: int8 or int4.", default="int8")
    ] = None
    draft_vocab: Annotated[CountOrNone, Flag("Weights", "Draft among the N most frequent tokens only; 0: among all.")] = 0
    exact: Annotated[bool, Flag("Weights", "Bit-for-bit the output of autoregressive decoding, in any precision; slower.")] = (
        False
    )
    adaptive: bool = False

    def __post_init__(self) -> None:
        used = self.draft_head is None or bool(self.draft_weights)
        require(used, "draft_head", "used with `draft_weights`", self.draft_head)

    @property
    def drafts_apart(self) -> bool:
        """Whether drafts have a head of their own, and possibly layers."""
        return bool(self.draft_weights) or self.draft_vocab > 0

    @property
    def has_int4(self) -> bool:
        """Whether any weights are int4."""
        return "int4" in (self.quantize, self.draft_head, *self.draft_weights)

    @property
    def is_plain(self) -> bool:
        """Whether the weights stay as they are; a model that is not repacked supports nothing else."""
        return self.quantize is None and not self.drafts_apart and not self.exact

    @property
    def drafting(self) -> str:
        """The low-bit copies, as reports name them: `, int8 drafts`."""
        return f", {' and '.join(self.draft_weights)} drafts" if self.draft_weights else ""
