"""The output for one prompt: tokens, text and the times of its steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checkpoint.loaded import Decoder
from ..decoding import DecodeStats, StopReason
from ..errors import LayerSkipError
from .results import Step


@dataclass(frozen=True)
class Output:
    """What was generated for one prompt, or the `error` that prevented it. The fields are the journal's.

    The first step is the prefill, which gives the first token. Answers of a batch have no steps.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    steps: tuple[Step, ...] = ()
    stats: DecodeStats = field(default_factory=DecodeStats)
    finish_reason: StopReason | None = None
    peak_memory_mb: float | None = None
    error: str | None = None


def answer_text(loaded: Decoder, prompt_ids: list[int], ids: Sequence[int]) -> str:
    """The text of an answer, detokenized together with its prompt.

    On its own, some tokenizers drop the leading space, and with it the indentation of code.
    """
    text = loaded.detokenize(prompt_ids + [token for token in ids if token not in loaded.eos_ids])
    return text[len(loaded.detokenize(prompt_ids)) :]


def times_of(outputs: Sequence[Output]) -> Tensor:
    """(4, prompts): seconds and tokens of whole generations, then both without the prefill and its token."""
    columns = []
    for first in (0, 1):
        columns.append([sum(step.seconds for step in output.steps[first:]) for output in outputs])
        columns.append([sum(step.tokens for step in output.steps[first:]) for output in outputs])
    return torch.tensor(columns, dtype=torch.float64)


def require_outputs(outputs: Sequence[Output]) -> None:
    """Raises LayerSkipError if every prompt failed."""
    errors = [output.error for output in outputs if output.error is not None]
    if len(errors) == len(outputs):
        raise LayerSkipError(f"none of the {len(errors)} prompts could be answered; the first: {errors[0]}")


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None
