"""Shared by the commands that measure: progress on stderr, results on stdout and in files."""

from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich import box
from rich.table import Table as Grid
from rich.text import Text

from layerskip_core.config.options import Flag
from layerskip_core.errors import LayerSkipError, plural

from .console import ResultsConsole, narrate, stage_bars
from .loading import FreeThreads, load_model, offer_calibration

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.config.evaluation import MeasurementConfig
    from layerskip_core.evaluation.measure.measuring import Progress
    from layerskip_core.evaluation.report.tables import Table
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
    strategies = getattr(config, "strategies", ()) or ("adaptive",)
    packing = replace(config.packing, adaptive="adaptive" in strategies)
    loaded = load_model(config.model, config.machine, packing)
    offer_calibration(loaded)
    finish_writing()
    if not harness:
        # So that a bad template is one error, not one per prompt
        rows.prepared(loaded).encode_prompt("hello")
    return loaded, rows


def watch(
    events: "Generator[Progress, None, Found]", free_threads: FreeThreads | None = None
) -> "Found":
    """Shows a progress bar per phase, and returns what the measurement returns: its record.

    `free_threads` may change between two events, when all settings have decoded a prompt: so each
    has the same share of them.
    """
    with stage_bars() as show:
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                record: Found = end.value
                return record
            show(event.phase, event.done, event.total, "")
            if free_threads is not None and not event.comparing:
                free_threads.look()


def deliver_report(record: "RunRecord", form: str, folder: Path | None, saved: str | None) -> None:
    """Delivers a record, and counts failed prompts on stderr. `saved`: the file that the record was
    read from, if any.
    """
    from layerskip_core.evaluation.journal import OUTPUTS
    from layerskip_core.evaluation.report.files import report_files, to_csv
    from layerskip_core.evaluation.report.tables import results_table

    _narrate_failures(record)
    table = results_table(record)
    files: dict[str, bytes | None] = {}
    if folder is not None:
        files |= report_files(record, table)
        is_same_run = saved is not None and folder.samefile(Path(saved).parent)
        if not is_same_run:
            files[OUTPUTS] = None  # an earlier run's
    deliver(record, table, form, to_csv(record), folder, files)


def _narrate_failures(record: "RunRecord") -> None:
    """Names the first of the prompts that failed, once for settings where the same ones did."""
    from layerskip_core.evaluation.results import result_name

    reported = []
    for result in record.results:
        if result.failures and result.failures not in reported:
            reported.append(result.failures)
            count = plural(len(result.failures), "prompt")
            first = result.failures[0]
            narrate(
                f"{result_name(result)}: {count} failed, counted as wrong; "
                f"sample {first.sample}: {first.error}"
            )


def deliver(
    record: Any,
    table: "Table",
    form: str,
    csv: str,
    folder: Path | None,
    files: Mapping[str, bytes | None],
    name: str | None = None,
) -> None:
    """Writes `files` to the folder (None: removes one), with a `name` also the document, table and
    CSV; prints the table, CSV or JSON on stdout.
    """
    from layerskip_core.evaluation.report.files import table_files, to_json
    from layerskip_core.files import write_file

    texts = {"json": to_json(record), "markdown": table.markdown(), "csv": csv}
    if folder is not None:
        if name is not None:
            files = {**table_files(name, **texts), **files}
        written = []
        for file, content in files.items():
            if content is None:
                (folder / file).unlink(missing_ok=True)
            else:
                write_file(folder / file, content, LayerSkipError)
                written.append(file)
        narrate(f"wrote {', '.join(written)} to {folder}")
    if form == "table":
        _print_table(table)
    else:
        typer.echo(texts[form], nl=False)


def _print_table(table: "Table") -> None:
    """Prints a table as wide as the terminal; further columns follow in another table."""
    console = ResultsConsole()
    blocks = table.column_blocks(console.width)
    shown: set[int] = set()
    for columns in blocks:
        shown.update(columns)
        grid = Grid(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        for column in columns:
            justify: Literal["left", "right"] = "left" if column == 0 else "right"
            grid.add_column(Text(table.headers[column]), justify=justify, overflow="fold")
        for row in table.texts:
            grid.add_row(*(Text(row[column]) for column in columns))
        console.print(grid)
        console.print()
    hidden = [name for column, name in enumerate(table.headers) if column not in shown]
    if hidden:
        console.print(f"Not shown, for lack of width: {', '.join(hidden)}.", markup=False)
    console.print(table.text, markup=False)
