"""The training loop: transformers' Trainer, its checkpoints and its processes."""
