"""Runs the cases of all parts in two processes. Each case has its own folder and its own seed."""

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import ModuleType

from .forked import fork
from .material import Material
from .outcome import KINDS, Miss


@dataclass(frozen=True)
class Case:
    """One attack: its number, which with the seed determines everything, an empty folder, and the material to attack."""

    number: int
    random: Random
    folder: Path
    material: Material
    said: list[str] = field(default_factory=list)  # commands and changes, for the report of a miss
    counted: list[int] = field(default_factory=list)  # how many checks it made, if not one

    @property
    def logs(self) -> Path:
        return self.folder.with_name(self.folder.name + "-logs")

    def say(self, what: object) -> None:
        self.said.append(str(what))


Attack = Callable[[Case], Iterable[Miss]]


@dataclass
class PartReport:
    """The results of a part."""

    name: str
    cases: int = 0
    attacks: int = 0  # that ended; an attack may check several cases
    seconds: float = 0.0
    misses: list[dict[str, object]] = field(default_factory=list)  # case, kind, what, said

    def counts(self) -> dict[str, int]:
        found = Counter(str(miss["kind"]) for miss in self.misses)
        return {kind: found[kind] for kind in KINDS}


def run_part(part: ModuleType, numbers: Sequence[int], seed: int, material: Material, workers: int) -> PartReport:
    """The cases with these numbers."""
    name = part.__name__.rpartition(".")[2]
    report, started = PartReport(name), time.monotonic()
    work = material.root / "cases" / name
    work.mkdir(parents=True, exist_ok=True)
    drivers = {}
    for worker in range(workers):
        results = work / f"results-{worker}.jsonl"
        sys.stdout.flush(), sys.stderr.flush()
        pid = fork()
        if pid == 0:
            _drive(part, numbers[worker::workers], seed, material, work, results)
        drivers[pid] = results
    try:
        for pid, results in drivers.items():
            status = os.waitpid(pid, 0)[1]
            _collect(report, results, status, numbers)
    except BaseException:
        for pid in drivers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    shutil.rmtree(work, ignore_errors=True)
    if report.attacks != len(numbers):  # a driver that died must not look like one without misses
        what = f"{report.attacks} of {len(numbers)} attacks came to their end"
        report.misses.append({"case": numbers[-1], "kind": "wrong", "what": what, "said": []})
    report.misses.sort(key=lambda miss: int(str(miss["case"])))
    report.seconds = time.monotonic() - started
    return report


def _collect(report: PartReport, results: Path, status: int, numbers: Sequence[int]) -> None:
    for line in results.read_text().splitlines() if results.exists() else ():
        row = json.loads(line)
        report.attacks += 1
        report.cases += row["counted"]
        report.misses += [{"case": row["case"], "said": row["said"], **miss} for miss in row["misses"]]
    if status:
        report.misses.append({"case": numbers[-1], "kind": "wrong", "what": f"the driver ended with {status}", "said": []})


def _drive(part: ModuleType, numbers: Sequence[int], seed: int, material: Material, work: Path, results: Path) -> None:
    """In a forked process: runs the attacks one by one and writes a line of JSON for each."""
    try:
        with open(results, "w") as file:
            for number in numbers:
                name = part.__name__.rpartition(".")[2]
                case = Case(number, Random(f"{name} {seed} {number}"), work / str(number), material)
                case.folder.mkdir(parents=True)
                case.logs.mkdir()
                misses = _attack(part.attack, case)
                row = {
                    "case": number,
                    "counted": sum(case.counted) or 1,
                    "misses": [asdict(miss) for miss in misses],
                    "said": case.said,
                }
                file.write(json.dumps(row) + "\n")
                file.flush()
                shutil.rmtree(case.folder, ignore_errors=True)
                shutil.rmtree(case.logs, ignore_errors=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _attack(attack: Attack, case: Case) -> list[Miss]:
    try:
        return list(attack(case))
    except Exception:
        return [Miss("wrong", f"the attack itself failed: {traceback.format_exc()[-1500:]}")]
