"""Records as JSON, CSV, tables and files, and pictures in the terminal."""

import csv
import io
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.report.files import output_folder, to_csv, to_json
from layerskip_core.evaluation.report.tables import results_table
from layerskip_core.evaluation.results import (
    Bounds,
    Difference,
    Failure,
    Recommendation,
    Result,
    RunRecord,
    read_record,
)

MACHINE = {"dtype": "float32", "device_name": "a CPU", "implementation": "packed", "threads": 2}
PLAIN = Result(
    "autoregressive", metrics={"exact_match": 0.875}, perplexity=1.25, tokens_per_second=100.0, speedup=1.0,
    identical_outputs=1.0,
)  # fmt: skip
EARLY = Result(
    "early-exit", 12, metrics={"exact_match": 0.5}, perplexity=12345.678, tokens_per_second=1900.0, speedup=19.0,
    identical_outputs=0.4375, pareto=True,
)  # fmt: skip
DRAFTED = Result(
    "self-speculative", 12, 12, {"exact_match": 0.875}, acceptance_rate=0.71, mean_accepted_tokens=10.8,
    tokens_per_second=182.4, speedup=1.824, identical_outputs=1.0, pareto=True, predicted_speedup=1.902,
    acceptance_by_position=(0.75, 0.5), pass_times_ms={"draft": 2.5, "verify": 5.0, "other": 0.5},
    intervals={"speedup": Bounds(1.7, 1.95)},
    differences=(Difference(0, 3, 1e-4),), failures=(Failure(1, "no, really"),),
)  # fmt: skip
SWEEP = RunRecord(
    {"model": "tiny", "task": {"task": "commands"}},
    MACHINE,
    (PLAIN, EARLY, DRAFTED),
    Recommendation(
        12,
        12,
        1.824,
        "it is the only one",
        "none",
        {"exact": {"strategy": "lookup", "num_draft_tokens": 4}},
    ),
)
POEM = Result(
    samples=4, metrics={"rouge2": 0.5, "exact_match": 0.0}, acceptance_rate=0.8, mean_accepted_tokens=4.8,
    tokens_per_second=320.0, speedup=2.125, identical_outputs=1.0,
)  # fmt: skip
SUM = Result(
    samples=6, metrics={"rouge2": 0.25, "exact_match": 0.0}, acceptance_rate=0.613, mean_accepted_tokens=3.55,
    tokens_per_second=280.0, speedup=1.875, identical_outputs=0.5,
    intervals={
        "acceptance_rate": Bounds(0.575, 0.625), "mean_accepted_tokens": Bounds(3.1, 3.9), "speedup": Bounds(1.5, 2.25),
    },
)  # fmt: skip
BENCHED = Result(
    "autoregressive", metrics={"rouge2": 0.4, "exact_match": 0.0}, tokens_per_second=150.0,
    ttft_ms=12.0, peak_memory_mb=512.0, speedup=1.0, identical_outputs=1.0,
)  # fmt: skip
FASTER = Result(
    "self-speculative", 8, 6, {"rouge2": 0.4, "exact_match": 0.0}, acceptance_rate=0.7, mean_accepted_tokens=4.2,
    tokens_per_second=300.0, ttft_ms=12.5, speedup=2.0,
    identical_outputs=0.95, intervals={"speedup": Bounds(1.94, 2.1)}, categories={"poem": POEM, "sum": SUM},
)  # fmt: skip
BENCH = RunRecord(
    {"model": "tiny", "repeats": 3, "task": {"task": "commands"}}, MACHINE, (BENCHED, FASTER)
)


