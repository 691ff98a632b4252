"""Measure exits and draft lengths, and recommend a setting."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text

from layerskip_core.config.evaluation import SweepConfig
from layerskip_core.config.options import Flag
from layerskip_core.config.resolution import EXACT, FAST, policy_text
from layerskip_core.errors import ConfigError, require

from .. import evaluation
from ..console import narrate
from ..loading import FreeThreads
from ..options import Format, Overwrite, ReportFolder, SavedReport, command

if TYPE_CHECKING:
    from layerskip_core.evaluation.report.tables import Points
    from layerskip_core.evaluation.results import RunRecord

# Keys of a policy by exit alone
_BY_EXIT = {"strategy", "exit_layer", "num_draft_tokens", "measured"}
_HEIGHT = 12  # lines of the plot
_MARKERS = {"autoregressive": "■", "early-exit": "○", "self-speculative": "▲"}
_COLOURS = (
    "blue",
    "yellow",
    "green",
    "magenta",
    "cyan",
    "red",
    "bright_blue",
    "bright_yellow",
    "bright_green",
)


@command
def sweep_exits(
    config: SweepConfig,
    format: Format = "table",
    output: ReportFolder = None,
    overwrite: Overwrite = False,
    log_samples: evaluation.LogSamples = False,
    saved: SavedReport = None,
    save: Annotated[
        bool,
        Flag(
            "Save the recommendation and the policies exact and fast with the model, for generate.",
            panel="Output",
        ),
    ] = False,
) -> None:
    """Measure every exit, alone and as the draft of self-speculative decoding, predict its speed,
    and recommend a setting.

    Example: layerskip sweep-exits --model layerskip-model --exits 4:12:2 --specs 4,8 --save
    """
    from layerskip_core.evaluation.measure.sweep import sweep
    from layerskip_core.evaluation.report import REPORT, output_folder
    from layerskip_core.evaluation.report.tables import has_scores, points_of
    from layerskip_core.evaluation.results import read_record

    require(output is not None or not log_samples, "log_samples", "used with `output`", "none")
    record = None if saved is None else read_record(saved, "sweep-exits")
    scored = bool(config.task.harness_tasks) if record is None else has_scores(record)
    require(
        not (save and scored),
        "save",
        "left out for tasks of lm-eval, whose sweep recommends nothing",
        config.task.task,
    )
    model = config.model if record is None else str(record.config["model"])
    holding = output_folder(output, "layerskip sweep-exits", REPORT, overwrite)
    with _settings_file(model) if save else nullcontext() as settings, holding as folder:
        if record is None:
            loaded, rows = evaluation.load(config, log_samples)
            if scored:
                from layerskip_core.harness.tasks import sweep_scores

                record = evaluation.watch(sweep_scores(loaded, rows, config))
            else:
                record = evaluation.watch(
                    sweep(loaded, rows, config), FreeThreads(config.machine.threads)
                )
        if settings is not None:  # first: the reader of stdout may go away
            _save(model, settings, record)
        points = points_of(record)
        evaluation.deliver_report(
            record, format, folder, saved, None if points is None else partial(front, points)
        )


@contextmanager
def _settings_file(model: str) -> Iterator[Path]:
    """The file that --save writes, whose folder it locks if it is the model's. Raises ConfigError
    for other kinds of models.
    """
    from layerskip_core.checkpoint.info import holds_model
    from layerskip_core.checkpoint.locate import EMBEDDED, locate
    from layerskip_core.checkpoint.save import settle
    from layerskip_core.checkpoint.settings import info_of, settings_file, write_settings
    from layerskip_core.files import hold, require_writable

    path = Path(model)
    is_gguf = path.suffix == ".gguf" and path.is_file()
    if path.is_dir():
        settle(path)
    if model in EMBEDDED or not (is_gguf or holds_model(path)):
        needed = "a folder or a .gguf file, to save settings with it"
        raise ConfigError(
            f"`save` needs a `model` that is {needed}; got {model}: `layerskip import {model}` writes a folder"
        )
    location = locate(model)
    settings = settings_file(model, location)
    is_own = settings.parent == Path(location.path)
    with hold(settings.parent, "layerskip sweep-exits --save") if is_own else nullcontext():
        info = info_of(model, location)
        if is_own:
            require_writable(settings, ConfigError)
        else:
            # A copy, so that a cache that cannot be written is told before the sweep
            write_settings(settings, info)
        yield settings


def _save(model: str, settings: Path, record: "RunRecord") -> None:
    """Stores profile and recommendation in one write, and reports them."""
    from layerskip_core.checkpoint.info import INFO_FILE
    from layerskip_core.checkpoint.settings import info_of, write_settings

    advice = record.recommendation
    info = info_of(model)
    lines = []
    info = replace(info, profile=record.profile or info.profile)
    if advice is not None:
        exact = advice.policies[EXACT]
        by_exit = exact["strategy"] == "self-speculative" and exact.keys() <= _BY_EXIT
        exit_layer, count = (
            (advice.exit_layer, advice.num_draft_tokens) if by_exit else (None, None)
        )
        strategy = "autoregressive" if exit_layer is None else None
        info = replace(
            info,
            exit_layer=exit_layer,
            num_draft_tokens=count,
            strategy=strategy,
            policies=advice.policies,
        )
        found, why = (
            (policy_text(exact), "") if advice.pays else ("plain decoding", f": {advice.reason}")
        )
        where = "" if settings.name == INFO_FILE else f", in {settings}"
        lines = [
            f"saved {found} as the default of {model}{where}{why}",
            f"policy {FAST}: {advice.fast_reason}",
        ]
    write_settings(settings, info)
    for line in lines:
        narrate(line)


def front(points: "Points", width: int) -> Text:
    """Plots a marker per setting, quality upwards and speed to the right; settings on the frontier
    are numbered.
    """
    from layerskip_core.evaluation.report.tables import is_wide, strategy_name
    from layerskip_core.evaluation.results import result_name

    high = f"{max(points.values):.4g}"
    low = f"{min(points.values):.4g}"
    margin = max(len(high), len(low))
    across = _places(points.speeds, width - margin - 2, is_wide(points.speeds))
    up = _places(points.values, _HEIGHT, points.lower_is_better and is_wide(points.values))
    if not points.lower_is_better:
        up = [_HEIGHT - 1 - row for row in up]
    markers = {
        strategy: (_MARKERS.get(strategy, "◆"), _COLOURS[number % len(_COLOURS)])
        for number, strategy in enumerate(points.strategies)
    }
    places = list(zip(up, across, strict=True))
    cells = {
        place: markers[strategy_name(result)]
        for place, result in zip(places, points.results, strict=True)
    }
    # Of several points in one cell, the fastest of the frontier is shown.
    ranked = sorted(points.optimal, key=lambda index: points.speeds[index])
    cells |= {places[index]: (str(rank % 10), "bold") for rank, index in enumerate(ranked, start=1)}
    ends = {0: low, _HEIGHT - 1: high} if points.lower_is_better else {0: high, _HEIGHT - 1: low}
    text = Text.assemble((f"{points.quality_label}\n", "dim"))
    for row in range(_HEIGHT):
        text.append(f"{ends.get(row, ''):>{margin}} │", style="dim")
        text.append_tokens(cells.get((row, column), (" ", "")) for column in range(max(across) + 1))
        text.append("\n")
    slow = f"{min(points.speeds):.0f}"
    fast = f"{max(points.speeds):.0f} tokens/s"
    room = width - margin - 2
    text.append(
        f"{'':>{margin}} └{'─' * room}\n{'':>{margin}}  {slow}{fast:>{room - len(slow)}}\n",
        style="dim",
    )
    for strategy, (marker, colour) in markers.items():
        text.append(f"{marker} {strategy}  ", style=colour)
    for rank, index in enumerate(ranked, start=1):
        result = points.results[index]
        speedup = f" {result.speedup:.2f}x" if result.speedup else ""
        text.append(f"\n{rank} {result_name(result)}:{speedup}, {points.values[index]:.4g}")
    return text.append("\n")


def _places(values: Sequence[float], size: int, logarithmic: bool) -> list[int]:
    """Scales values to cells 0..size-1."""
    scaled = [math.log(value) for value in values] if logarithmic else list(values)
    lowest = min(scaled)
    extent = max(scaled) - min(scaled)
    return [round((value - lowest) / extent * (size - 1)) if extent else 0 for value in scaled]
