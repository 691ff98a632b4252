"""Kills commands before each of their changes to the disk, or at a random moment. Nothing may be lost.

An audit hook counts the changes that a command makes to files. So kills happen at the moments that matter, and can be repeated.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .campaign import Case
from .command import Command, run, start
from .material import Material
from .outcome import Miss, Outcome, misses_of
from .snapshot import Snapshot, snapshot

CASES, SHORT = 300, (1, 3, 6, 7)
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_PROMPT = b"remind me to call mom"


@dataclass(frozen=True)
class Scenario:
    """A command that writes to `out`, and the state of the folder before it."""

    name: str
    flags: Callable[[Material], tuple[str, ...]]
    old: Callable[[Material], Path | None]  # the folder that is copied to `out` first
    again: tuple[str, ...] = ()  # added to the command when it is repeated after the kill
    checked: tuple[str, ...] = ("model.safetensors",)  # files that must be old or new, and new after the second run
    asked: tuple[str, ...] = ()  # with which flags the model is used
    kept: tuple[str, ...] = ()  # files of the old model that must be there unchanged at all times
    frozen: bool = False  # `finetune --frozen`: leaves no checkpoints, and is repeated with the flags that its errors ask for


def _import(material: Material) -> tuple[str, ...]:
    return ("import", str(material.model("qwen2")), "--output", "out")


SCENARIOS = (
    Scenario("import over a model", lambda m: (*_import(m), "--overwrite"), lambda m: m.model("llama")),
    Scenario("import over a model in shards", lambda m: (*_import(m), "--overwrite"), lambda m: m.model("sharded")),
    Scenario("import into nothing", _import, lambda _: None, ("--overwrite",)),
    Scenario(
        "finetune over a model",
        lambda m: (*m.training_flags(2), "--output", "out", "--overwrite", "--seed", "5"),
        lambda m: m.model("smollm3"),
        ("--resume",),
    ),
    Scenario("bench", lambda m: (*m.bench_flags(), "--output", "out"), lambda _: None, ("--resume",), ()),
    Scenario(
        "sweep --save",
        lambda m: ("sweep-exits", "--model", "out", "--samples", "1", "--exits", "2", "--specs", "2", "--save"),
        lambda m: m.model("llama"),
        (),
        ("model.safetensors",),
    ),
    Scenario(
        "calibrate beside a model",
        lambda m: (*m.calibrate_flags("out"), "--seed", "5"),
        lambda m: m.model("measured"),
        (),
        ("model.safetensors", "int4.safetensors"),
        ("--quantize", "int4"),
        ("model.safetensors", "config.json"),
    ),
    Scenario(
        "calibrate into nothing",
        lambda m: (*m.calibrate_flags(), "--output", "out"),
        lambda _: None,
        ("--overwrite",),
        ("model.safetensors", "int4.safetensors"),
        ("--quantize", "int4"),
    ),
    Scenario(
        "finetune --frozen beside a model",
        lambda m: (*m.frozen_flags("out"), "--output", "out"),
        lambda m: m.model("measured"),
        checked=("model.safetensors", "exit_blocks.safetensors"),
        asked=("--exit", "2"),
        kept=("model.safetensors", "config.json"),
        frozen=True,
    ),
    Scenario(
        "finetune --frozen into nothing",
        lambda m: (*m.frozen_flags(), "--exits", "1,3", "--feature", "final", "--steps", "1", "--output", "out"),
        lambda _: None,
        checked=("model.safetensors", "exit_blocks.safetensors"),
        asked=("--exit", "3"),
        frozen=True,
    ),
    Scenario(
        "finetune --frozen over a model",
        lambda m: (*m.frozen_flags(), "--output", "out", "--overwrite", "--answer-temperature", "1"),
        lambda m: m.model("blocks"),
        checked=("model.safetensors", "exit_blocks.safetensors"),
        frozen=True,
    ),
)
_WEIGHTS = (5, 2, 2, 4, 2, 1, 2, 1, 4, 3, 2)


def attack(case: Case) -> Iterator[Miss]:
    """One kill, then what a user would do next: use the model, and repeat the command."""
    random = case.random
    scenario = random.choices(SCENARIOS, _WEIGHTS)[0]
    number = random.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), (8, 1, 1))[0]
    reference = _reference(scenario, case.material)
    moment = random.randint(1, reference.events) if random.random() < 0.8 else None
    home = _home(scenario, case.material, case.folder / "home")
    command = Command(scenario.flags(case.material))
    case.say(
        f"{scenario.name}: {number.name} at {f'event {moment} of {reference.events}' if moment else 'any moment'}: {command}"
    )
    child = start(command, home, case.logs, prepare=None if moment is None else lambda: _strike(home / "out", moment, number))
    if moment is None:
        child.wait(random.random() * 1.5)
        child.send(number)
    outcome = child.wait()
    assert outcome is not None
    if number != signal.SIGKILL:
        yield from (miss for miss in misses_of(outcome, interrupted=True) if miss.kind != "crash")
    yield from _afterwards(scenario, reference, home, case, outcome)


def _afterwards(scenario: Scenario, reference: "Reference", home: Path, case: Case, outcome: Outcome) -> Iterator[Miss]:
    out, logs = home / "out", case.logs
    ask = Command(("generate", "--model", "out", "--max-new-tokens", "8", *scenario.asked), _PROMPT)
    model_before = scenario.old(case.material) is not None
    if scenario.checked and (model_before or (out / "config.json").exists()):
        used = run(ask, home, logs)
        if used.status:
            yield Miss("lost", f"after the kill no model answers; {used.tail}")
        elif used.out not in (reference.old_answer, reference.new_answer):
            yield Miss("mixed", f"after the kill {used.out!r} is answered, neither {reference.old_answer!r} nor the new one's")
    now = snapshot(out)
    if changed := [name for name in scenario.kept if now.get(name) != reference.old[name]]:
        yield Miss("lost", f"after the kill {', '.join(changed)} of the old model changed")
    flags = scenario.flags(case.material)
    checkpoints = out / "checkpoints"
    goes_on = "--resume" not in scenario.again or scenario.name == "bench" or any(checkpoints.glob("checkpoint-*"))
    done = outcome.status == 0 or (scenario.checked and now == reference.new)
    if done and "--resume" in scenario.again and scenario.checked:
        return  # it was complete: there is nothing to resume
    again = run(Command((*flags, *(scenario.again if goes_on else ()))), home, logs)
    for flag in ("--resume", "--overwrite") if scenario.frozen else ():
        if again.status == 1 and f"give {flag}" in again.err:
            flags = (*flags, flag)
            again = run(Command(flags), home, logs)
    for miss in misses_of(again):
        yield Miss(miss.kind, f"given again: {miss.what}")
    if again.status:
        yield Miss("wrong", f"the repeated command fails; {again.tail}")
        return
    after = snapshot(out)
    for name in scenario.checked:
        if after.get(name) != reference.new.get(name):
            yield Miss("mixed", f"given again, {name} is not what an undisturbed run writes")
    expected, found = (_lasting(files, scenario) for files in (reference.new, after))
    if rubbish := sorted(found - expected):
        yield Miss("wrong", f"left over: {', '.join(rubbish)}")
    if missing := sorted(expected - found):
        yield Miss("lost", f"missing: {', '.join(missing)}")


def _lasting(found: Snapshot, scenario: Scenario) -> set[str]:
    """The files of a result, without lock files, which may stay, and without what a run resumes from."""
    ignored = (".lock",) if scenario.frozen else (".lock", "checkpoints")
    return {path for path in found if not path.startswith(ignored) and not path.endswith(".lock")}


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: its number of changes to the disk, its result, and the answers of the old and the new model."""

    events: int
    old: Snapshot
    new: Snapshot
    old_answer: str
    new_answer: str


