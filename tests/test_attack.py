"""A short campaign of tests/attack in a separate process, and tests of the parts that judge its results."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from attack.damage import spoil_bytes, spoil_json
from attack.forked import Child, Limits
from attack.outcome import Outcome, misses_of
from attack.snapshot import changes, snapshot

ROOT = Path(__file__).parents[1]
PARTS = ("commands", "checkpoints", "models", "kills", "writers", "programs", "decoding", "serve")


@pytest.fixture(scope="session")
def campaign(tmp_path_factory):
    """The report of the short campaign, by part."""
    report = tmp_path_factory.mktemp("attack") / "report.json"
    command = [sys.executable, "-m", "tests.attack", "--short", "--report", str(report)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert report.exists(), ended.stderr
    return {part["name"]: part for part in json.loads(report.read_text())["parts"]}


@pytest.mark.parametrize("part", PARTS)
def test_a_short_campaign_finds_nothing(campaign, part):
    assert campaign[part]["misses"] == []
    assert campaign[part]["cases"] > 0


@pytest.mark.parametrize(
    ("status", "out", "err", "kinds"),
    [
        (0, "answer", "reading\n", []),
        (0, "", "x\nTraceback (most recent call last):\n", ["traceback"]),
        (1, "", "error: ZeroDivisionError: division by zero; --debug shows where\n", ["traceback"]),
        (-11, "", "", ["crash"]),
        (-signal.SIGXCPU, "", "", ["hang"]),
        (1, "", "reading\nerror: --exit must be in 1..5, got 9\n", []),
        (1, "", "error: --exit must be in 1..5\nmore of it\n", ["wrong"]),
        (1, "", "error: one thing\nerror: another thing\n", ["wrong"]),
        (1, "", "", ["wrong"]),
        (1, "", "error: line 2: not valid JSON\nerror: line 4: not valid JSON\n", []),
        (1, '{"line": 2, "error": "line 2: not valid JSON"}\n', "", []),
        (2, "", "Usage: layerskip\n", []),
        (3, "", "", ["wrong"]),
        (0, "", "UserWarning: something\n", ["wrong"]),
    ],
)
def test_what_counts_as_a_miss(status, out, err, kinds):
    assert [miss.kind for miss in misses_of(Outcome(status, out, err))] == kinds


def test_memory_and_time_count_as_well():
    assert [miss.kind for miss in misses_of(Outcome(0, "", "", peak_mb=10_000))] == ["hang"]
    assert [miss.kind for miss in misses_of(Outcome(-9, "", "", timed_out=True))] == ["hang"]
    assert [miss.kind for miss in misses_of(Outcome(0, "x", ""), must_fail=True)] == ["wrong"]
    assert misses_of(Outcome(130, "", ""), interrupted=True) == []


@pytest.mark.parametrize(
    ("work", "status", "out"),
    [
        (lambda: os.write(1, b"said") and 7, 7, "said"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), -signal.SIGSEGV, ""),
        (lambda: bytearray(1 << 40) and 0, 70, ""),
    ],
)
def test_the_outcome_has_the_status_and_output_of_the_child(tmp_path, work, status, out):
    outcome = Child(work, tmp_path, Limits(), None, (-1, -1)).wait()
    assert (outcome.status, outcome.out, outcome.timed_out) == (status, out, False)


def test_a_child_that_does_not_end_is_killed(tmp_path):
    outcome = Child(lambda: signal.pause() or 0, tmp_path, Limits(wall_seconds=0.2), None, (-1, -1)).wait()
    assert (outcome.status, outcome.timed_out) == (-9, True)


def test_a_snapshot_reports_what_was_lost(tmp_path):
    (tmp_path / "kept").write_text("a")
    (tmp_path / "gone").write_text("b")
    (tmp_path / "changed").write_text("c")
    (tmp_path / "link").symlink_to("kept")
    before = snapshot(tmp_path)
    (tmp_path / "gone").unlink()
    (tmp_path / "changed").write_text("d")
    (tmp_path / "new").write_text("e")
    (tmp_path / "link").unlink()
    (tmp_path / "link").write_text("a")
    reported = changes(before, snapshot(tmp_path))
    assert sorted(line.split()[0] for line in reported) == ["changed", "gone", "link"]
    assert changes(before, snapshot(tmp_path), ("changed", "gone", "link")) == []


def test_damage_is_the_same_for_the_same_seed():
    text = json.dumps({"a": [1, {"b": "c"}], "d": None})
    assert [spoil_json(text, Random(seed)) for seed in range(50)] == [spoil_json(text, Random(seed)) for seed in range(50)]
    assert sum(spoil_bytes(b"some bytes", Random(seed)) != b"some bytes" for seed in range(50)) >= 45
