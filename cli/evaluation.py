"""Shared by the commands that measure: progress on stderr, results on stdout and in files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from layerskip_core.config.options import Flag
from layerskip_core.errors import LayerSkipError, plural

from .console import ResultsConsole, narrate, stage_bars
from .loading import FreeThreads, load_model

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.config.evaluation import MeasurementConfig
    from layerskip_core.evaluation.measure import Progress
    from layerskip_core.evaluation.report.tables import TextTable
    from layerskip_core.evaluation.results import RunRecord

Found = TypeVar("Found")
LogSamples = Annotated[
    bool,
    Flag("Also write lm-eval's record of each row to samples.jsonl in --output.", panel="Output"),
]


def load(config: "MeasurementConfig", log_samples: bool = False) -> "tuple[Decoder, Any]":
    """Loads the model, packed for the measurement, and the Task or HarnessTasks; prints their
    notes.
    """
    from layerskip_core.checkpoint.load_cache import finish_writing

    harness = bool(config.task.harness_tasks)
    if harness:
        from layerskip_core.harness.tasks import load_tasks  # needs lm-eval

        rows: Any = load_tasks(config.task, log_samples)
    else:
        from layerskip_core.evaluation.tasks.texts import load_trained

        rows = load_trained(config.task, config.model)
    for note in rows.notes:
        narrate(note)
    # Adaptive drafting, which a sweep always measures, gets the same low-bit copy as in `generate`.
    packing = replace(
        config.packing, adaptive="adaptive" in (getattr(config, "strategies", ()) or ("adaptive",))
    )
    loaded = load_model(config.model, config.machine, packing)
    finish_writing()
    if not harness:
        # So that a bad template is one error, not one per prompt
        rows.prepared(loaded).encode_prompt("hello")
    return loaded, rows


def watch(events: "Iterator[Progress | Found]", free_threads: FreeThreads | None = None) -> "Found":
    """Shows a progress bar per phase and returns the record.

    `free_threads` may change between two events, when all settings have decoded a prompt: so each
    has the same share of them.
    """
    from layerskip_core.evaluation.measure import Progress

    with stage_bars() as show:
        while isinstance(event := next(events), Progress):
            show(event.phase, event.done, event.total, "")
            if free_threads is not None and not event.comparing:
                free_threads.look()
    return event


def deliver_report(
    record: "RunRecord",
    form: str,
    folder: Path | None,
    saved: str | None,
    picture: Callable[[int], Text] | None = None,
) -> None:
    """Delivers a record, and counts failed prompts on stderr. `saved`: the file that the record was
    read from, if any.
    """
    from layerskip_core.evaluation.report import report_files, to_csv
    from layerskip_core.evaluation.report.tables import results_table
    from layerskip_core.evaluation.results import OUTPUTS, result_name

    table = results_table(record)
    reported = []
    for result in record.results:
        if result.failures and result.failures not in reported:
            reported.append(result.failures)
            count = plural(len(result.failures), "prompt")
            first = result.failures[0]
            narrate(
                f"{result_name(result)}: {count} failed, counted as wrong; sample {first.sample}: {first.error}"
            )
    files = {} if folder is None else report_files(record, table)
    if folder is not None and not (saved is not None and folder.samefile(Path(saved).parent)):
        files[OUTPUTS] = None
    deliver(record, [table], form, to_csv(record), folder, files, picture=picture)


def deliver(
    record: Any,
    tables: "Sequence[TextTable]",
    form: str,
    rows: str,
    folder: Path | None,
    files: Mapping[str, bytes | None],
    name: str | None = None,
    picture: Callable[[int], Text] | None = None,
) -> None:
    """Writes `files` to the folder (None: removes one) and prints tables, CSV (`rows`) or JSON on
    stdout.
    """
    from layerskip_core.evaluation.report import table_files, to_json
    from layerskip_core.files import write_file

    texts = {
        "json": to_json(record),
        "markdown": "\n".join(table.markdown() for table in tables),
        "csv": rows,
    }
    if folder is not None:
        files = {**(table_files(name, list(texts.values())) if name else {}), **files}
        written = {file: content for file, content in files.items() if content is not None}
        for file, content in written.items():
            write_file(folder / file, content, LayerSkipError)
        for file in files.keys() - written.keys():
            (folder / file).unlink(missing_ok=True)
        narrate(f"wrote {', '.join(written)} to {folder}")
    if form == "table":
        for table in tables:
            _print_table(table, picture)
    else:
        typer.echo(texts[form], nl=False)


def _print_table(table: "TextTable", picture: Callable[[int], Text] | None) -> None:
    """Prints a table as wide as the terminal; further columns follow in another table."""
    console = ResultsConsole()
    blocks = table.column_blocks(console.width)
    for places in blocks:
        grid = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        for place in places:
            grid.add_column(
                Text(table.headers[place]),
                justify="left" if place == 0 else "right",
                overflow="fold",
            )
        for row in table.rows:
            grid.add_row(*(Text(row[place]) for place in places))
        console.print(grid)
        console.print()
    if picture is not None and console.is_terminal:
        console.print(picture(console.width))
    if hidden := [
        name
        for place, name in enumerate(table.headers)
        if not any(place in places for places in blocks)
    ]:
        console.print(f"Not shown, for lack of width: {', '.join(hidden)}.", markup=False)
    console.print(table.text, markup=False)
