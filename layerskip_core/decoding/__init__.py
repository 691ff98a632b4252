"""Decoding algorithms over `layerskip_core.model`; they never know which implementation of it runs."""

from .loop import DecodeStats, Decoding, Token, decode
from .stopping import Stopping, StopReason

__all__ = ["DecodeStats", "Decoding", "StopReason", "Stopping", "Token", "decode"]
