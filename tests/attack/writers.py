"""Two commands write to one output at once. One whole result must remain, and a refused command must say why in one line."""

import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .campaign import Case
from .command import Command, run, start
from .material import Material
from .outcome import Miss, misses_of
from .snapshot import Snapshot, snapshot

CASES, SHORT = 60, (4, 9)
_PAIRS = (
    *(("import", "import other"), ("import", "import other"), ("import", "import"), ("finetune", "finetune other")),
    *(("bench", "bench"), ("import", "finetune"), ("sweep --save", "sweep --save"), ("sweep --save", "import")),
    *(("calibrate", "import"), ("finetune --frozen", "import"), ("finetune --frozen beside", "sweep --save")),
)


def _flags(name: str, material: Material) -> tuple[str, ...]:
    train = material.training_flags(2)
    return {
        "import": ("import", str(material.model("llama")), "--output", "out", "--overwrite"),
        "import other": ("import", str(material.model("qwen2")), "--output", "out", "--overwrite"),
        "finetune": (*train, "--output", "out", "--overwrite", "--seed", "1"),
        "finetune other": (*train, "--output", "out", "--overwrite", "--seed", "2"),
        "bench": (*material.bench_flags(), "--output", "out"),
        "calibrate": (*material.calibrate_flags(), "--output", "out", "--overwrite"),
        "finetune --frozen": (*material.frozen_flags(), "--output", "out", "--overwrite"),
        "finetune --frozen beside": (*material.frozen_flags("out"), "--output", "out"),
        "sweep --save": ("sweep-exits", "--model", "out", "--samples", "1", "--exits", "2", "--specs", "2", "--save"),
    }[name]


def attack(case: Case) -> Iterator[Miss]:
    """A pair of commands, the second a moment after the first."""
    pair = _PAIRS[case.number % len(_PAIRS)]
    home = _home(case.folder / "home", case.material)
    commands = [Command(_flags(name, case.material)) for name in pair]
    delay = case.random.choice((0.0, 0.0, case.random.random() * 0.05, case.random.random() * 0.6))
    case.say(f"{pair[0]} and, {delay:.3f} s later, {pair[1]}: {commands[0]} | {commands[1]}")
    first = start(commands[0], home, case.logs / "first")
    time.sleep(delay)
    second = start(commands[1], home, case.logs / "second")
    outcomes = [child.wait() for child in (first, second)]
    won = []
    for name, outcome in zip(pair, outcomes, strict=True):
        assert outcome is not None
        yield from (Miss(miss.kind, f"{name}: {miss.what}") for miss in misses_of(outcome))
        if outcome.status == 0:
            won.append(name)
    if not won:
        yield Miss("wrong", f"both failed: {' | '.join(outcome.tail for outcome in outcomes if outcome)}")
    yield from _judge(case, home, won)


def _judge(case: Case, home: Path, won: list[str]) -> Iterator[Miss]:
    """The output must be what one of the successful commands writes, and must be usable."""
    found = snapshot(home / "out")
    writers = [name for name in won if name.startswith(("import", "finetune", "calibrate")) and not name.endswith("beside")]
    if writers:
        expected = {name: _alone(name, case.material) for name in writers}
        if not any(_weights(found) == _weights(files) for files in expected.values()):
            missing = "model.safetensors" not in found
            yield Miss("lost" if missing else "mixed", f"{writers} succeeded, but out holds {sorted(found)}")
    if "bench" in won:
        saved = run(Command(("bench", "--from", "out/results.json")), home, case.logs)
        lines = (home / "out" / "outputs.jsonl").read_text().splitlines() if (home / "out" / "outputs.jsonl").exists() else []
        if saved.status or len(lines) != len((case.material.bench / "outputs.jsonl").read_text().splitlines()):
            yield Miss("mixed", f"the results of bench are not whole: {len(lines)} lines of outputs; {saved.tail}")
        return
    used = run(Command(("generate", "--model", "out", "--max-new-tokens", "4"), b"call mom"), home, case.logs)
    if used.status:
        yield Miss("lost", f"the model there does not answer; {used.tail}")
    if rubbish := [path for path in found if ".writing" in path or ".staging" in path]:
        yield Miss("wrong", f"left over: {rubbish}")
    again = run(Command(_flags("import", case.material)), home, case.logs)
    if again.status:
        yield Miss("wrong", f"the next import fails; {again.tail}")


def _weights(files: Snapshot) -> Snapshot:
    """The files of the model that are identical in identical runs."""
    return {path: kind for path, kind in files.items() if path.endswith((".safetensors", "config.json")) and "/" not in path}


@cache
def _alone(name: str, material: Material) -> Snapshot:
    """The result of a command that runs alone."""
    folder = material.root / f"alone-{name.replace(' ', '-')}-{time.monotonic_ns()}"
    logs = folder / "logs"
    logs.mkdir(parents=True)
    home = _home(folder / "home", material)
    outcome = run(Command(_flags(name, material)), home, logs)
    assert outcome.status == 0, outcome
    found = snapshot(home / "out")
    shutil.rmtree(folder)
    return found


def _home(home: Path, material: Material) -> Path:
    """With a third model in the output folder."""
    home.mkdir()
    shutil.copytree(material.model("smollm3"), home / "out")
    return home
