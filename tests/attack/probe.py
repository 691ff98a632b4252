"""Runs checks on models in a forked child, where a crash of a kernel ends nothing but the child."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from .campaign import Case
from .forked import Child, Limits
from .outcome import Miss, misses_of

COUNTED = "counted"  # a check yields this for each thing that it looked at


def probe(case: Case, check: Callable[[], Iterable[Miss | str]], threads: int = 1) -> Iterator[Miss]:
    """What `check` finds, and how the process ended that ran it."""

    def work() -> int:
        import torch

        torch.set_num_threads(threads)
        for found in check():
            line = found if isinstance(found, str) else json.dumps(asdict(found))
            os.write(1, line.encode() + b"\n")
        return 0

    child = Child(work, case.logs, Limits(cpu_seconds=60, wall_seconds=240), None, (-1, -1))
    outcome = child.wait()
    assert outcome is not None
    lines = outcome.out.splitlines()
    case.counted.append(max(1, lines.count(COUNTED)))
    yield from (Miss(**json.loads(line)) for line in lines if line.startswith("{"))
    yield from misses_of(outcome)