@cache
def _reference(scenario: Scenario, material: Material) -> Reference:
    folder = material.root / f"reference-{os.getpid()}-{SCENARIOS.index(scenario)}"
    logs = folder / "logs"
    logs.mkdir(parents=True)
    home = _home(scenario, material, folder / "home")
    ask = Command(("generate", "--model", "out", "--max-new-tokens", "8", *scenario.asked), _PROMPT)
    old = run(ask, home, logs).out if scenario.old(material) is not None else ""
    before = snapshot(home / "out")
    count = logs / "count"
    count.write_bytes(b"")
    outcome = start(
        Command(scenario.flags(material)), home, logs, prepare=lambda: _strike(home / "out", -1, signal.SIGKILL, count)
    ).wait()
    assert outcome is not None and outcome.status == 0, outcome
    new = run(ask, home, logs).out if scenario.checked else ""
    found = Reference(count.stat().st_size, before, snapshot(home / "out"), old, new)
    shutil.rmtree(folder)
    return found


def _home(scenario: Scenario, material: Material, home: Path) -> Path:
    home.mkdir()
    old = scenario.old(material)
    if old is not None:
        shutil.copytree(old, home / "out")
    return home


def _strike(out: Path, moment: int, number: int, count: Path | None = None) -> None:
    """From now on, sends the signal at the given change to the disk at or below `out`. Writes a byte to `count` per change."""
    names = (str(out), out.name)
    counter = None if count is None else os.open(count, os.O_WRONLY | os.O_APPEND)
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in _EVENTS or (event == "open" and not _writes(arguments)):
            return
        paths = [os.fsdecode(one) for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)]
        inner = event in ("os.remove", "os.rmdir") and arguments[-1] not in (-1, None)  # relative to a descriptor of its folder
        if not inner and not any(path == name or path.startswith(f"{name}/") for path in paths for name in names):
            return
        seen += 1
        if counter is not None:
            os.write(counter, b".")
        if seen == moment:
            os.kill(os.getpid(), number)

    sys.addaudithook(watch)


def _writes(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
