"""What sweep-exits and bench share: the flags of a task, progress on stderr, and the result on stdout and in files."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from layerskip_core.evaluation.tasks import TASKS

from .console import ResultsConsole, narrate, narrate_notes, progress_bar, use_threads

if TYPE_CHECKING:
    from pathlib import Path

    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.config.evaluation import BenchConfig, SweepConfig
    from layerskip_core.evaluation.measure.runner import Progress
    from layerskip_core.evaluation.record import RunRecord
    from layerskip_core.evaluation.report.tables import TextTable
    from layerskip_core.evaluation.tasks.task import Task

FORMATS = ("table", "json", "csv", "markdown")
Result = TypeVar("Result")

Model = Annotated[str, typer.Option("--model", help="embedded, embedded-base, a folder, a .gguf file or a hub id.")]
TaskName = Annotated[
    str | None,
    typer.Option("--task", help=f"{', '.join(TASKS)}. [default: by --data, else commands]"),
]
Source = Annotated[
    str | None, typer.Option("--data", help="A file, a TOPv2 folder, a hub id. [default: the task's own on the hub]")
]
Split = Annotated[str, typer.Option("--split", help="train, validation, test; compositional for commands.")]
Samples = Annotated[int, typer.Option("--samples", help="How many rows; 0 is all, for `commands` 20000.")]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Most tokens of an answer. [default: 128]")]
PromptColumn = Annotated[
    str | None, typer.Option("--prompt-column", help="Column of the prompt. [default: by its usual names]")
]
CompletionColumn = Annotated[
    str | None, typer.Option("--completion-column", help="Column of the reference. [default: by its usual names]")
]
Metric = Annotated[
    str | None, typer.Option("--metric", help="Of jsonl: exact_match, rouge1, rouge2 or rougeL. [default: rouge2]")
]
Shots = Annotated[int | None, typer.Option("--shots", help="Solved rows before each prompt. [default: the task's]")]
Template = Annotated[
    str | None,
    typer.Option("--template", help="A row's prompt: a text with {prompt} in it, raw, or chat. [default: the task's]"),
]
PassK = Annotated[str, typer.Option("--pass-k", help="The k of pass@k, such as 1,10.")]
ProblemSamples = Annotated[int, typer.Option("--problem-samples", help="Answers to each problem, for pass@k.")]
Temperature = Annotated[float, typer.Option("--temperature", help="Of answers to code problems; 0 is greedy.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run the programs that the model writes, in a sandbox.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", help="Prompts answered together, for quality; speed is measured one by one.")
]
Timed = Annotated[
    int | None, typer.Option("--timed", help="With --batch-size: how many of the prompts speed is measured on. [default: 8]")
]
Format = Annotated[str, typer.Option("--format", help="Of standard output: table, json, csv or markdown.")]
Output = Annotated[str | None, typer.Option("--output", help="Folder for report.html, results.json, results.csv and plots.")]
Saved = Annotated[str | None, typer.Option("--from", help="Measure nothing: render this results.json again.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of generated rows.")]


def load(config: "BenchConfig | SweepConfig") -> "tuple[Decoder, Task]":
    """The rows, about which it says what there is to say, and the model."""
    from layerskip_core.checkpoint.load import for_decoding
    from layerskip_core.evaluation.tasks.load import load_task

    rows = load_task(config.task)
    for note in rows.notes:
        narrate(note)
    loaded = for_decoding(config.model, config.device, config.dtype, config.packing)
    narrate_notes(loaded)
    use_threads(config.threads, loaded)
    rows.prepared(loaded).encode_prompt("hello")  # a template that fails is one error, not one for each prompt
    return loaded, rows


def watch(events: "Iterator[Progress | RunRecord[Result]]") -> "RunRecord[Result]":
    """Shows progress, a bar for each phase, until the record comes."""
    from layerskip_core.evaluation.measure.runner import Progress

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


def print_result(record: "RunRecord[Result]", table: "TextTable", form: str) -> None:
    """Writes the result to stdout, and nothing else there."""
    from layerskip_core.evaluation.report.documents import to_csv, to_json

    if form == "json":
        typer.echo(to_json(record), nl=False)
    elif form == "csv":
        typer.echo(to_csv(record), nl=False)
    elif form == "markdown":
        typer.echo(table.markdown(), nl=False)
    else:
        _print_table(table)


def deliver(record: "RunRecord[Result]", table: "TextTable", form: str, folder: "Path | None") -> None:
    """The report files, if there is a folder for them, and the result on stdout."""
    from layerskip_core.evaluation.output_folder import write_files
    from layerskip_core.evaluation.report.files import report_files

    narrate_failures(record)
    if folder is not None:
        files = report_files(record, table)
        write_files(folder, files)
        narrate(f"wrote {', '.join(files)} to {folder}")
    print_result(record, table, form)


def narrate_failures(record: "RunRecord[Result]") -> None:
    """Says on stderr how many prompts failed; the record has each."""
    failures = record.document()["results"][0]["failures"]
    if failures:
        first = failures[0]
        narrate(f"{len(failures)} prompts failed and count as wrong answers; sample {first['sample']}: {first['error']}")


def _print_table(table: "TextTable") -> None:
    """As wide as the terminal at most: columns for which there is no room follow in a table of their own."""
    console = ResultsConsole()
    for places in table.column_blocks(console.width):
        grid = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        for place in places:
            grid.add_column(Text(table.headers[place]), justify="left" if place == 0 else "right", no_wrap=True)
        for row in table.rows:
            grid.add_row(*(Text(row[place]) for place in places))
        console.print(grid)
        console.print()
    console.print(table.note, markup=False)
