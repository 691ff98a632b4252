"""The `layerskip` command: turns flags into the core's settings, and its results into text."""
