"""What goes wrong and is told to the user as one line: `error: ...`."""


class LayerSkipError(Exception):
    """Base of everything that a command reports with exit status 1. The message says what was needed and what was found."""


class ConfigError(LayerSkipError):
    """A setting is outside its range; the message names the flag."""


class CheckpointError(LayerSkipError):
    """A model cannot be found, read, split by depth, or written."""


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
