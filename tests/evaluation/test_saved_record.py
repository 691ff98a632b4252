"""--from renders the results.json of sweeps and benchmarks, and refuses anything else with one line."""

import copy
import json
import random

import pytest
from command_line import run

from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.report.documents import to_csv, to_json
from layerskip_core.evaluation.report.files import report_files
from layerskip_core.evaluation.report.saved_record import read_record
from layerskip_core.evaluation.report.tables import bench_table, sweep_table
from layerskip_core.evaluation.results import BenchResult, ExitResult

SHORT = ("--samples", "2", "--max-new-tokens", "6", "--threads", "1")
COMMANDS = {
    "sweep-exits": (ExitResult, sweep_table, ("--exits", "2,4", "--specs", "2,3")),
    "bench": (BenchResult, bench_table, ("--repeats", "1", "--baselines", "no-reuse")),
}
NUMBERS = (0, -1, 3, 2**70, -1e9, 1e-320, 1e300, "1e999")
ODD = (None, True, *NUMBERS, "", "x", "$\\frac[/x]{prompt}", "\x00\n\x1b[1m", [], [1], {}, {"a": 1})
FORMATS = ("table", "json", "csv", "markdown")


@pytest.fixture(scope="module", params=COMMANDS)
def saved(request, checkpoint, tmp_path_factory):
    """A command and the document of its results.json."""
    folder = tmp_path_factory.mktemp(request.param)
    result = run(request.param, "--model", checkpoint, *SHORT, *COMMANDS[request.param][2], "--output", str(folder))
    assert result.code == 0, result.err
    return request.param, json.loads((folder / "results.json").read_text())


def places(value, path=()):
    """The path of every part of a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def mutant(document, chance):
    """A document with one to three parts replaced, removed, added or duplicated."""
    document = {"root": copy.deepcopy(document)}
    for _ in range(chance.randint(1, 3)):
        # The fields of results are chosen more often, because the rest of the document is longer.
        every = [path for path in places(document) if path]
        *above, key = chance.choice([path for path in every if "results" in path] or every if chance.random() < 0.6 else every)
        parent = document
        for step in above:
            parent = parent[step]
        kind = chance.random()
        if kind < 0.7:
            parent[key] = copy.deepcopy(chance.choice(ODD))
        elif kind < 0.8 and above:
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(chance.choice((*ODD, parent[key]))))
        elif above:
            parent[chance.choice(("new", "strategy", "exit_layer", "[x]"))] = copy.deepcopy(chance.choice((*ODD, parent[key])))
    return json.dumps(document["root"]).replace('"1e999"', "1e999")


def rendered(record, table):
    """Renders all formats except the page and the figures."""
    for text in (to_json(record), to_csv(record), table(record).markdown()):
        assert text
    assert table(record).column_blocks(80)


def test_mutants_are_refused_with_one_line_or_rendered(saved, tmp_path):
    command, document = saved
    kind, table, _ = COMMANDS[command]
    file, chance = tmp_path / "results.json", random.Random(f"{command} 15")
    fit = []
    for number in range(300):
        text = mutant(document, chance)
        file.write_text(text)
        try:
            record = read_record(str(file), kind)
        except LayerSkipError as error:
            assert str(error).startswith(f"`saved` {file}") and len(str(error).splitlines()) == 1, number
            continue
        fit.append(text)
        rendered(record, table)
    assert 10 < len(fit) < 280
    for text in fit[:: len(fit) // 3]:
        file.write_text(text)
        for form in FORMATS:
            assert run(command, "--from", str(file), "--format", form).code == 0, text
        assert run(command, "--from", str(file), "--output", str(tmp_path / "out")).code == 0, text


@pytest.mark.slow
def test_figures_of_mutants(saved, tmp_path):
    command, document = saved
    kind, table, _ = COMMANDS[command]
    file, chance = tmp_path / "results.json", random.Random(f"{command} figures")
    drawn = 0
    while drawn < 3:  # each takes seconds
        text = mutant(document, chance)
        file.write_text(text)
        try:
            record = read_record(str(file), kind)
        except LayerSkipError:
            continue
        drawn += 1
        assert report_files(record, table(record)), text


@pytest.mark.slow
@pytest.mark.parametrize(("figure", "every"), [(0.0, 1), (1.0, 1), (1e-300, 2), (1e12, 2)])
def test_figures_of_extreme_values_are_drawn(saved, tmp_path, figure, every):
    """Changes the numbers of all results, or of every second one."""
    command, document = saved
    kind, table, _ = COMMANDS[command]
    changed = copy.deepcopy(document)
    for result in changed["results"][::every]:
        for name, value in result.items():
            if isinstance(value, float):
                result[name] = 1e300 if name == "perplexity" and figure == 1e12 else figure
            elif isinstance(value, dict) and name != "steps_by_drafter":
                result[name] = {part: [figure] * 2 if name == "intervals" else figure for part in value}
    (tmp_path / "results.json").write_text(json.dumps(changed))
    record = read_record(str(tmp_path / "results.json"), kind)
    assert report_files(record, table(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.pop("results"), "results: needed a list, found null"),
        (lambda document: document["results"].clear(), "results: needed at least one, found none"),
        (lambda document: document["results"][0].pop("metrics"), r"results\[0\].metrics is missing"),
        (
            lambda document: document["results"][0].update(speedup="fast"),
            r"results\[0\].speedup: needed a number, found 'fast'",
        ),
        (
            lambda document: document["results"][0].update(intervals={"speedup": [2.0, 1.0]}),
            r"results\[0\].intervals.speedup: needed two numbers in order, found \[2.0, 1.0\]",
        ),
        (lambda document: document["results"][0].update(speedup=True), r"results\[0\].speedup: needed a number, found True"),
        (
            lambda document: document["results"][0].update(speedup=1e13),
            r"results\[0\].speedup: needed a number up to 1e\+12, found 1e\+13",
        ),
        (
            lambda document: document["results"][-1].update(exit_layer=0),
            r"results\[-?\d\].exit_layer: needed at least 1, found 0",
        ),
        (
            lambda document: document["config"]["machine"].update(threads="2"),
            "config.machine.threads: needed a whole number, found '2'",
        ),
        (lambda document: document["config"]["task"].update(pass_k=1), "config.task.pass_k: needed a list, found 1"),
        (lambda document: document["environment"].pop("dtype"), "environment.dtype is missing"),
        (
            lambda document: document["environment"].update(threads=[]),
            "environment.threads: needed a whole number, found a list",
        ),
        (lambda document: document["environment"].update(exit_blocks=3), "environment.exit_blocks: needed an object, found 3"),
        (lambda document: document["environment"].update(notes="slow"), "environment.notes: needed a list, found 'slow'"),
    ],
)
def test_the_error_names_the_wrong_part(saved, tmp_path, change, message):
    command, document = saved
    document = copy.deepcopy(document)
    change(document)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(document))
    with pytest.raises(LayerSkipError, match=f"`saved` {file} must be a results.json that {command} wrote: {message}"):
        read_record(str(file), COMMANDS[command][0])
