"""Which runs belong together: the arguments of `compare` as labels, each with the paths of its runs."""

import re
from collections.abc import Sequence
from pathlib import Path

from ...config.checks import refused
from ...errors import ConfigError

_SEED = re.compile(r"[-_./]?seed[-_]?\d+$")


def labelled(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Label -> paths, in the order given, from `LABEL=PATH,PATH` and `PATH`.

    A path without a label is labelled by its name, without `-seed3` or the like at the end: runs that differ in nothing else
    belong together. Paths with equal names in different folders keep the folders in their labels. Raises ConfigError for an
    empty label or path, and for a run that is given twice.
    """
    named = [(label, path) for argument in arguments for label, path in _parsed(argument)]
    seen = [Path(path).absolute() for _, path in named]
    for place in seen:
        if seen.count(place) > 1:
            raise ConfigError(f"RUNS must name every run once, found {place} twice")
    stems = dict.fromkeys(_stem(path) for label, path in named if label is None)
    names = [Path(stem).absolute().name for stem in stems]
    short = {stem: name if names.count(name) == 1 else stem for stem, name in zip(stems, names, strict=True)}
    groups: dict[str, list[str]] = {}
    for label, path in named:
        groups.setdefault(short[_stem(path)] if label is None else label, []).append(path)
    return groups


def _parsed(argument: str) -> list[tuple[str | None, str]]:
    """The label, None if the argument has none, and path of each of its runs. What exists under this name is one path."""
    if argument and Path(argument).exists():
        return [(None, argument)]
    label, _, paths = argument.partition("=") if "=" in argument else (None, "", argument)
    listed = paths.split(",")
    if label == "" or not all(listed):
        raise refused("RUNS", "[LABEL=]PATH[,PATH...]", repr(argument))
    return [(label, path) for path in listed]


def _stem(path: str) -> str:
    """The folder of a run without the number of its seed."""
    place = Path(path)
    if place.name in ("results.json", "losses.jsonl"):
        place = place.parent
    return _SEED.sub("", str(place)) or str(place)
