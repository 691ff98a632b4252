"""--from renders the results.json of sweeps and benchmarks again, and refuses anything else with one line."""

import json

import pytest
from command_line import run

from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.results import read_record

SHORT = ("--samples", "2", "--max-new-tokens", "6", "--threads", "1")
COMMANDS = {
    "sweep-exits": ("--exits", "2,4", "--specs", "2,3"),
    "bench": ("--repeats", "1", "--baselines", "no-reuse"),
}


@pytest.fixture(scope="module", params=COMMANDS)
def saved(request, checkpoint, tmp_path_factory):
    """A command, the folder of its report, and its table."""
    folder = tmp_path_factory.mktemp(request.param)
    arguments = ("--model", checkpoint, *SHORT, *COMMANDS[request.param], "--format", "markdown", "--output", str(folder))
    result = run(request.param, *arguments)
    assert result.code == 0, result.err
    return request.param, folder, result.out


def test_a_saved_record_gives_the_same_report(saved, tmp_path):
    command, folder, table = saved
    result = run(command, "--from", str(folder / "results.json"), "--format", "markdown", "--output", str(tmp_path))
    assert (result.code, result.out) == (0, table), result.err
    for name in ("results.json", "results.csv", "answers.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("change", [{"speedup": "fast"}, {"draft_weights": "int3"}])
def test_a_damaged_record_is_one_error(saved, tmp_path, change):
    command, folder, _ = saved
    document = json.loads((folder / "results.json").read_text())
    document["results"][0].update(change)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(document))
    with pytest.raises(LayerSkipError, match=f"`saved` {file} must be a results.json that {command} wrote: "):
        read_record(str(file), command)


def test_a_record_of_the_other_command_is_refused(saved):
    command, folder, _ = saved
    other = next(name for name in COMMANDS if name != command)
    result = run(other, "--from", str(folder / "results.json"))
    assert result.code == 1 and f"must be a results.json that {other} wrote" in result.err
    assert read_record(str(folder / "results.json")).results