def test_a_csv_file_has_a_column_for_every_figure():
    rows = list(csv.DictReader(io.StringIO(to_csv(SWEEP))))
    assert [row["strategy"] for row in rows] == ["autoregressive", "early-exit", "self-speculative"]
    assert rows[0]["exit_layer"] == rows[0]["acceptance_rate"] == ""
    assert rows[2].items() >= {
        "exit_layer": "12", "num_draft_tokens": "12", "exact_match": "0.875", "perplexity": "", "acceptance_rate": "0.71",
        "pareto": "True", "pass_times_ms_draft": "2.5", "pass_times_ms_other": "0.5", "acceptance_by_position": "0.75 0.5",
        "differences": "1", "failures": "1", "draft_weights": "", "exits": "0", "skip": "", "speedup_low": "1.7",
        "speedup_high": "1.95", "ttft_ms": "",
    }.items()  # fmt: skip
    plain, drafted, poem, summed = csv.DictReader(io.StringIO(to_csv(BENCH)))
    assert (plain["rouge2"], plain["ttft_ms"]) == ("0.4", "12.0")
    assert (drafted["category"], drafted["samples"], drafted["speedup_high"]) == ("", "", "2.1")
    assert (poem["strategy"], poem["exit_layer"], poem["category"], poem["samples"]) == (
        "self-speculative",
        "8",
        "poem",
        "4",
    )
    assert (summed["category"], summed["rouge2"], summed["acceptance_rate_low"]) == (
        "sum",
        "0.25",
        "0.575",
    )


def lines_of(table):
    return [" ".join(filter(None, cells)) for cells in (table.headers, *table.texts)]


def test_the_table_of_a_sweep():
    table = results_table(SWEEP)
    assert lines_of(table) == [
        "strategy exit spec EM ppl accept mean tok/s speed pred same",
        "autoregressive - - 87.5% 1.25 - - 100 1.00 - 100%",
        "early-exit 12 - 50.0% 1.2e4 - - 1900 19.00 - 44% *",
        "self-speculative 12 12 87.5% - 71.0% 10.8 182 1.82±.12 1.90 100% *",
    ]
    assert all(f"{name}: " in table.text for name in ("EM", "accept", "same", "pred"))
    for told in ("Policy exact: lookup with 4 draft tokens.", "Recommended: it is the only one."):
        assert told in table.text
    assert len(table.column_blocks(80)) == 1


def test_tables_show_how_a_metric_differs_from_full_depth_and_json_never_holds_a_nan():
    ends = {
        "intervals": {"exact_match": Bounds(0.25, 0.75), "speedup": Bounds(0.0, 1e10)},
        "changes": {"exact_match": Bounds(-0.625, 0.0)},
    }
    config = SWEEP.config | {"quality_metric": "exact_match"}
    table = results_table(
        replace(SWEEP, config=config, results=(SWEEP.results[0], replace(SWEEP.results[1], **ends)))
    )
    assert [row[3:5] for row in table.texts] == [("87.5%", "-"), ("50±25%", "-38±31%")]
    # Of two prompts nothing is known
    assert any(str(each).endswith("±?") for each in table.texts[1])
    assert "±?: too few rows for an interval." in table.note.splitlines()
    assert "change: of EM from full depth, on the same prompts." in table.note.splitlines()
    with pytest.raises(ValueError, match="JSON"):
        to_json(RunRecord({"x": math.nan}, {}, ()))


def test_the_table_of_a_benchmark_has_its_categories_and_ends_with_a_verdict():
    table = results_table(BENCH)
    assert lines_of(table) == [
        "strategy exit spec R2 EM accept mean tok/s speed same first MB",
        "autoregressive - - 40% 0% - - 150 1.00 100% 12.0 512",
        "self-speculative 8 6 40% 0% 70.0% 4.2 300 2.00±.08 95% 12.5 -",
        "  poem (4) 8 6 50% 0% 80.0% 4.8 320 2.12 100% - -",
        "  sum (6) 8 6 25% 0% 61.3% 3.5 280 1.88±.38 50% - -",
    ]
    (places,) = table.column_blocks(70)
    assert [table.headers[place] for place in places][-3:] == ["tok/s", "speed", "same"]
    lines = table.markdown().splitlines()
    assert (
        lines[2] == "| autoregressive | - | - | 40% | 0% | - | - | 150 | 1.00 | 100% | 12.0 | 512 |"
    )
    assert "Medians of 3 repeats; float32 on a CPU, 2 threads." in lines
    verdict = "exit 8, 6 drafts, 2.00x autoregressive (95% interval 1.94 to 2.10)"
    assert lines[-1] == f"Fastest with the same outputs: {verdict}."


