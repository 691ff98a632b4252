"""The `layerskip` command: turns flags into settings for the core, and its results into text."""
