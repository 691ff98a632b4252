"""Commands that write to one folder: killed before one of their changes to the disk, or two at
once.

Nothing may be lost, a refused command must say why in one line, and a command given again must end
well.
"""

import os
import shutil
import signal
import time
from dataclasses import dataclass
from functools import cache
from itertools import count

import pytest
from attacking import contents, examples, require_sound
from hypothesis import given
from hypothesis import strategies as st

RESUME = "--resume"
OVERWRITE = "--overwrite"
FEW = "--batch-size 2 --max-length 48 --samples 4 --steps 2 --save-steps 1 --dtype fp32"
FROZEN = f"train-drafter --exits 2 --answer-tokens 4 {FEW} --model out --output out"
CALIBRATE = "calibrate --samples 2 --model out"
BENCH = """bench --model NEW --samples 2 --repeats 1 --max-new-tokens 4 --output out
    --strategies autoregressive,early-exit"""
SWEEP = "sweep-exits --model out --samples 1 --exits 2 --specs 2 --save"
IMPORT = "import NEW --output out --overwrite"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
BLOCKS = "exit_blocks.safetensors"
INT4 = "int4.safetensors"


@dataclass(frozen=True)
class Scenario:
    """A command that writes to `out`; NEW, OLD and WIDE in it are paths of models.

    `over`: the name of the model that is there before. `again`: flags of which the command's error
    may ask for one when it is given again. `checked`: files that are as an undisturbed run writes
    them in the end. `kept`: files that never change. `ask`: how the model is used.
    """

    command: str
    over: str | None = "WIDE"
    again: tuple[str, ...] = ("", OVERWRITE)
    checked: tuple[str, ...] = (WEIGHTS,)
    kept: tuple[str, ...] = ()
    ask: str = ""


KEPT = (WEIGHTS, CONFIG)
ALL = (RESUME, "", OVERWRITE)
KILLED = {
    "import over a model": Scenario(IMPORT),
    "finetune over a model": Scenario(
        f"finetune --model NEW {FEW} --output out --overwrite", again=ALL
    ),
    "bench": Scenario(BENCH, over=None, again=ALL, checked=()),
    "sweep --save": Scenario(SWEEP, kept=KEPT),
    "calibrate beside a model": Scenario(
        CALIBRATE, checked=(WEIGHTS, INT4), kept=KEPT, ask="--quantize int4"
    ),
    "frozen beside a model": Scenario(
        FROZEN, again=ALL, checked=(WEIGHTS, BLOCKS), kept=KEPT, ask="--exit 2"
    ),
}
WRITERS = {  # `checked`: those that replace the model
    "import": Scenario(IMPORT, "OLD"),
    "import another": Scenario("import OLD --output out --overwrite", "OLD"),
    "calibrate": Scenario(CALIBRATE, checked=()),
    "frozen beside": Scenario(FROZEN, "OLD", checked=()),
    "sweep": Scenario(SWEEP, "OLD", checked=()),
}
PAIRS = [
    ("import", "import another"), ("calibrate", "import"), ("sweep", "sweep"), ("sweep", "import"), ("frozen beside", "sweep"),
]  # fmt: skip


class World:
    """Folders in which a scenario's command runs, and how it ends where nobody disturbs it."""

    def __init__(self, forks, root, models):
        self.forks = forks
        self._root = root
        self._models = models
        self._numbers = count()
        self.undisturbed = cache(self._undisturbed)

    def home(self, scenario):
        home = self._root / str(next(self._numbers)) / "home"
        home.mkdir(parents=True)
        if scenario.over:
            shutil.copytree(self._models[scenario.over], home / "out")
        return home

    def start(self, home, scenario, more="", strike=(0, 0)):
        command = [self._models.get(word, word) for word in scenario.command.split()]
        return self.forks.start(home, *command, *more.split(), strike=strike)

    def run(self, home, scenario, more="", **keywords):
        return self.forks.wait(home, self.start(home, scenario, more, **keywords))

    def ask(self, home, scenario):
        command = f"generate --model out --max-new-tokens 8 {scenario.ask}"
        return self.forks.run(home, command, stdin="remind me to call mom")

    def _undisturbed(self, scenario):
        """The number of changes to the disk, the files before and after, and the answers before and
        after.
        """
        home = self.home(scenario)
        old = self.ask(home, scenario).out if scenario.over else None
        before = contents(home / "out") if scenario.over else {}
        process = self.start(home, scenario)
        ended = self.forks.wait(home, process)
        assert ended.code == 0, ended.err
        answers = {old, self.ask(home, scenario).out if scenario.checked else None}
        return self.forks.changes(home, process), before, contents(home / "out"), answers


