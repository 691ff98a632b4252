"""`layerskip compare`: several runs side by side, with intervals over seeds."""

from typing import TYPE_CHECKING, Annotated

import typer

from layerskip_core.config.checks import refused, require, require_choice, require_given
from layerskip_core.config.options import MEASUREMENT, OUTPUT, parse_counts, parse_names

from .. import evaluation, options
from ..console import narrate

if TYPE_CHECKING:
    from layerskip_core.evaluation.compare.comparison import Run

_EMBEDDED = ("embedded-base", "embedded")  # without the recipe and with it, by equally many steps
_SAMPLES, _EXITS, _DRAFTS = 12, (6, 12, 18), 6  # of their sweeps


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LABEL=]PATH[,PATH...]...",
            help="Runs by label: folders that finetune, sweep-exits or bench wrote, a results.json or a losses.jsonl. Runs of "
            "one label differ in their seed; without a label, names that end in -seed1, -seed2, ... share one. "
            "Without runs, embedded-base and embedded are measured.",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Figures to compare, with commas: exact_match,perplexity.", rich_help_panel=MEASUREMENT),
    ] = None,
    exits: Annotated[str | None, typer.Option(help="Exits to compare: 3,6,8 or A:B:STEP.", rich_help_panel=MEASUREMENT)] = None,
    form: options.Format = "table",
    output: Annotated[
        str | None,
        typer.Option(help="Folder for comparison.md, .json and .csv, and plots.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Compare runs: the mean of every figure over the runs of a label, with 95% intervals, and the difference to the first.

    Example: layerskip compare without=runs/none-1,runs/none-2 with=runs/both-1,runs/both-2 --output comparison
    """
    require_choice(form, "format", options.FORMATS)
    require_given("output", output)
    chosen = () if exits is None else parse_counts(exits, "exits")
    names = () if only is None else parse_names(only, "only")
    from layerskip_core.evaluation.compare.comparison import compare as compare_runs
    from layerskip_core.evaluation.compare.comparison import figures_of, labelled, read_run
    from layerskip_core.evaluation.compare.rendering import compare_files, compare_table, to_csv
    from layerskip_core.evaluation.output_folder import output_folder, write_files
    from layerskip_core.evaluation.report.documents import to_json

    with output_folder(output, "layerskip compare") as folder:
        if runs:
            groups = {label: [read_run(path) for path in paths] for label, paths in labelled(runs).items()}
        else:
            groups = {model: [_measured(model)] for model in _EMBEDDED}
        known = figures_of(groups)
        for name in names:
            require(name in known, "only", f"some of {', '.join(known)}", name)
        comparison = compare_runs(groups, names, chosen)
        if not comparison.lines and exits:
            raise refused("exits", "exits that all runs of a label have", exits)
        if not comparison.lines:
            raise refused("RUNS", "runs that share their settings under one label", "no figure in common")
        for note in comparison.notes:
            narrate(note)
        table = compare_table(comparison)
        if folder is not None:
            files = compare_files(comparison)
            write_files(folder, files)
            narrate(f"wrote {', '.join(files)} to {folder}")
        evaluation.print_as(form, [table], lambda: to_json(comparison), lambda: to_csv(comparison))


def _measured(model: str) -> "Run":
    """A short sweep of an embedded model."""
    from layerskip_core.config.evaluation import SweepConfig, TaskConfig
    from layerskip_core.evaluation.compare.comparison import Run, add_record
    from layerskip_core.evaluation.measure.sweep import sweep

    narrate(f"measuring {model} on {_SAMPLES} rows of its task")
    config = SweepConfig(model, TaskConfig(samples=_SAMPLES), exits=_EXITS, specs=(_DRAFTS,), exit_confidences=())
    return add_record(Run(model), evaluation.watch(sweep(*evaluation.load(config), config)))
