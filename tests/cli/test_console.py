"""Progress for people, where what is left of a resumed run is judged by its own speed."""

from cli import console


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
