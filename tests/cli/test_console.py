"""Progress in a terminal, and the number of CPU threads of a model; those beside other processes:
test_threads.py.
"""

from types import SimpleNamespace

import torch

from cli import console, loading


def test_time_left_counts_from_where_a_run_began(monkeypatch, capsys):
    now = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.stage_bars() as show:
        show("training", 801, 840, "a")
        show("training", 811, 840, "b")  # 10 steps in 10 s, 29 to go
        show("training", 821, 840, "c")
    assert capsys.readouterr().err.splitlines() == [
        "training 811/840 b 29 s left",
        "training 821/840 c 19 s left",
    ]
    now = iter([0.0, 10.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.stage_bars() as show:
        show("answers", 0, 64, "")
        show("answers", 32, 64, "")
    assert capsys.readouterr().err.splitlines() == ["answers 0/64", "answers 32/64 10 s left"]


def test_a_small_model_decodes_with_one_thread_unless_told_otherwise():
    def loaded(width, device="cpu"):
        return SimpleNamespace(
            backend=SimpleNamespace(spec=SimpleNamespace(hidden=width), device=torch.device(device))
        )

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
