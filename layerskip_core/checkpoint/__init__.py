"""Models on disk: found, checked, read and written."""