@pytest.mark.parametrize(
    "changes, verdict",
    [
        (
            {"intervals": {"speedup": Bounds(0.98, 2.1)}},
            "Nothing was certainly faster with the same outputs; best: exit 8",
        ),
        (
            {"differences": (Difference(0, 3, 1e-4),)},
            "(95% interval 1.94 to 2.10); 1 output differed at a near-tie.",
        ),
        (
            {"intervals": {"speedup": Bounds(0.0, 4.2)}},
            "with the same outputs; best: exit 8, 6 drafts, 2.00x autoregressive",
        ),
        (
            {"intervals": {"speedup": Bounds(0.0, 4.2)}},
            "2.00x autoregressive (too few rows for an interval).",
        ),
        (
            {"rows_to_halve": 75},
            "2.00x autoregressive (95% interval 1.94 to 2.10; about 75 rows would halve it).",
        ),
        (
            {"rows_to_halve": 0},
            "2.00x autoregressive (95% interval 1.94 to 2.10; more repeats would halve it).",
        ),
        (
            {"differences": (Difference(0, 3, 1.0),)},
            "No other strategy had the same outputs as autoregressive decoding.",
        ),
        (
            {"failures": (Failure(1, "x"),)},
            "No other strategy had the same outputs as autoregressive decoding.",
        ),
        (
            {"strategy": "early-exit"},
            "No other strategy had the same outputs as autoregressive decoding.",
        ),
        ({"speedup": None}, "Medians of 3 repeats; float32 on a CPU, 2 threads."),
    ],
)
def test_the_verdict_counts_outputs_that_are_the_same_up_to_near_ties(changes, verdict):
    record = replace(BENCH, results=(BENCHED, replace(FASTER, categories={}, **changes)))
    assert verdict in results_table(record).text.splitlines()[-1]
    sampled = replace(record, config=record.config | {"generation": {"temperature": 1.0}})
    if "differences" in changes:
        assert (
            results_table(sampled)
            .findings[-1]
            .startswith("Fastest with outputs of the same distribution: exit 8, 6 drafts")
        )


def test_a_benchmark_without_references_has_no_scores_against_itself():
    """Answers are scored against full depth: only an early exit's score says something."""
    config = BENCH.config | {"has_references": False}
    assert not {"R2", "EM"} & set(results_table(replace(BENCH, config=config)).headers)
    assert {"R2", "EM"} < set(
        results_table(replace(BENCH, config=config | {"has_references": True})).headers
    )
    early = replace(FASTER, strategy="early-exit", categories={})
    assert {"R2", "EM"} < set(
        results_table(replace(BENCH, config=config, results=(BENCHED, early))).headers
    )


@pytest.mark.parametrize(
    "text", ["", "[]", to_json(BENCH), to_json(SWEEP).replace("182.4", '"fast"')]
)
def test_a_file_that_is_no_record_of_a_sweep_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(
        LayerSkipError, match=r"`saved` .*x.json must be a results.json that sweep-exits wrote"
    ):
        read_record(str(tmp_path / "x.json"), "sweep-exits")


def test_the_output_folder_is_checked_before_the_run(tmp_path, monkeypatch):
    with output_folder(str(tmp_path / "new" / "folder"), "test") as folder:
        assert folder.is_dir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "in the way" / "report.html").mkdir(parents=True)
    for name, reason in (
        ("file", "file"),
        ("in the way", r"report\.html: it is a folder"),
        ("full", "disk without space"),
    ):
        if name == "full":
            monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        with (
            pytest.raises(LayerSkipError, match=reason),
            output_folder(str(tmp_path / name), "test"),
        ):
            pytest.fail("began")
