"""Decoding algorithms over the protocols of `layerskip_core.model.backend`; they never know which implementation runs."""

from .loop import Decoding, Finished, Token, decode, decode_batch
from .stats import DecodeStats
from .stopping import Stopping, StopReason

__all__ = ["DecodeStats", "Decoding", "Finished", "StopReason", "Stopping", "Token", "decode", "decode_batch"]
