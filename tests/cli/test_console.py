"""Progress in a terminal, and the number of CPU threads."""

import os
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest
import torch

from cli import console, loading


def test_time_left_counts_from_where_a_run_began(monkeypatch, capsys):
    now = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.stage_bars() as show:
        show("training", 801, 840, "a")
        show("training", 811, 840, "b")  # 10 steps in 10 s, 29 to go
        show("training", 821, 840, "c")
    assert capsys.readouterr().err.splitlines() == ["training 811/840 b 29 s left", "training 821/840 c 19 s left"]
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
