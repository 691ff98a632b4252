"""Two commands write to one output at once. One whole result must remain, and a refused command must say why in one line."""

import shutil
import time
from functools import cache
from itertools import count

import pytest
from attacking import contents, examples, require_sound
from hypothesis import given
from hypothesis import strategies as st

FROZEN = ("finetune", "--frozen", "--exits", "2", "--steps", "1", "--batch-size", "2", "--samples", "4", "--answer-tokens", "4")
CALIBRATE = ("calibrate", "--samples", "2", "--length", "8", "--steps", "1")
SWEEP = ("sweep-exits", "--model", "out", "--samples", "1", "--exits", "2", "--specs", "2", "--save")
COMMANDS = {
    "import": ("import", "NEW", "--output", "out", "--overwrite"),
    "import another": ("import", "OLD", "--output", "out", "--overwrite"),
    "calibrate": (
        *("calibrate", "--samples", "2", "--length", "8", "--steps", "1"),
        "--model",
        "WIDE",
        "--output",
        "out",
        "--overwrite",
    ),
    "frozen beside": (*FROZEN, "--model", "out", "--output", "out"),
    "sweep": SWEEP,
}
PAIRS = [
    ("import", "import another"), ("calibrate", "import"), ("sweep", "sweep"), ("sweep", "import"),
    ("frozen beside", "sweep"),
]  # fmt: skip
WHOLE = ("import", "import another", "calibrate")  # commands that replace the model


@pytest.fixture(scope="module")
def world(forks, tmp_path_factory, base, checkpoint, wide_base):
    """Starts one of COMMANDS where `out` is a third model; gives what it writes alone."""
    root, numbers = tmp_path_factory.mktemp("writers"), count()
    models = {"NEW": base, "OLD": checkpoint, "WIDE": wide_base}

    def home():
        made = root / str(next(numbers)) / "home"
        made.mkdir(parents=True)
        shutil.copytree(checkpoint, made / "out")
        return made

    def start(folder, name):
        return forks.start(folder, *(models.get(part, part) for part in COMMANDS[name]))

    @cache
    def result(name):
        folder = home()
        ended = forks.wait(folder, start(folder, name))
        assert ended.code == 0, ended.err
        return weights(contents(folder / "out"))

    return home, start, result


def weights(files):
    """The files of a model that are identical in identical runs."""
    return {path: found for path, found in files.items() if path.endswith((".safetensors", "config.json")) and "/" not in path}


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@examples(1)
@given(delay=st.sampled_from([0.1, 0.0, 0.3]) | st.floats(0, 0.6))
def test_one_of_two_writers_leaves_a_whole_result(pair, forks, world, delay):
    home, start, result = world
    folder = home()
    first = start(folder, pair[0])
    time.sleep(delay)
    second = start(folder, pair[1])
    ended = [forks.wait(folder, pid) for pid in (first, second)]
    for one in ended:
        require_sound(one)
    done = [name for name, one in zip(pair, ended, strict=True) if one.code == 0]
    assert done, ended
    files = contents(folder / "out")
    whole = [name for name in done if name in WHOLE]
    assert not whole or weights(files) in [result(name) for name in whole]
    assert not [path for path in files if ".writing" in path or ".staging" in path]
    used = forks.run(folder, "generate", "--model", "out", "--max-new-tokens", "4", stdin="call mom")
    assert used.code == 0, used.err
    again = forks.wait(folder, start(folder, "import"))
    assert again.code == 0, again.err
    shutil.rmtree(folder.parent)
