"""Checks of settings, and the errors that they raise."""

from ..errors import ConfigError
from .ranges import shown


def require(condition: bool, flag: str, needed: str, found: object) -> None:
    """Raises ConfigError `flag must be needed, got found` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{flag} must be {needed}, got {shown(found)}")


def require_choice(value: str, flag: str, choices: tuple[str, ...]) -> None:
    require(value in choices, flag, f"one of {', '.join(choices)}", value)


def require_unicode(flag: str, text: str | None) -> None:
    """Raises ConfigError for halves of surrogate pairs, which stand for an argument's bytes that are no UTF-8."""
    whole = text is None or text.encode("utf-8", "replace").decode() == text
    require(whole, flag, "valid Unicode", ascii(text))


def require_given(flag: str, name: str | None) -> None:
    """Raises ConfigError for an empty name, which would stand for the current folder; None, which is none given, passes."""
    require(name != "", flag, "a name that is not empty", "an empty one")


def require_exit_layer(exit_layer: int, num_layers: int, strategy: str = "self-speculative", flag: str = "--exit") -> None:
    """An early exit may stand at any layer 1..L; a draft needs layers left to verify it, so 1..L-1."""
    last = num_layers if strategy == "early-exit" else num_layers - 1
    if not 1 <= exit_layer <= last:
        raise ConfigError(f"{flag} must be in 1..{last}, got {exit_layer} (model has {num_layers} layers)")
