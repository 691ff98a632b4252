"""Whether outputs are what they are promised to be, on this machine's kernels."""
