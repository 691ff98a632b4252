"""Decoding algorithms over the protocols of `layerskip_core.model.backend`; they never know which implementation runs."""

from .loop import Token
from .prefix import PrefixCache
from .stats import DecodeStats
from .stopping import Stopping, StopReason
from .strategies import Decoding, Finished, decode, decode_batch

__all__ = ["DecodeStats", "Decoding", "Finished", "PrefixCache", "StopReason", "Stopping", "Token", "decode", "decode_batch"]
