"""What sweep-exits and bench share: loading, progress on stderr, and the result on stdout and in files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from .console import ResultsConsole, narrate, narrate_notes, progress_bar
from .loading import use_threads

if TYPE_CHECKING:
    from pathlib import Path

    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.config.evaluation import BenchConfig, SweepConfig
    from layerskip_core.evaluation.measure.measure import Progress
    from layerskip_core.evaluation.report.tables import TextTable
    from layerskip_core.evaluation.results import RunRecord
    from layerskip_core.evaluation.tasks.task import Task
    from layerskip_core.harness.tasks import HarnessTasks

Record = TypeVar("Record")


def load(config: "BenchConfig | SweepConfig") -> "tuple[Decoder, Task]":
    """The rows and the model; prints their notes."""
    from layerskip_core.evaluation.tasks.task import load_task

    rows = load_task(config.task)
    for note in rows.notes:
        narrate(note)
    loaded = load_model(config)
    rows.prepared(loaded).encode_prompt("hello")  # so that a bad template is one error, not one per prompt
    return loaded, rows


def load_scored(config: "BenchConfig | SweepConfig") -> "tuple[Decoder, HarnessTasks]":
    """The model and tasks of lm-evaluation-harness; prints their notes."""
    from layerskip_core.harness.tasks import load_tasks

    tasks = load_tasks(config.task)
    for note in tasks.notes:
        narrate(note)
    return load_model(config), tasks


def load_model(config: "BenchConfig | SweepConfig") -> "Decoder":
    """The model, packed for what is measured; prints its notes."""
    from layerskip_core.checkpoint.open import for_decoding

    # Adaptive drafting gets the copy that `generate` makes for it; a sweep always measures it.
    packing = replace(config.packing, adaptive="adaptive" in getattr(config, "strategies", ("adaptive",)))
    loaded = for_decoding(config.model, config.machine.device, config.machine.dtype, packing)
    narrate_notes(loaded)
    use_threads(config.machine.threads, loaded)
    return loaded


def watch(events: "Iterator[Progress | Record]") -> "Record":
    """Shows progress, a bar for each phase, until the record comes."""
    from layerskip_core.evaluation.measure.measure import Progress

    phase, update = None, None
    with ExitStack() as bars:
        for event in events:
            if not isinstance(event, Progress):
                return event
            if update is None or event.phase != phase:
                bars.close()
                update = bars.enter_context(progress_bar(event.total, event.phase))
                phase = event.phase
            update(event.done, "")
    raise RuntimeError("a measurement ended without its record")


def print_as(
    form: str,
    tables: "Sequence[TextTable]",
    to_json: Callable[[], str],
    to_csv: Callable[[], str],
    picture: Callable[[int], Text] | None = None,
) -> None:
    """Writes the result to stdout in this format, and nothing else there; with tables on a terminal its picture too."""
    if form == "json":
        typer.echo(to_json(), nl=False)
    elif form == "csv":
        typer.echo(to_csv(), nl=False)
    elif form == "markdown":
        typer.echo("\n".join(table.markdown() for table in tables), nl=False)
    else:
        for table in tables:
            _print_table(table, picture)


def deliver(
    record: "RunRecord",
    tables: "Sequence[TextTable]",
    form: str,
    folder: "Path | None",
    picture: Callable[[int], Text] | None = None,
) -> None:
    """Writes the report's files, if there is a folder for them, and the result to stdout; the first table has the notes.

    `picture`: by the width of the terminal.
    """
    from layerskip_core.evaluation.output_folder import write_files
    from layerskip_core.evaluation.report.documents import report_files, to_csv, to_json

    narrate_failures(record)
    if folder is not None:
        files = report_files(record, tables[0])
        write_files(folder, files)
        narrate(f"wrote {', '.join(files)} to {folder}")
    print_as(form, tables, lambda: to_json(record), lambda: to_csv(record), picture)


def narrate_failures(record: "RunRecord") -> None:
    """Prints on stderr how many prompts failed; the record has each of them."""
    failures = record.document()["results"][0]["failures"]
    if failures:
        first = failures[0]
        narrate(f"{len(failures)} prompts failed and count as wrong answers; sample {first['sample']}: {first['error']}")


def _print_table(table: "TextTable", picture: Callable[[int], Text] | None) -> None:
    """At most as wide as the terminal: columns that do not fit follow in another table."""
    console = ResultsConsole()
    for places in table.column_blocks(console.width):
        grid = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        for place in places:
            grid.add_column(Text(table.headers[place]), justify="left" if place == 0 else "right", overflow="fold")
        for row in table.rows:
            grid.add_row(*(Text(row[place]) for place in places))
        console.print(grid)
        console.print()
    if picture is not None and console.is_terminal:
        console.print(picture(console.width))
    console.print(table.note, markup=False)
