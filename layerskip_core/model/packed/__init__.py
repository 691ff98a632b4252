"""Decoding on repacked weights by torch's kernels."""
