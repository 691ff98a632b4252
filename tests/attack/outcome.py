"""What an attacked command did, and what counts as a miss."""

import re
import signal
from dataclasses import dataclass

KINDS = ("traceback", "crash", "hang", "lost", "mixed", "executed", "breach", "wrong")
MOST_MEMORY_MB = 2500  # of a command on a tiny model; more is a memory bomb
_EXPECTED_STATUS = (0, 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)
_ERROR = re.compile(r"^error: (?!line \d+: )", re.MULTILINE)
_ERROR_OF_A_LINE = re.compile(r"^error: line \d+: ", re.MULTILINE)
_NOISE = re.compile(r"Warning: |Exception ignored|\r|^\s*warnings\.warn|it/s\]|leaked semaphore", re.MULTILINE)


@dataclass(frozen=True)
class Miss:
    """A fault that an attack found: its kind, and what happened."""

    kind: str
    what: str


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `status` is its exit status, or minus the signal that ended it."""

    status: int
    out: str
    err: str
    timed_out: bool = False
    peak_mb: float = 0.0

    @property
    def tail(self) -> str:
        """The end of its output, for reports."""
        return f"status {self.status}; stderr: {self.err.strip()[-600:]!r}; stdout: {self.out.strip()[-120:]!r}"


def misses_of(outcome: Outcome, *, must_fail: bool = False, interrupted: bool = False) -> list[Miss]:
    """Checks what every command must do with any input: end in time, print no traceback, and explain a failure in one line.

    `must_fail`: no right result is possible, so success is a miss. `interrupted`: a signal was sent to the command.
    """
    tail = outcome.tail
    if "Traceback (most recent call last)" in outcome.err + outcome.out:
        return [Miss("traceback", tail)]
    if "--debug shows where" in outcome.err:
        return [Miss("traceback", f"an exception that is no error of ours; {tail}")]
    if outcome.timed_out or outcome.status == -signal.SIGXCPU:
        return [Miss("hang", f"did not end in time; {tail}")]
    if outcome.peak_mb > MOST_MEMORY_MB:
        return [Miss("hang", f"took {outcome.peak_mb:.0f} MB; {tail}")]
    if outcome.status < 0:
        return [Miss("crash", f"ended by {signal.Signals(-outcome.status).name}; {tail}")]
    if outcome.status not in _EXPECTED_STATUS or (outcome.status > 2 and not interrupted):
        return [Miss("wrong", f"unexpected exit status; {tail}")]
    if outcome.status == 1 and (fault := _fault_of_error(outcome)):
        return [Miss("wrong", f"{fault}; {tail}")]
    if outcome.status == 0 and must_fail:
        return [Miss("wrong", f"success, though no right result is possible; {tail}")]
    if noise := _NOISE.search(outcome.err):
        return [Miss("wrong", f"noise of a library on stderr ({noise.group()!r}); {tail}")]
    return []


def _fault_of_error(outcome: Outcome) -> str | None:
    """What is wrong with the report of a failure; None if its last line, and only this line, is `error: ...`."""
    lines = outcome.err.strip().splitlines()
    whole, of_lines = len(_ERROR.findall(outcome.err)), len(_ERROR_OF_A_LINE.findall(outcome.err))
    if whole == 0 and (of_lines or '"error": "line ' in outcome.out):  # failed prompts of --lines or --jsonl, each reported
        return None
    if whole != 1:
        return f"{whole} error lines"
    if not lines[-1].startswith("error: "):
        return "lines follow the error's first"
    if len(lines[-1].removeprefix("error: ").strip()) < 10:
        return "an error that says nothing"
    return None
