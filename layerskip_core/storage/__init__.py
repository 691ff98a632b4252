"""File access: reading with limits, writing aside and renaming, locks, JSON and schemas."""
