"""The backend on C kernels: a span of layers is one call, and the kernels are batch-invariant."""

from .model import NativeBackend, can_run_native, suits_kernels

__all__ = ["NativeBackend", "can_run_native", "suits_kernels"]
