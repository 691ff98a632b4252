"""Tasks by name: prompts, references, stop strings and scores."""
