"""Decoding by kernels of our own, in C: a span of layers is one call, and a token has the same bits alone and among others."""

from .model import NativeBackend, can_run_native, suits_kernels

__all__ = ["NativeBackend", "can_run_native", "suits_kernels"]
