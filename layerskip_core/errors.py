"""What goes wrong and is told to the user as one line: `error: ...`."""


class LayerSkipError(Exception):
    """Base of everything that a command reports with exit status 1. The message says what was needed and what was found."""


class ConfigError(LayerSkipError):
    """A setting is outside its range; the message names the flag."""


class CheckpointError(LayerSkipError):
    """A model cannot be found, read, split by depth, or written."""


class DataError(LayerSkipError):
    """A data set cannot be found or one of its rows cannot be used; the message names file and line."""
