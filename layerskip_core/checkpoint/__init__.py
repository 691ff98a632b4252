"""Models on disk: locate, check, load and save them."""
