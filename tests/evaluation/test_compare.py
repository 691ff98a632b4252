"""`layerskip compare`: labels, intervals, what is read of runs, tables, documents and plots."""

import csv
import io
import json
import math
from dataclasses import replace
from statistics import stdev

import pytest
from command_line import fails, run

from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.comparison import (
    Interval,
    Setting,
    compare,
    interval_of,
    labelled,
    read_run,
)
from layerskip_core.evaluation.intervals import t_quantile
from layerskip_core.evaluation.report.comparison import compare_table
from layerskip_core.evaluation.report.files import to_json, to_jsonl
from layerskip_core.evaluation.results import Answered, Result, RunRecord
from layerskip_core.training.progress import LossHistory, StepLosses

MACHINE = {"dtype": "float32", "device_name": "a CPU", "threads": 1}
COMMANDS = {"task": "commands", "samples": 40}


def sweep(folder, match, perplexity, accepted=0.5, task=COMMANDS):
    """A folder with the results.json of a sweep: full depth, exits 2 and 4 alone, and exit 2 with 6
    drafts.
    """
    plain = Result(
        "autoregressive", metrics={"exact_match": match}, perplexity=1.25, tokens_per_second=100.0, speedup=1.0,
        identical_outputs=1.0,
    )  # fmt: skip
    drafted = Result(
        "self-speculative", 2, 6, {"exact_match": match}, acceptance_rate=accepted, mean_accepted_tokens=3.0,
        tokens_per_second=150.0, speedup=1.5, identical_outputs=1.0,
    )  # fmt: skip
    half = replace(plain, strategy="early-exit", metrics={"exact_match": match / 2})
    alone = [
        replace(half, exit_layer=2, perplexity=perplexity),
        replace(half, exit_layer=4, perplexity=perplexity / 2),
    ]
    record = RunRecord({"model": "tiny", "task": dict(task)}, MACHINE, (plain, *alone, drafted))
    return saved(folder, "results.json", to_json(record))


def trained(folder, last_losses, validation="test"):
    """A folder with the losses.jsonl of three steps, validated after the first and the last, and
    its layerskip.json.
    """
    history = LossHistory()
    for step in (1, 2, 3):
        held_out = (
            {exit_layer: loss + 3 - step for exit_layer, loss in last_losses.items()}
            if step != 2
            else {}
        )
        history.add(StepLosses(step, 3.0, {2: 3.0, 4: 2.0}, validation=held_out))
    saved(folder, "layerskip.json", json.dumps({"validation_rows": validation}))
    return saved(folder, "losses.jsonl", history.to_jsonl().decode())


def saved(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder)


