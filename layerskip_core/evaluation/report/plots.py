"""The figures of a record: drawn once, exported as PNG files and as SVG for the report page."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure

from ..results import Result, RunRecord
from .drawing import GREY, SIZE, color, legend_above, logarithmic, new_figure, style
from .pareto import pareto_figure
from .points import label
from .scores import lower_scores_by_exit, scores_by_exit

_PHASES = ("prefill", "draft", "verify", "other")
_PLAIN = "plain"  # steps without drafts
_WINDOW = 8  # steps

Record = RunRecord


def figures(record: Record) -> dict[str, Figure]:
    """The figures that the record has data for, by name."""
    with style():
        drawn = {name: draw(record) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def title(record: Record) -> str:
    """`model on task`, for the page."""
    task = record.config["task"]
    data = task.get("data") if task.get("task") == "jsonl" else task.get("task")
    return f"{Path(record.config['model']).name} on {Path(data or 'a task').name}"


def _acceptance_by_exit(record: Record) -> Figure | None:
    drafted = [
        result for result in record.results if result.strategy == "self-speculative" and result.acceptance_rate is not None
    ]
    if len({result.exit_layer for result in drafted}) < 2:
        return None
    figure, axes = new_figure("Accepted drafts by exit")
    kinds = sorted({(result.draft_weights or "", result.num_draft_tokens) for result in drafted})
    for number, (weights, drafts) in enumerate(kinds):
        line = [
            (result.exit_layer, 100 * (result.acceptance_rate or 0.0))
            for result in drafted
            if (result.draft_weights or "", result.num_draft_tokens) == (weights, drafts)
        ]
        name = f"{drafts} {weights} drafts".replace("  ", " ")
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=color(number), label=name)
    alone = [result for result in _exits(record) if result.strategy == "early-exit" and result.agreement is not None]
    agreeing = [(result.exit_layer, 100 * (result.agreement or 0.0)) for result in alone]
    if agreeing:
        axes.plot(*zip(*agreeing, strict=True), linestyle="--", color=GREY, label="agreement with the full model")
    axes.set(xlabel="exit layer", ylabel="accepted drafts (%)", ylim=(0, 105))
    axes.legend(fontsize=7)
    return figure


def _acceptance_by_position(record: Record) -> Figure | None:
    drafted = [result for result in record.results if result.acceptance_by_position]
    if not drafted:
        return None
    by_length = sorted(drafted, key=lambda result: result.num_draft_tokens or 0)
    # The longest drafts of each drafter.
    longest = {(result.strategy, result.draft_weights, result.exit_layer): result for result in by_length}
    figure, axes = new_figure("Accepted drafts by position in the round")
    for number, result in enumerate(longest.values()):
        shares = [100 * share for share in result.acceptance_by_position or ()]
        positions = range(1, len(shares) + 1)
        axes.plot(positions, shares, marker="o", markersize=4, color=color(number), label=label(result))
    axes.set(xlabel="position of the draft in its round", ylabel="accepted (%), if all before it were", ylim=(0, 105))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)
    return figure


def _time_split(record: Record) -> Figure | None:
    timed = [result for result in record.results if result.time_split_ms]
    if not timed:
        return None
    figure, axes = new_figure("Where the time goes", height=max(SIZE[1], 0.6 + 0.2 * len(timed)))
    names, ends = [label(result) for result in timed], [0.0] * len(timed)
    for number, phase in enumerate(_PHASES):
        times = [result.time_split_ms.get(phase, 0.0) for result in timed]
        axes.barh(range(len(timed)), times, left=ends, color=color(number), label=phase)
        ends = [end + time for end, time in zip(ends, times, strict=True)]
    axes.set_yticks(range(len(timed)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("milliseconds per token")
    legend_above(axes, len(_PHASES))
    return figure


def _speed_within_an_answer(record: Record) -> Figure | None:
    """Tokens per second along the longest answer of adaptive decoding, and what drafted at each step."""
    benched = [result for result in record.results if isinstance(result, Result)]
    steps = next((result.longest_answer[1:] for result in benched if len(result.longest_answer) > 1), ())  # after the prefill
    if not steps:
        return None
    figure, axes = new_figure(f"Speed within the longest answer of adaptive decoding, mean of {_WINDOW} steps")
    ends = list(accumulate(step.seconds for step in steps))
    speeds = []
    for place in range(len(steps)):
        window = steps[max(0, place - _WINDOW // 2) : place + _WINDOW // 2]
        speeds.append(sum(step.tokens for step in window) / sum(step.seconds for step in window))
    axes.plot(ends, speeds, color=GREY, linewidth=1, zorder=0)
    drafters = [step.drafter or _PLAIN for step in steps]
    for number, name in enumerate(sorted(set(drafters), key=lambda name: (name == _PLAIN, -drafters.count(name)))):
        own = [point for point, drafter in zip(zip(ends, speeds, strict=True), drafters, strict=True) if drafter == name]
        axes.scatter(*zip(*own, strict=True), s=14, color=GREY if name == _PLAIN else color(number), label=name)
    plain = next((result.time_per_token_ms.get("p50") for result in benched if result.strategy == "autoregressive"), None)
    if plain:
        axes.axhline(1000 / plain, linestyle="--", linewidth=1, color=GREY, label="autoregressive")
    axes.set(xlabel="seconds after the first token", ylabel="tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return figure


def _perplexity(record: Record) -> Figure | None:
    measured = [result for result in _exits(record) if result.perplexity is not None]
    line = [(result.exit_layer, result.perplexity) for result in measured if result.exit_layer is not None]
    if not line:
        return None
    figure, axes = new_figure("Perplexity of the reference by exit")
    axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=color(0), label="early exit")
    for full in (result for result in measured if result.exit_layer is None):
        axes.axhline(full.perplexity, linestyle="--", color=GREY, label="all layers")
    if min(value for _, value in line if value is not None) > 0:
        logarithmic(axes)
    axes.set(xlabel="exit layer", ylabel="perplexity (lower is better)")
    axes.legend(fontsize=7)
    return figure


def _prediction(record: Record) -> Figure | None:
    compared = [result for result in _exits(record) if result.predicted_speedup and result.speedup]
    if not compared:
        return None
    figure, axes = new_figure("Predicted and measured speedup")
    for number, (weights, exit_layer) in enumerate(sorted({_side(result) for result in compared})):
        own = [result for result in compared if _side(result) == (weights, exit_layer)]
        points = [(result.predicted_speedup, result.speedup) for result in own]
        name = f"{weights} exit {exit_layer}".strip()
        axes.scatter(*zip(*points, strict=True), marker="^", color=color(number), alpha=0.8, label=name)
    start = min(speedup for result in compared for speedup in (result.predicted_speedup, result.speedup) if speedup)
    axes.axline((start, start), slope=1, color=GREY, linewidth=1, zorder=0)
    axes.set(xlabel="predicted speedup", ylabel="measured speedup")
    axes.legend(fontsize=7)
    return figure


def _side(result: Result) -> tuple[str, int]:
    """What drafts: the weights of a low-bit copy, or nothing, and the exit."""
    return result.draft_weights or "", result.exit_layer or 0


def _exits(record: Record) -> list[Result]:
    """The results of a sweep; none for a benchmark, which has no predictions and no perplexity."""
    return [result for result in record.results if isinstance(result, Result)]


FIGURES: dict[str, Callable[[Record], Figure | None]] = {
    "scores_by_exit": scores_by_exit,
    "lower_scores_by_exit": lower_scores_by_exit,
    "pareto": pareto_figure,
    "acceptance_by_exit": _acceptance_by_exit,
    "acceptance_by_position": _acceptance_by_position,
    "perplexity": _perplexity,
    "prediction": _prediction,
    "speed_within_an_answer": _speed_within_an_answer,
    "time_split": _time_split,  # last, because it can be tall
}
