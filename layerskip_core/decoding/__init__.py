"""Decoding over the protocols of `layerskip_core.model.backend`: it never knows which
implementation runs.
"""

from ..model.backend import check_prompt
from .engine import DecodingLoop, decode, decode_batch
from .output import Answer, DecodeStats, StopReason
from .target import Prefixes

__all__ = [
    "Answer",
    "DecodeStats",
    "DecodingLoop",
    "Prefixes",
    "StopReason",
    "check_prompt",
    "decode",
    "decode_batch",
]