def cells_of(result):
    """The cells of the rows of a Markdown table."""
    rows = [line for line in result.out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def groups_of(*folders, **labels):
    return {
        label: [read_run(path) for path in paths]
        for label, paths in (labels or {"all": folders}).items()
    }


@pytest.mark.parametrize(
    "arguments, groups",
    [
        (["a=x,y", "b=z"], {"a": ["x", "y"], "b": ["z"]}),
        (["b=z", "a=x", "b=y"], {"b": ["z", "y"], "a": ["x"]}),
        (["runs/none-seed1", "runs/none-seed2/", "runs/both-seed1"], {
            "none": ["runs/none-seed1", "runs/none-seed2/"], "both": ["runs/both-seed1"]}),
        (["r/none/seed_1/results.json", "r/none/seed_2"], {"none": ["r/none/seed_1/results.json", "r/none/seed_2"]}),
        (["before/sweep", "after/sweep"], {"before/sweep": ["before/sweep"], "after/sweep": ["after/sweep"]}),
        (["epoch-1,epoch-2"], {"epoch-1": ["epoch-1"], "epoch-2": ["epoch-2"]}),
    ],
)  # fmt: skip
def test_runs_of_one_label_are_named_so_or_differ_in_their_seed(arguments, groups):
    assert labelled(arguments) == groups


def test_intervals_of_runs():
    """Mean 2, standard deviation 1, t = 4.3027 for 2 degrees of freedom: 2 +- 4.3027 / sqrt(3)."""
    interval = interval_of([1.0, 2.0, 3.0])
    assert (interval.mean, interval.low, interval.high) == pytest.approx(
        (2, -0.48417, 4.48417), abs=1e-4
    )
    assert [interval_of(values) for values in ([5.0], [5.0, 6.0], [7.0] * 3)] == [
        Interval(5.0),
        Interval(5.5),
        Interval(7.0),
    ]
    assert interval_of([0.35, 0.45, 0.55], [0.3, 0.4, 0.5], paired=True) == Interval(
        pytest.approx(0.05)
    )
    assert interval_of([4.0, 5.0], [1.0, 2.0, 3.0]) == Interval(2.5)
    interval = interval_of([math.e, math.e**2, math.e**3], logarithmic=True)
    assert (interval.mean, interval.high) == pytest.approx((math.e**2, math.exp(4.48417)), rel=1e-4)
    assert all(
        math.isfinite(end)
        for end in vars(interval_of([1.0, 2.0, 1e300], logarithmic=True)).values()
    )


def test_paired_differences_leave_out_what_pairs_share():
    """Differences 1, 2, 3 of runs that lie far apart. Welch: variances 10201 / 3 and 10000 / 3, t
    of 3 degrees of freedom.
    """
    values = [1.0, 102.0, 203.0]
    others = [0.0, 100.0, 200.0]
    paired = interval_of(values, others, paired=True)
    assert (paired.mean, paired.low) == pytest.approx((2, -0.48417), abs=1e-4)
    welch = interval_of(values, others, paired=False)
    assert (welch.mean, welch.high) == pytest.approx(
        (2, 2 + 3.1824 * math.sqrt(20201 / 3)), abs=1e-2
    )
    # 4 degrees of freedom, computed as a little less
    equal = interval_of([1 / 12, 5 / 12, 9 / 12], [0, 4 / 12, 8 / 12])
    assert equal.high == pytest.approx(1 / 12 + 2.7764 * math.sqrt(2 / 27), abs=1e-4)
    ratio = interval_of([2.0, 8.0, 16.0], [1.0, 4.0, 7.9], paired=True, logarithmic=True)
    assert ratio.low < 2 < ratio.mean < ratio.high


def test_one_run_of_a_label_has_intervals_over_its_prompts(tmp_path):
    """The interval of a difference is that of the differences by prompt; drafting strategies have
    no quality of their own.
    """
    prompts = 40
    folders = {name: [tmp_path / name] for name in ("before", "after")}
    before = [1.0] * 12 + [0.0] * 28
    after = [0.0] * 4 + [1.0] * 32 + [0.0] * 4
    for name, solved in (("before", before), ("after", after)):
        plain = Result("autoregressive", metrics={"pass@1": sum(solved) / prompts})
        drafted = replace(plain, strategy="lookup", acceptance_rate=0.5)
        answered = [
            Answered(f"p{n}", "", ("a", "a"), {"pass@1": (score, score)})
            for n, score in enumerate(solved)
        ]
        record = RunRecord({"model": name, "task": COMMANDS}, MACHINE, (plain, drafted))
        saved(tmp_path / name, "results.json", to_json(record))
        saved(tmp_path / name, "answers.jsonl", to_jsonl(answered))
    comparison = compare(groups_of(**folders), only=("pass@1",))
    (line,) = comparison.lines
    (old, new) = line.cells
    differences = [late - early for late, early in zip(after, before, strict=True)]
    half = t_quantile(prompts - 1) * stdev(differences) / math.sqrt(prompts)
    assert new.difference == Interval(*map(pytest.approx, (0.5, 0.5 - half, 0.5 + half)))
    assert old.interval.low < 0.3 < old.interval.high and old.difference is None
    assert "paired prompt by prompt" in compare_table(comparison).note
    other = [Answered("p", "", ("a", "a"), {"pass@1": (1.0, 1.0)})]  # other rows: no pairs
    saved(tmp_path / "after", "answers.jsonl", to_jsonl(other))
    comparison = compare(groups_of(**folders), only=("pass@1",))
    assert comparison.lines[0].cells[1].difference == Interval(pytest.approx(0.5))


@pytest.mark.parametrize("rows", ["1f", "2e"])
def test_held_out_rows_are_the_same_whatever_a_run_was_trained_on(tmp_path, rows):
    one = [trained(tmp_path / f"a{n}", {4: 1.0 + n}, "1f") for n in (1, 2)]
    other = [trained(tmp_path / f"b{n}", {4: 0.5 + n}, rows) for n in (1, 2)]
    result = run("compare", f"a={','.join(one)}", f"b={','.join(other)}")
    note = "The held-out losses of a and b are of different rows, or of other settings of the task: differences are left out."
    assert (note in result.err) == ("not paired" in result.out) == (rows == "2e")
    # What cannot be compared is not subtracted; of equal rows the ratio of perplexities has an x.
    lines = [line for line in result.out.splitlines() if line.startswith("held out perplexity")]
    assert lines and all(line.rstrip().endswith(" -") == (rows == "2e") for line in lines)


def test_means_and_differences_over_seeds(tmp_path):
    """Exact match at full depth 50, 60, 70% and 60, 70, 83%; perplexity at exit 2 falls to a half
    in every pair.
    """
    none = [sweep(tmp_path / f"none-seed{n}", 0.4 + n / 10, 8.0 * n) for n in (1, 2, 3)]
    both = [
        sweep(tmp_path / f"both-seed{n}", match, 4.0 * n)
        for n, match in enumerate((0.6, 0.7, 0.83), start=1)
    ]
    result = run(
        "compare", *none, *both, "--only exact_match,perplexity --exits 2 --format markdown"
    )
    rows = cells_of(result)
    assert rows[0] == ["figure", "setting", "none", "both", "both vs none"]
    assert rows[2] == [
        "exact match", "exit 2 alone", "30.0% (17.6% to 42.4%)", "35.5% (21.2% to 49.8%)", "+5.5 (+3.3 to +7.7)",
    ]  # fmt: skip
    assert rows[3][1:3] == ["autoregressive", "60.0% (35.2% to 84.8%)"]
    # Equal in all pairs
    assert rows[4][:2] == ["perplexity", "exit 2 alone"] and rows[4][4] == "x0.5"
    assert len(rows) == 6 and "paired run by run" in result.out and result.err == ""


def test_seeds_with_rows_of_their_own_are_paired(tmp_path):
    """The k-th run of each label has the rows of the k-th of the other: the same seed of generated
    rows.
    """
    groups = groups_of(
        a=[trained(tmp_path / f"a{n}", {2: 2.0, 4: 1.0}, f"rows{n}") for n in (1, 2)],
        b=[trained(tmp_path / f"b{n}", {2: 2.5, 4: 1.5}, f"rows{n}") for n in (1, 2)],
    )
    assert compare(groups).paired
    groups["b"].reverse()
    assert not compare(groups).paired


def test_a_figure_that_one_run_of_a_label_lacks_is_left_out(tmp_path):
    groups = groups_of(
        a=[sweep(tmp_path / "a", 0.5, 8.0)], b=[trained(tmp_path / "b", {2: 2.0, 4: 1.0})]
    )
    table = compare_table(compare(groups))
    assert [row[2:] for row in table.texts if row[0] == "held out perplexity"] == [
        ("-", "7.39", "-"),
        ("-", "2.72", "-"),
    ]
    mixed = groups_of(a=[str(tmp_path / "a"), str(tmp_path / "b")])
    assert compare(mixed).lines == ()


def test_what_a_training_cost_is_compared(tmp_path):
    """After the training, from layerskip.json: shares in points, perplexities by their ratio. Older
    ones lack some.
    """
    known = {"tokens": 64, "before": 4.0}
    costs = {
        "none": known | {"agreement": 0.9, "after": 5.0, "exact_match": [0.0, 0.5], "answered": 16},
        "recipe": known
        | {"agreement": 0.8, "after": 10.0, "exact_match": [0.0, 0.25], "answered": 16},
        "older": known | {"agreement": 0.7, "after": 20.0},
    }
    for name, cost in costs.items():
        trained(tmp_path / name, {4: 1.0})
        saved(
            tmp_path / name, "layerskip.json", json.dumps({"validation_rows": "test", "cost": cost})
        )
    result = run("compare", *(str(tmp_path / name) for name in costs), "--format markdown")
    rows = [row for row in cells_of(result) if "all layers" in row]
    assert rows == [
        ["held out exact match", "all layers", "50.0%", "25.0%", "-", "-25.0", "-"],
        ["own text agreement", "all layers", "90.0%", "80.0%", "70.0%", "-10.0", "-20.0"],
        ["own text perplexity", "all layers", "5", "10", "20", "x2", "x4"],
    ]


def test_documents_and_plots(tmp_path):
    for label, gain in (("a", 0.0), ("b", 1.0)):
        for seed in (1, 2):
            trained(tmp_path / f"{label}-seed{seed}", {2: 2.0 + seed - gain, 4: 1.0 + seed - gain})
            sweep(tmp_path / f"{label}-seed{seed}", 0.5, 8.0)
    folders = [str(tmp_path / f"{label}-seed{seed}") for label in "ab" for seed in (1, 2)]
    result = run("compare", *folders, f"--format csv --output {tmp_path}/out")
    assert result.code == 0, result.err
    rows = list(csv.DictReader(io.StringIO(result.out)))
    (row,) = [
        row
        for row in rows
        if (row["figure"], row["exit_layer"], row["label"]) == ("held_out_perplexity", "2", "b")
    ]
    assert float(row["mean"]) == pytest.approx(math.exp(2.5)) and float(
        row["difference_mean"]
    ) == pytest.approx(1 / math.e)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["lines"][0]["setting"] == {
        "name": "exit 2 alone",
        "exit_layer": 2,
        "drafts": "",
    }
    written = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".lock"}
    pictures = {f"{name}.png" for name in ("exact_match", "perplexity", "held_out_perplexity")}
    assert pictures | {"comparison.md", "comparison.json", "comparison.csv"} <= written
    assert "acceptance_rate.png" not in written  # of one exit only
    assert (tmp_path / "out" / "exact_match.png").read_bytes().startswith(b"\x89PNG")
    fewer = ("compare", *folders, f"--only perplexity --output {tmp_path}/out")
    fails(
        f"--output {tmp_path / 'out'} already holds comparison.json; give --overwrite to replace it, or another folder",
        *fewer,
    )
    assert run(*fewer, "--overwrite").code == 0
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["perplexity.png"]


