"""A task is one module and one line: then bench and all reports have it."""

import csv
import json

from command_line import run

from layerskip_core.config.evaluation import TASKS


def test_a_module_and_a_line_are_a_task(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "toy", "toy_task:TOY")
    folder = tmp_path / "out"
    arguments = ("--model", checkpoint, "--task", "toy", "--samples", "3", "--format", "markdown", "--output", str(folder))
    result = run("bench", *arguments, "--exit", "5", "--spec", "3", "--repeats", "1")
    assert result.code == 0, result.err
    document = json.loads((folder / "results.json").read_text())
    assert (document["config"]["task"]["task"], document["config"]["quality_metric"]) == ("toy", "digits")
    values = [row["metrics"]["digits"] for row in document["results"]]
    (line,) = [line for line in result.out.splitlines() if line.startswith("| digits |")]
    assert [cell.split()[0] for cell in line.split(" | ")[1:]] == [f"{value:.1%}" for value in values]
    assert [float(row["digits"]) for row in csv.DictReader((folder / "results.csv").open())] == values
    page = (folder / "report.html").read_text()
    assert "<button>digits</button>" in page
    assert "Quality: digits (%)</text>" in page


def test_a_task_takes_only_the_settings_that_it_accepts(monkeypatch):
    monkeypatch.setitem(TASKS, "toy", "toy_task:TOY")
    result = run("bench", "--task", "toy", "--shots", "2")
    assert (result.code, "--shots must be 0 for --task toy, got 2" in result.err) == (1, True), result.err
