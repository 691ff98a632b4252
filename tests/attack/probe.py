"""Runs checks on models in a forked child, so that a crash of a kernel ends only the child."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from .campaign import Case
from .forked import Child, Limits
from .outcome import Miss, misses_of

COUNTED = "counted"  # yielded by a check for each comparison that it made


def probe(case: Case, check: Callable[[], Iterable[Miss | str]], threads: int = 1) -> Iterator[Miss]:
    """The misses of `check`, and how its process ended."""

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
