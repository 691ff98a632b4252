"""The web side of `layerskip serve`: OpenAI's API over `layerskip_core.serving`."""
