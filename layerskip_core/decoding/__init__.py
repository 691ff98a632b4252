"""Decoding over the protocols of `layerskip_core.model.backend`: it never knows which implementation runs."""

from .engine import Decoding, DecodingLoop, check_prompt, decode, decode_batch, loop_of
from .output import Answer, DecodeStats, StopReason, StopScanner, Token, before_stop, step_counts
from .target import PrefixCache

__all__ = [
    "Answer",
    "DecodeStats",
    "Decoding",
    "DecodingLoop",
    "PrefixCache",
    "StopReason",
    "StopScanner",
    "Token",
    "before_stop",
    "check_prompt",
    "decode",
    "decode_batch",
    "loop_of",
    "step_counts",
]