@pytest.mark.parametrize(
    "name, text", [("results.json", "{}"), ("losses.jsonl", '{"step": 1}'), ("x", "")]
)
def test_what_is_no_run_is_refused(tmp_path, name, text):
    with pytest.raises(LayerSkipError, match="RUNS "):
        read_run(saved(tmp_path / "x", name, text))


def test_wrong_flags_are_one_line(tmp_path):
    folder = sweep(tmp_path / "a", 0.5, 8.0)
    losses = trained(tmp_path / "b", {2: 1.0, 4: 1.0})
    fails("RUNS nowhere: there is no such file", "compare", "nowhere")
    fails(
        "--exits must be exits that all runs of a label have, got 9", "compare", losses, "--exits 9"
    )
    for arguments, named in (
        ((folder, "--only rouge1"), "--only"), (["a=x,,y"], "RUNS"), (["a=x,y", "b=./x"], "RUNS"),
        ((f"x={folder},{losses}",), "RUNS"),
    ):  # fmt: skip
        result = run("compare", *arguments)
        assert result.code in (1, 2) and result.err.startswith(f"error: {named} must ")


def test_a_path_may_have_a_comma_and_an_equals_sign(tmp_path):
    (tmp_path / "a=1,b").mkdir()
    assert labelled([str(tmp_path / "a=1,b")]) == {"a=1,b": [str(tmp_path / "a=1,b")]}


def test_a_sweep_and_its_training_are_one_run(tmp_path):
    sweep(tmp_path / "run", 0.8, 10.0)
    figures = read_run(trained(tmp_path / "run", {2: 2.0, 4: 1.0})).figures
    alone = Setting("exit 2 alone", 2)
    assert figures["exact_match"] == {
        Setting("autoregressive"): 0.8,
        alone: 0.4,
        Setting("exit 4 alone", 4): 0.4,
    }
    assert figures["acceptance_rate"] == {Setting("exit 2, 6 drafts", 2, "6 drafts"): 0.5}
    assert figures["held_out_perplexity"] == pytest.approx(
        {alone: math.exp(2), Setting("exit 4 alone", 4): math.exp(1)}
    )
