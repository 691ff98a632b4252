"""CPU threads beside other processes: measured loads, and a real busy process."""

import os
import subprocess
import sys
import time
from typing import NamedTuple

import psutil
import pytest
import torch
from command_line import run

from cli import evaluation, loading
from layerskip_core import processor
from layerskip_core.evaluation.measure.measuring import Progress


@pytest.fixture(autouse=True)
def threads():
    """Torch's threads are four, and afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Loads:
    """Gives these measured loads, each over `seconds`; the last one again and again."""

    def __init__(self, *cores, seconds=1.0):
        self.seconds = seconds
        self._cores = list(cores)

    def busy_cores(self):
        return self._cores.pop(0) if len(self._cores) > 1 else self._cores[0]


def free_threads(monkeypatch, *loads, given=0, cores=4, seconds=1.0):
    monkeypatch.setattr(processor, "usable_cores", lambda: list(range(cores)))
    monkeypatch.setattr(processor, "OtherLoad", lambda: Loads(*loads, seconds=seconds))
    monkeypatch.setattr(loading.time, "sleep", lambda seconds: None)
    return loading.FreeThreads(given)


@pytest.mark.parametrize(
    "given, busy, cores, expected",
    [
        (0, 0.3, 4, 4),
        (0, 0.5, 4, 3),
        (0, 1.3, 4, 3),
        (0, 1.5, 4, 2),
        (0, 9.0, 4, 1),
        (3, 1.4, 4, 3),
        (0, 3.0, 8, 4),
        (0, 5.0, 8, 3),
    ],
)
def test_work_leaves_busy_cores_to_others_and_says_so(
    monkeypatch, capsys, given, busy, cores, expected
):
    """Of eight cores three busy ones leave enough for four threads."""
    free_threads(monkeypatch, busy, given=given, cores=cores).start()
    assert torch.get_num_threads() == expected
    said = capsys.readouterr().err
    assert (
        f"{expected} of 4 CPU threads, because other processes keep {cores - expected}" in said
    ) == (not given and expected < 4)


@pytest.mark.parametrize(
    "loads, chosen",
    [
        # A process begins: it shares a core first, then has it alone
        ([0, 0, 0.5, 1, 1, 1, 1], [4, 4, 3, 3, 3, 3, 3]),
        ([1, 0, 0, 0, 0], [3, 3, 3, 4, 4]),  # it ends: three quiet seconds
        ([1, 0, 0, 1, 0, 0, 0], [3, 3, 3, 3, 3, 3, 4]),  # a pause is no end
        ([0.45, 0.35, 0.35, 0.35, 0.35], [3, 3, 3, 3, 3]),  # neither up nor down near a bound
        ([2, 1, 1, 1, 0, 0, 0], [2, 2, 2, 3, 3, 3, 4]),
    ],
)
def test_threads_follow_the_load_between_steps_but_not_every_change(monkeypatch, loads, chosen):
    free = free_threads(monkeypatch, *loads)
    found = []
    for _ in loads:
        free.look()
        found.append(torch.get_num_threads())
    assert found == chosen


def test_a_long_quiet_step_is_enough(monkeypatch):
    free = free_threads(monkeypatch, 1, 0, seconds=5.0)
    free.look()
    assert torch.get_num_threads() == 3
    free.look()
    assert torch.get_num_threads() == 4


def test_short_steps_and_given_threads_are_not_looked_at(monkeypatch):
    for free in (free_threads(monkeypatch, 4, seconds=0.5), free_threads(monkeypatch, 4, given=4)):
        free.look()
        assert torch.get_num_threads() == 4


def spinning(core):
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(process.pid, {core})
    return process


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores"
)
def test_a_real_busy_process_takes_a_thread_away(monkeypatch):
    """Of two cores; whatever else runs there, one thread is left."""
    cores = processor.usable_cores()[:2]
    if len(cores) < 2:
        pytest.skip("there is one core only")
    monkeypatch.setattr(processor, "usable_cores", lambda: cores)
    torch.set_num_threads(2)
    process = spinning(cores[0])
    try:
        free = loading.FreeThreads()
        time.sleep(loading._BETWEEN_LOOKS)
        free.look()
        assert torch.get_num_threads() == 1
    finally:
        process.kill()
        process.wait()


class Times(NamedTuple):
    user: float
    nice: float
    system: float


@pytest.mark.parametrize("is_nice, busy", [(False, (80 - 20) / 40), (True, (80 + 40 - 20) / 40)])
def test_busy_cores_are_those_that_this_process_may_use_without_its_own_share(
    monkeypatch, is_nice, busy
):
    """Cores 0 and 2 are busy for 10 + 30 of 40 seconds each, 20 of them by this process. Niced
    processes, 40 seconds on core 0, give way, but not to one that is niced itself.
    """
    clock = iter([0.0, 40.0])
    own = iter([5.0, 25.0])
    cores = iter([[Times(0, 0, 0)] * 3, [Times(10, 40, 30), Times(99, 0, 0), Times(30, 0, 10)]])
    monkeypatch.setattr(processor, "usable_cores", lambda: [0, 2])
    monkeypatch.setattr(processor.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: next(cores))
    monkeypatch.setattr(os, "times", lambda: os.times_result((next(own), 0, 0, 0, 0)))
    monkeypatch.setattr(processor, "_is_nice", lambda: is_nice)
    assert processor.OtherLoad().busy_cores() == pytest.approx(busy)


def test_a_training_looks_again_between_its_steps(monkeypatch, base):
    """A process begins to work after the first look."""
    monkeypatch.setattr(processor, "usable_cores", lambda: list(range(4)))
    monkeypatch.setattr(processor, "OtherLoad", lambda: Loads(0, 1))
    data = "--samples 8 --steps 2 --batch-size 2 --max-length 64 --dtype fp32"
    result = run(f"finetune --model {base}", data, "--device cpu --recipe none --output out")
    assert result.code == 0, result.err
    assert (
        "3 of 4 CPU threads, because other processes keep 1 core busy; --threads sets another number"
        in result.err
    )
    assert torch.get_num_threads() == 3


def test_threads_change_only_between_whole_turns_of_a_measurement(monkeypatch):
    """Not while times are taken that are compared."""
    looked = list[int]()
    free = free_threads(monkeypatch, 0)
    monkeypatch.setattr(free, "look", lambda: looked.append(1))
    events = [
        Progress(1, 2, "prediction", comparing=True),
        Progress(2, 2, "prediction", comparing=True),
        Progress(1, 1, "prompts"),
    ]

    def measurement():
        yield from events
        return "record"

    assert evaluation.watch(measurement(), free) == "record"
    assert len(looked) == 1
