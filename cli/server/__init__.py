"""The web side of `layerskip serve`: an OpenAI-compatible API over `layerskip_core.serving`."""
