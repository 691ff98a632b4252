"""Our own kernels in C, and their side in Python. They are batch-invariant."""
