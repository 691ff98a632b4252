"""Checks of settings, and the errors that they raise."""

from collections.abc import Sequence

from ..errors import ConfigError

_SHOWN = 60  # characters of a refused value


def require(condition: bool, field: str, needed: str, found: object) -> None:
    """Raises ConfigError `field must be needed, got found` unless the condition holds."""
    if not condition:
        raise refused(field, needed, shown(found))


def require_choice(value: str, field: str, choices: Sequence[str]) -> None:
    require(value in choices, field, f"one of {', '.join(choices)}", value)


def require_exit_layer(exit_layer: int, num_layers: int, may_be_last: bool = False, field: str = "exit_layer") -> None:
    """1..L for an early exit and for drafts by a low-bit copy; 1..L-1 for drafts that the layers above must verify."""
    last = num_layers if may_be_last else num_layers - 1
    require(1 <= exit_layer <= last, field, f"in 1..{last}", f"{exit_layer} (model has {num_layers} layers)")


def require_skip(skip: Sequence[int], num_layers: int) -> None:
    """Layers of the model, numbered 1..L, one at least and not all of them."""
    needed = "given for `strategy` draft-and-verify, or found by `layerskip sweep-exits --search-skips --save`"
    require(bool(skip), "skip", needed, "none")
    for layer in skip:
        require_exit_layer(layer, num_layers, may_be_last=True, field="skip")
    require(len(set(skip)) < num_layers, "skip", "a list that leaves at least one layer", f"all {num_layers} layers")


def refused(field: str, needed: str, got: str) -> ConfigError:
    """The error `field must be needed, got got`. What is no field ("the prompt") is named as it stands."""
    known = field.isidentifier() and field.islower()  # an environment variable is named as it stands
    return ConfigError(f"{f'`{field}`' if known else field} must be {needed}, got {got}", field if known else None)


def shown(value: object) -> str:
    """A value as an error quotes it: cut if it is very long, lone surrogates escaped."""
    try:
        text = str(value).encode("utf-8", "backslashreplace").decode()
    except ValueError:  # an int with more digits than Python converts
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
