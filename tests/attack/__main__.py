"""`python -m tests.attack`: runs the whole campaign or a part, prints a table, and exits with 1 if there is any miss."""

import argparse
import importlib
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from . import sanitized
from .campaign import PartReport, run_part
from .material import import_everything, import_what_commands_import, make
from .outcome import KINDS

PARTS = ("commands", "checkpoints", "models", "kills", "writers", "programs", "decoding", "serve")
_SHOWN = 12  # misses that are printed per part; the report file has all


def main() -> None:
    arguments = _arguments()
    if arguments.asan:
        sanitized.restart_sanitized()
    import_everything()
    sanitized.use_sanitized_kernels()
    with tempfile.TemporaryDirectory(prefix="layerskip-attack-", ignore_cleanup_errors=True) as folder:
        material = make(Path(folder) / "material")
        import_what_commands_import(material)
        reports = []
        for name in arguments.part or PARTS:
            part = importlib.import_module(f".{name}", __package__)
            report = run_part(part, _numbers(part, arguments), arguments.seed, material, arguments.workers)
            reports.append(report)
            _tell(report, arguments.seed)
    print(_table(reports))
    if arguments.report:
        rows = [{**asdict(report), "counts": report.counts()} for report in reports]
        Path(arguments.report).write_text(json.dumps({"seed": arguments.seed, "parts": rows}, indent=1) + "\n")
    sys.exit(int(any(report.misses for report in reports)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; without it all run")
    parser.add_argument("--cases", type=int, help="how many of each part; without it the part's own number")
    parser.add_argument("--case", type=int, action="append", help="only this one, to see a miss again; may be repeated")
    parser.add_argument("--short", action="store_true", help="the slice that the normal tests run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that attack at once")
    parser.add_argument(
        "--asan", action="store_true", help="with the C kernels built with address and undefined-behaviour sanitizers, by gcc"
    )
    parser.add_argument("--report", metavar="FILE.json", help="everything that was found")
    return parser.parse_args()


def _numbers(part: ModuleType, arguments: argparse.Namespace) -> list[int]:
    if arguments.case:
        return list(arguments.case)
    if arguments.short:
        return list(part.SHORT)
    return list(range(arguments.cases or part.CASES))


def _tell(report: PartReport, seed: int) -> None:
    print(f"{report.name}: {report.cases} cases in {report.seconds:.0f} s, {len(report.misses)} misses", flush=True)
    for miss in report.misses[:_SHOWN]:
        print(f"  {miss['kind']}: python -m tests.attack --part {report.name} --seed {seed} --case {miss['case']}")
        for line in (*miss["said"], miss["what"]):
            print(f"    {line}")


def _table(reports: list[PartReport]) -> str:
    head = ("part", "cases", *KINDS, "seconds")
    rows = [(report.name, report.cases, *report.counts().values(), round(report.seconds)) for report in reports]
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    main()