@pytest.fixture(scope="module")
def world(forks, tmp_path_factory, wide_base, base, checkpoint):
    return World(
        forks,
        tmp_path_factory.mktemp("outputs"),
        {"NEW": base, "OLD": checkpoint, "WIDE": wide_base},
    )


def of(files, names):
    return {name: files.get(name) for name in names}


def model_in(files):
    """The files of a model that are identical in identical runs."""
    return {
        path: found
        for path, found in files.items()
        if path.endswith((".safetensors", CONFIG)) and "/" not in path
    }


def lasting(files):
    """The files of a result: not locks, nor what a run resumes from, nor half a file, which goes
    when it is old.
    """
    passing = (".lock", ".layerskip-writing-", f"checkpoints{os.sep}")
    return {path for path in files if not path.endswith(".lock") and not path.startswith(passing)}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
@examples(2)
@given(data=st.data())
def test_a_killed_command_loses_nothing_and_can_be_given_again(name, world, data):
    scenario = KILLED[name]
    changes, before, finished, answers = world.undisturbed(scenario)
    # The first example is the last change
    moment = data.draw(st.integers(1, changes).map(lambda drawn: changes + 1 - drawn))
    number = data.draw(st.sampled_from([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    home = world.home(scenario)
    out = home / "out"
    killed = world.run(home, scenario, strike=(moment, number))
    assert killed.code in (0, -number, 128 + number), killed
    assert killed.code == -number or "Traceback" not in killed.err
    if scenario.checked and (scenario.over or (out / CONFIG).exists()):
        used = world.ask(home, scenario)
        assert used.code == 0 and used.out in answers, used
    assert of(contents(out), scenario.kept) == of(before, scenario.kept)
    for more in scenario.again:
        again = world.run(home, scenario, more)
        require_sound(again)
        if again.code == 0:
            break
    if again.code and killed.code == 0:
        return  # it was complete, and there is nothing to resume
    assert again.code == 0, again.err
    after = contents(out)
    assert of(after, scenario.checked) == of(finished, scenario.checked)
    assert lasting(after) == lasting(finished)
    shutil.rmtree(home.parent)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@examples(1)
@given(delay=st.sampled_from([0.1, 0.0, 0.3]) | st.floats(0, 0.6))
def test_one_of_two_writers_leaves_a_whole_result(pair, world, delay):
    first, second = (WRITERS[name] for name in pair)
    home = world.home(first)
    processes = [world.start(home, first)]
    time.sleep(delay)
    processes.append(world.start(home, second))
    ended = [world.forks.wait(home, process) for process in processes]
    for one in ended:
        require_sound(one)
    done = [writer for writer, one in zip((first, second), ended, strict=True) if one.code == 0]
    assert done, ended
    files = contents(home / "out")
    whole = [model_in(world.undisturbed(writer)[2]) for writer in done if writer.checked]
    assert not whole or model_in(files) in whole
    assert not [path for path in files if ".writing" in path or ".staging" in path]
    used = world.ask(home, first)
    assert used.code == 0, used.err
    again = world.run(home, WRITERS["import"])
    assert again.code == 0, again.err
    shutil.rmtree(home.parent)
