"""Decoding over the protocols of `layerskip_core.model.backend`: it never knows which
implementation runs.
"""

from .loop import DecodingLoop, check_prompt, decode, decode_batch, new_row
from .output import Answer, DecodeStats, StopReason
from .prefixes import Prefixes
from .scheduler import Scheduler, without_failure

__all__ = [
    "Answer",
    "DecodeStats",
    "DecodingLoop",
    "Prefixes",
    "Scheduler",
    "StopReason",
    "check_prompt",
    "decode",
    "decode_batch",
    "new_row",
    "without_failure",
]
