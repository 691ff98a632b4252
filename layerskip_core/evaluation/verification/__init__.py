"""`layerskip verify`: whether batching, drafting and resuming change outputs, on each kernel and in each precision."""
