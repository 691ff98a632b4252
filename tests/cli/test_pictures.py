"""Pictures in the terminal: where points lie."""

import pytest

from cli.commands.sweep_exits import front
from layerskip_core.evaluation.report.tables import points_of
from layerskip_core.evaluation.results import Result, RunRecord


def result(strategy, speed, metrics, exit_layer=None, drafts=None):
    return Result(strategy, exit_layer, drafts, metrics, tokens_per_second=speed, speedup=speed / 100, identical_outputs=1.0)


def record_of(*results, metric="exact_match"):
    return RunRecord({"quality_metric": metric}, {}, results)


def lines_of(record, width=60):
    return front(points_of(record), width).plain.splitlines()


def place(lines, marker):
    """The row and the column of a marker."""
    grid = [line.split("\N{BOX DRAWINGS LIGHT VERTICAL}", 1)[1] for line in lines[1:13]]
    (found,) = ((row, line.index(marker)) for row, line in enumerate(grid) if marker in line)
    return found


def test_better_is_higher_and_faster_is_further_right():
    lines = lines_of(
        record_of(
            result("autoregressive", 100.0, {"exact_match": 0.9}),
            result("self-speculative", 200.0, {"exact_match": 0.9}, 4, 6),
            result("early-exit", 300.0, {"exact_match": 0.5}, 8),
            result("early-exit", 150.0, {"exact_match": 0.4}, 2),
        )
    )
    assert lines[0] == "Quality: exact match (%)"
    assert max(map(len, lines)) == 60
    (plain, left), (first, faster), (second, fastest), (dominated, middle) = (
        place(lines, marker) for marker in "\N{BLACK SQUARE}12\N{WHITE CIRCLE}"
    )
    assert (plain, first, second, dominated) == (0, 0, 9, 11)
    assert left < middle < faster < fastest
    assert lines[-2:] == ["1 exit 4, 6 drafts: 2.00x, 90", "2 exit 8 alone: 3.00x, 50"]
    assert "100" in lines[14] and lines[14].endswith("300 tokens/s")


def test_perplexity_is_better_below_and_wide_ranges_are_logarithmic():
    lines = lines_of(
        record_of(
            result("autoregressive", 10.0, {"perplexity": 2.0}),
            result("early-exit", 100.0, {"perplexity": 200.0}, 4),
            result("early-exit", 1000.0, {"perplexity": 20000.0}, 2),
            metric="perplexity",
        )
    )
    assert lines[0] == "Quality: perplexity, lower is better"
    (bottom, right), (middle, between), (top, left) = (place(lines, rank) for rank in "321")
    assert top == 0 and bottom == 11 and middle in (5, 6)
    assert between - left == pytest.approx(right - between, abs=1)


def test_nothing_measured_has_no_picture():
    assert points_of(record_of(result("autoregressive", 10.0, {}))) is None


def test_one_point_is_drawn():
    assert lines_of(record_of(result("autoregressive", 100.0, {"exact_match": 1.0})))[-1] == "1 autoregressive: 1.00x, 100"
