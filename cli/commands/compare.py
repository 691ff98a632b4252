"""Compare runs, with intervals over seeds."""

from typing import TYPE_CHECKING, Annotated

import typer

from layerskip_core.config.options import Flag, Layer, Text
from layerskip_core.errors import require, require_choice

from .. import evaluation
from ..console import narrate
from ..options import Format, Overwrite, command

if TYPE_CHECKING:
    from layerskip_core.evaluation.comparison import Run

_EMBEDDED = ("embedded-base", "embedded")  # equally many steps without the recipe and with it
# Without RUNS both are swept with these settings
_SAMPLES = 12
_EXITS = (6, 12, 18)
_DRAFTS = 6


@command
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LABEL=]PATH[,PATH...]...",
            help="Runs by label: folders that finetune, sweep-exits or bench wrote, a results.json or a losses.jsonl. Runs of "
            "one label differ only in their seed; without a label, names that end in -seed1, -seed2, ... share one. "
            "Without runs, embedded-base and embedded are measured.",
        ),
    ] = None,
    only: Annotated[
        tuple[str, ...],
        Flag("Figures to compare, with commas: exact_match,perplexity.", panel="Measurement"),
    ] = (),
    exits: Annotated[
        tuple[Layer, ...], Flag("Exits to compare: 3,6,8 or A:B:STEP.", panel="Measurement")
    ] = (),
    format: Format = "table",
    output: Annotated[
        Text | None, Flag("Folder for comparison.md, .json and .csv, and plots.", panel="Output")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare runs: the mean of every figure by label, with 95% intervals, and its difference from
    the first label.

    Example: layerskip compare without=runs/none-1,runs/none-2 with=runs/both-1,runs/both-2 --output
    comparison
    """
    from layerskip_core.evaluation.comparison import compare as compare_runs
    from layerskip_core.evaluation.comparison import figures_of, labelled, read_run
    from layerskip_core.evaluation.report.comparison import compare_table, plots, to_csv
    from layerskip_core.evaluation.report.files import output_folder, table_files

    with output_folder(
        output, "layerskip compare", list(table_files("comparison")), overwrite
    ) as folder:
        if runs:
            groups = {}
            for label, paths in labelled(runs).items():
                groups[label] = [read_run(path) for path in paths]
        else:
            groups = {model: [_measured(model)] for model in _EMBEDDED}
        for name in only:
            require_choice(name, "only", figures_of(groups))
        comparison = compare_runs(groups, only, exits)
        found = bool(comparison.lines)
        require(
            found or not exits,
            "exits",
            "exits that all runs of a label have",
            ",".join(map(str, exits)),
        )
        require(
            found, "RUNS", "runs that share their settings under one label", "no figure in common"
        )
        for note in comparison.notes:
            narrate(note)
        files = {} if folder is None else plots(comparison, folder)
        evaluation.deliver(
            comparison,
            compare_table(comparison),
            format,
            to_csv(comparison),
            folder,
            files,
            "comparison",
        )


def _measured(model: str) -> "Run":
    """A short sweep of an embedded model."""
    from layerskip_core.config.evaluation import SweepConfig, TaskConfig
    from layerskip_core.evaluation.comparison import Run, add_record
    from layerskip_core.evaluation.measure.sweep import sweep

    narrate(f"measuring {model} on {_SAMPLES} rows of its task")
    config = SweepConfig(
        model, TaskConfig(samples=_SAMPLES), exits=_EXITS, specs=(_DRAFTS,), exit_confidences=()
    )
    return add_record(Run(model), evaluation.watch(sweep(*evaluation.load(config), config)))
