"""The errors that a user can cause or fix.

A message says what was needed and what was found. It names a setting in backquotes, as the configs do (`exit_layer`); the
command line shows the flag instead.
"""


class LayerSkipError(Exception):
    """Base of everything that a command reports with exit status 1."""


class ConfigError(LayerSkipError):
    """A setting is outside its range. `field` is its name in the configs; None where no single setting is at fault."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CheckpointError(LayerSkipError):
    """A model cannot be found, read, run layer by layer, or written."""


class ContextError(ConfigError):
    """A text does not fit into the model's context."""


class LockedError(LayerSkipError):
    """Another process writes to a folder; the message says which."""


class DataError(LayerSkipError):
    """A data set cannot be found or one of its rows cannot be used; the message names file and line."""


class TrainingError(LayerSkipError):
    """Training cannot go on: the message names the step and the last good checkpoint."""


class TrainingInterrupted(LayerSkipError):
    """A signal asked a run to stop: it was saved at `step`, and can be resumed."""

    def __init__(self, message: str, signal: int, step: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.step = step


def first_line(error: BaseException) -> str:
    """The message of a library's exception on one line, or its type if it has none. A line that ends in a colon goes on."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = " ".join(map(str.strip, lines[:2])) if lines[0].endswith(":") else lines[0]
    return told[:300]
