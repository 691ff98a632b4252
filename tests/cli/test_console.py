"""What people see in a terminal: progress and pictures; and the number of CPU threads."""

import os
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest
import torch

from cli import console, loading
from cli.commands.sweep_exits import front
from layerskip_core.evaluation.report.tables import points_of
from layerskip_core.evaluation.results import Result, RunRecord


def test_time_left_counts_from_where_a_run_began(monkeypatch, capsys):
    now = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.stage_bars() as show:
        show("training", 801, 840, "a")
        show("training", 811, 840, "b")  # 10 steps in 10 s, 29 to go
        show("training", 821, 840, "c")
    assert capsys.readouterr().err.splitlines() == ["training 811/840 b 29 s left", "training 821/840 c 19 s left"]


def test_the_first_report_may_come_before_anything_is_done(monkeypatch, capsys):
    now = iter([0.0, 10.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.stage_bars() as show:
        show("answers", 0, 64, "")
        show("answers", 32, 64, "")
    assert capsys.readouterr().err.splitlines() == ["answers 32/64 10 s left"]


def test_a_small_model_decodes_with_one_thread_unless_told_otherwise():
    def loaded(width, device="cpu"):
        return SimpleNamespace(backend=SimpleNamespace(spec=SimpleNamespace(hidden=width), device=torch.device(device)))

    before = torch.get_num_threads()
    try:
        for given, model, expected in [
            (0, None, 3),
            (0, loaded(576), 3),
            (0, loaded(160, "meta"), 3),
            (0, loaded(160), 1),
            (2, loaded(160), 2),
            (2, None, 2),
        ]:
            torch.set_num_threads(3)
            loading.use_threads(given, model)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "busy", "expected"), [(0, 0.3, 3), (0, 1.4, 2), (0, 5.0, 1), (3, 1.4, 3)])
def test_training_leaves_busy_cores_to_others_and_says_so(monkeypatch, capsys, given, busy, expected):
    before = torch.get_num_threads()
    monkeypatch.setattr(loading, "busy_cores", lambda: busy)
    try:
        torch.set_num_threads(3)
        loading.use_free_threads(given)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    said = capsys.readouterr().err
    assert (f"{expected} of 3 CPU threads" in said) == (expected < 3)


def test_busy_cores_are_those_that_this_process_may_use(monkeypatch):
    class Times(NamedTuple):
        user: float
        nice: float
        system: float

    monkeypatch.setattr(psutil, "cpu_times_percent", lambda *_, percpu: [Times(60, 9, 10), Times(90, 0, 9), Times(5, 80, 25)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert loading.busy_cores() == pytest.approx(1.0)


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
