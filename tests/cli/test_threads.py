"""The number of CPU threads."""

import os
from types import SimpleNamespace

import pytest
import torch

from cli import threads


def test_a_small_model_decodes_with_one_thread_unless_told_otherwise():
    def loaded(width, device="cpu"):
        return SimpleNamespace(backend=SimpleNamespace(hidden_size=width, device=torch.device(device)))

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
            threads.use_threads(given, model)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "busy", "expected"), [(0, 0.3, 3), (0, 1.4, 2), (0, 5.0, 1), (3, 1.4, 3)])
def test_training_leaves_busy_cores_to_others_and_says_so(monkeypatch, capsys, given, busy, expected):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "busy_cores", lambda: busy)
    try:
        torch.set_num_threads(3)
        threads.use_free_threads(given)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    said = capsys.readouterr().err
    assert (f"{expected} of 3 CPU threads" in said) == (expected < 3)


def test_busy_cores_are_those_of_this_process(monkeypatch, tmp_path):
    """Each reading of the time adds 50 ticks of user time to core 0, 30 of a niced process, and 90 to core 1."""
    core, other = min(os.sched_getaffinity(0)), 10_000
    clock = iter(range(100))

    def read(*_, **__):
        n = next(clock)
        return f"cpu 0 0 0 0 0 0 0\ncpu{core} {50 * n} {30 * n} 0 7 9 0 0 0\ncpu{other} {90 * n} 0 0 0 0 0 0 0\nintr 5\n"

    monkeypatch.setattr(threads, "_STAT", SimpleNamespace(exists=lambda: True, read_text=read))
    monkeypatch.setattr(threads, "_INTERVAL", 0.0)
    moments = iter([10.0, 11.0])
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(moments))
    assert threads.busy_cores() == pytest.approx(50 / os.sysconf("SC_CLK_TCK"))
    monkeypatch.setattr(threads, "_STAT", tmp_path / "none")
    assert threads.busy_cores() == 0
