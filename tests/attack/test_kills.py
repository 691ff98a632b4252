"""Commands killed before one of their changes to the disk. Nothing may be lost, and the command given again must end well."""

import os
import shutil
import signal
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import pytest
from attacking import contents, examples, require_sound
from forks import Forks
from hypothesis import given
from hypothesis import strategies as st

RESUME, OVERWRITE = ("--resume",), ("--overwrite",)
FEW = ("--batch-size", "2", "--max-length", "48", "--samples", "4", "--steps", "2", "--save-steps", "1", "--dtype", "fp32")
FROZEN = ("finetune", "--frozen", "--exits", "2", "--answer-tokens", "4", *FEW)
CALIBRATE = ("calibrate", "--samples", "2", "--length", "8", "--steps", "1")
BENCH = ("bench", "--model", "NEW", "--samples", "2", "--repeats", "1", "--max-new-tokens", "4", "--output", "out")
SWEEP = ("sweep-exits", "--model", "out", "--samples", "1", "--exits", "2", "--specs", "2", "--save")
WEIGHTS, BLOCKS, INT4 = "model.safetensors", "exit_blocks.safetensors", "int4.safetensors"


@dataclass(frozen=True)
class Scenario:
    """A command that writes to `out`; NEW in it is the path of a model.

    `over`: a model is there before. `again`: flags of which the command's error may ask for one when it is given again.
    `checked`: files that are as an undisturbed run writes them in the end. `kept`: files that never change. `ask`: how the
    model is used.
    """

    command: tuple[str, ...]
    over: bool = True
    again: tuple[tuple[str, ...], ...] = ((), OVERWRITE)
    checked: tuple[str, ...] = (WEIGHTS,)
    kept: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()


SCENARIOS = {
    "import over a model": Scenario(("import", "NEW", "--output", "out", "--overwrite")),
    "finetune over a model": Scenario(
        ("finetune", "--model", "NEW", *FEW, "--output", "out", "--overwrite"), again=(RESUME, (), OVERWRITE)
    ),
    "bench": Scenario(BENCH, over=False, again=(RESUME, ()), checked=()),
    "sweep --save": Scenario(SWEEP, kept=(WEIGHTS, "config.json")),
    "calibrate beside a model": Scenario(
        (*CALIBRATE, "--model", "out"), checked=(WEIGHTS, INT4), kept=(WEIGHTS, "config.json"), ask=("--quantize", "int4")
    ),
    "frozen beside a model": Scenario(
        (*FROZEN, "--model", "out", "--output", "out"), again=((), RESUME, OVERWRITE), checked=(WEIGHTS, BLOCKS),
        kept=(WEIGHTS, "config.json"), ask=("--exit", "2"),
    ),
}  # fmt: skip


class World:
    """Folders in which a scenario's command runs, and how it ends where nobody disturbs it."""

    def __init__(self, forks: Forks, root: Path, old: str, new: str) -> None:
        self.forks, self._root, self._old, self._new, self._numbers = forks, root, old, new, count()
        self.undisturbed = cache(self._undisturbed)

    def home(self, scenario: Scenario) -> Path:
        home = self._root / str(next(self._numbers)) / "home"
        home.mkdir(parents=True)
        if scenario.over:
            shutil.copytree(self._old, home / "out")
        return home

    def start(self, home, scenario, *more, strike=(0, 0)):
        command = [self._new if part == "NEW" else part for part in scenario.command]
        return self.forks.start(home, *command, *more, strike=strike)

    def ask(self, home, scenario):
        flags = ("--model", "out", "--max-new-tokens", "8", *scenario.ask)
        return self.forks.run(home, "generate", *flags, stdin="remind me to call mom")

    def _undisturbed(self, scenario):
        """The number of changes to the disk, the files, and the answers before and after."""
        home = self.home(scenario)
        old = self.ask(home, scenario).out if scenario.over else None
        before = contents(home / "out") if scenario.over else {}
        pid = self.start(home, scenario)
        ended = self.forks.wait(home, pid)
        assert ended.code == 0, ended.err
        answers = {old, self.ask(home, scenario).out if scenario.checked else None}
        return self.forks.changes(home, pid), before, contents(home / "out"), answers


@pytest.fixture(scope="module")
def world(forks, tmp_path_factory, wide_base, base):
    return World(forks, tmp_path_factory.mktemp("kills"), wide_base, base)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
@examples(2)
@given(data=st.data())
def test_a_killed_command_loses_nothing_and_can_be_given_again(name, world, data):
    scenario = SCENARIOS[name]
    changes, before, finished, answers = world.undisturbed(scenario)
    moment = data.draw(st.integers(1, changes).map(lambda drawn: changes + 1 - drawn))  # the first example is the last change
    number = data.draw(st.sampled_from([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    home = world.home(scenario)
    out = home / "out"
    killed = world.forks.wait(home, world.start(home, scenario, strike=(moment, number)))
    assert killed.code in (0, -number, 128 + number), killed
    assert killed.code == -number or "Traceback" not in killed.err
    if scenario.checked and (scenario.over or (out / "config.json").exists()):
        used = world.ask(home, scenario)
        assert used.code == 0 and used.out in answers, used
    now = contents(out)
    assert {file: now.get(file) for file in scenario.kept} == {file: before[file] for file in scenario.kept}
    for more in scenario.again:
        again = world.forks.wait(home, world.start(home, scenario, *more))
        require_sound(again)
        if again.code == 0:
            break
    if again.code and killed.code == 0:
        return  # it was complete, and there is nothing to resume
    assert again.code == 0, again.err
    after = contents(out)
    assert {file: after.get(file) for file in scenario.checked} == {file: finished.get(file) for file in scenario.checked}
    assert lasting(after) == lasting(finished)
    shutil.rmtree(home.parent)


def lasting(files):
    """The files of a result: not locks, nor what a run resumes from, nor half a file, which goes when it is old."""
    passing = (".lock", ".layerskip-writing-", f"checkpoints{os.sep}")
    return {path for path in files if not path.endswith(".lock") and not path.startswith(passing)}
