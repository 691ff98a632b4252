"""What the parts of the campaign share: how many examples they draw, and what any command may
answer to bad input.
"""

import hashlib
import os
import re

from command_line import Result
from hypothesis import HealthCheck, settings

# Values that a field of JSON may have by fault or on purpose
ODD = (
    None, True, False, 0, 1, -1, 0.5, -0.5, 1e-50, 1e308, "", "x", "\u202e", [], [1], [[]], ["x"], [None], {}, {"x": 1},
)  # fmt: skip
_ERROR = re.compile(r"^error: \S.{9}", re.MULTILINE)


def examples(count: int) -> settings:
    """Draws so many examples, times LAYERSKIP_ATTACK."""
    times = int(os.environ.get("LAYERSKIP_ATTACK", "1"))
    return settings(
        max_examples=count * times, deadline=None, suppress_health_check=list(HealthCheck)
    )


def require_sound(result: Result) -> None:
    """The command succeeded, or failed with one line of error; an exception that is none of ours is
    a fault.
    """
    assert "Traceback" not in result.err + result.out, result.err
    assert "--debug shows where" not in result.err, result.err
    assert result.code in (0, 1, 2, 130, 143), result
    if result.code == 1:
        assert len(_ERROR.findall(result.err)) == 1, result.err


def contents(folder) -> dict[str, str]:
    """The hash of each file below a folder, by its path in it."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha1(file.read_bytes()).hexdigest() for file in files
    }
