"""A verification as tables, as CSV and as files."""

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict

from ...wording import plural
from ..report.documents import to_json
from ..report.tables import TextTable
from .results import CheckResult, Mismatch, VerifyRecord

_SHOWN = 20  # misses in the table; JSON has all
REPORT_FILES = ("verification.md", "verification.json", "verification.csv")
_LEGEND = """\
bits: logits with the same bits. same: the same tokens. p: the probability of
draws this far from the model's distribution. -: not promised, or impossible.
N ties: N outputs differ, first where two tokens are almost equally likely;
kernels other than our own promise no more. NOT n/m: n of m comparisons broke
their promise."""
_PEER_LEGEND = """\
transformers' generate against itself with each prompt alone: how many outputs
are the same, how many of the others differ first at a near-tie, and the largest
gap between the two tokens, in logits. Information, no failure of this toolkit."""


def tables(record: VerifyRecord) -> list[TextTable]:
    """Our own promises, the places that broke them, and transformers."""
    own = [result for result in record.results if result.promise != "none"]
    peers = [result for result in record.results if result.promise == "none"]
    found = _summaries(record, own) if own else []
    if broken := [result for result in own if not result.passed]:
        found.append(_broken(broken))
    if peers:
        found.append(_peers(peers))
    return found


def to_csv(record: VerifyRecord) -> str:
    """A row per check, setting, kernels and precision; mismatches are counted, with the largest gap of their tokens."""
    text = io.StringIO()
    rows = [_flat(result) for result in record.results]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def files(record: VerifyRecord) -> dict[str, bytes]:
    """By name."""
    contents = ("\n".join(table.markdown() for table in tables(record)), to_json(record), to_csv(record))
    return {name: content.encode() for name, content in zip(REPORT_FILES, contents, strict=True)}


def _summaries(record: VerifyRecord, results: list[CheckResult]) -> list[TextTable]:
    """A table for each precision: a row per check, a column per kernels. The last has the note."""
    precisions = list(dict.fromkeys(result.precision for result in results))
    notes = [*[""] * (len(precisions) - 1), _note(record, results)]
    return [
        _summary(precision, [result for result in results if result.precision == precision], note)
        for precision, note in zip(precisions, notes, strict=True)
    ]


def _summary(precision: str, results: list[CheckResult], note: str) -> TextTable:
    by_cell: dict[tuple[str, str], list[CheckResult]] = {}
    for result in results:
        by_cell.setdefault((result.check, result.kernels), []).append(result)
    kernels = list(dict.fromkeys(result.kernels for result in results))
    checks = list(dict.fromkeys(result.check for result in results))
    rows = [(check, *(_cell(by_cell.get((check, name), [])) for name in kernels)) for check in checks]
    return TextTable((precision, *kernels), tuple(rows), note)


def _note(record: VerifyRecord, results: list[CheckResult]) -> str:
    machine, misses = record.environment, sum(not result.passed for result in results)
    prompts, tokens = max(result.prompts for result in results), sum(result.tokens for result in results)
    threads = plural(machine["threads"], "thread")
    lines = [
        f"{len(results)} comparisons of up to {prompts} prompts, {tokens} tokens in all; {machine['device_name']}, {threads}.",
        _LEGEND,
        *(f"{line[0].upper()}{line[1:]}." for line in machine["skipped"]),
        f"{misses} of {len(results)} comparisons broke their promise." if misses else "Every promise was kept.",
    ]
    return "\n".join(lines)


def _cell(results: list[CheckResult]) -> str:
    """What several settings of a check found together."""
    if not results:
        return "-"
    if broken := sum(not result.passed for result in results):
        return f"NOT {broken}/{len(results)}"
    promise = results[0].promise
    if promise == "distribution":
        return f"p {min(result.p_value or 0.0 for result in results):.2g}"
    if promise == "near-ties" and (ties := sum(result.prompts - result.identical for result in results)):
        return plural(ties, "tie")
    return "bits" if promise == "bits" or all(result.largest_deviation == 0 for result in results) else "same"


def _broken(results: list[CheckResult]) -> TextTable:
    headers = ("miss", "check", "setting", "kernels", "prompt", "place", "expected", "found", "gap", "near tie")
    rows = [
        (result.check, result.setting, f"{result.kernels} {result.precision}", *cells)
        for result in results
        for cells in (map(_place, result.misses) if result.misses else [("-", "-", "-", "-", _without_place(result), "-")])
    ]
    note = "gap: by how much the model prefers the expected token, in logits."
    note += f"\n{len(rows) - _SHOWN} more are in verification.json." if len(rows) > _SHOWN else ""
    return TextTable(headers, tuple((str(number), *row) for number, row in enumerate(rows[:_SHOWN], 1)), note)


def _without_place(result: CheckResult) -> str:
    return f"p {result.p_value:.1g}" if result.p_value is not None else "-"


def _place(place: Mismatch) -> tuple[str, ...]:
    tokens = (_token(token, text) for token, text in zip((place.expected, place.found), place.text, strict=True))
    gap = "-" if place.gap is None else f"{place.gap:.3g}"
    return (str(place.prompt), str(place.position), *tokens, gap, "yes" if place.near_tie else "no")


def _token(token: int | None, text: str) -> str:
    return "end" if token is None else f"{token} {text!a}"


def _peers(results: Iterable[CheckResult]) -> TextTable:
    headers = ("transformers", "setting", "precision", "same", "near-ties", "other", "largest gap")
    rows = []
    for result in results:
        gaps = [abs(place.gap) for place in result.mismatches if place.gap is not None]
        ties = sum(place.near_tie for place in result.mismatches)
        counts = (f"{result.identical}/{result.prompts}", str(ties), str(len(result.mismatches) - ties))
        rows.append((result.check, result.setting, result.precision, *counts, f"{max(gaps):.3g}" if gaps else "-"))
    return TextTable(headers, tuple(rows), _PEER_LEGEND, labels=2)


def _flat(result: CheckResult) -> dict[str, object]:
    flat = asdict(result)
    gaps = [abs(place.gap) for place in result.mismatches if place.gap is not None]
    flat |= {"mismatches": len(result.mismatches), "misses": len(result.misses), "largest_gap": max(gaps, default=None)}
    return flat
