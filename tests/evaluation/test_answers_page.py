"""The page of answers: each version once, differences marked, and the links between it and the tables."""

import re

import pytest
from evaluating import own_answers, tiny_loaded

from layerskip_core.config.evaluation import BenchConfig, SweepConfig
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.measure.sweep import sweep
from layerskip_core.evaluation.report.documents import to_jsonl, with_answers
from layerskip_core.evaluation.report.pages import answers_page, report_page
from layerskip_core.evaluation.results import Answered, Result, RunRecord


def record_of(*answered):
    names = (("autoregressive", None, None), ("early-exit", 2, None), ("self-speculative", 2, 4), ("lookup", None, 4))
    results = tuple(Result(*name, tokens_per_second=10.0, speedup=1.0, identical_outputs=1.0) for name in names)
    machine = {"dtype": "float32", "device_name": "cpu", "implementation": "generic", "threads": 1}
    return RunRecord({"model": "tiny", "task": {"name": "known"}}, machine, results, answered=answered)


def versions(page):
    """The settings, the names and the text with marks of each answer."""
    pattern = r'data-results="([\d ]*)">\s*<p class="names">(.*?)</p>\s*<pre>\n(.*?)</pre>'
    return re.findall(pattern, page, re.DOTALL)


def test_each_answer_stands_once_with_all_that_gave_it():
    page = answers_page(record_of(Answered("wake me", "up", ("at six", "at nine", "at six", None))))
    assert versions(page) == [
        ("0 2", "autoregressive; exit 2, 4 drafts", "at six"),
        ("1", "exit 2 alone", "at <mark>nine</mark>"),
    ]
    assert "wake me" in page and re.search(r"reference</p>\s*<pre class=\"soft\">\nup</pre>", page)
    # A setting that was not measured cannot be chosen.
    assert re.findall(r'<option value="(\d+)">(.*?)</option>', page) == [("1", "exit 2 alone"), ("2", "exit 2, 4 drafts")]


@pytest.mark.parametrize(
    ("answer", "marked"),
    [
        ("a x c", "a <mark>x</mark> c"),
        ("a c", "a <mark></mark>c"),
        ("", "<mark></mark>"),
    ],
)
def test_what_differs_from_the_first_answer_is_marked(answer, marked):
    found = versions(answers_page(record_of(Answered("p", "", ("a b c", answer, None, None)))))
    assert found[-1][2] == marked


def test_texts_cannot_become_markup():
    page = answers_page(record_of(Answered("<b>", "<i>", ("<script>x", "<script>y", None, None))))
    assert not re.search(r"<(b|i|script>x|script>y)>", page) and "&lt;script&gt;" in page


def test_tables_link_to_the_answers_of_a_setting():
    record = record_of(Answered("p", "", ("a", "b", "a", None)))
    page = report_page(record, {}, [])
    assert re.findall(r'href="answers.html#setting-(\d)">(.*?)<', page) == [
        ("0", "autoregressive"), ("1", "early-exit"), ("2", "self-speculative"), ("3", "lookup")
    ]  # fmt: skip
    assert "answers.html" not in report_page(record_of(), {}, [])


def test_answers_are_read_from_beside_their_results(tmp_path):
    record = record_of(Answered("p\n", "r", ("a", None, "b", "c")), Answered("q", "", (None,) * 4))
    saved, file = str(tmp_path / "results.json"), tmp_path / "answers.jsonl"
    assert with_answers(record_of(), saved) == record_of()
    file.write_text(to_jsonl(record.answered))
    assert with_answers(record_of(), saved) == record
    assert "answered" not in record.document()
    file.write_text('{"prompt": "p", "reference": "", "answers": ["a"]}\n')
    with pytest.raises(LayerSkipError, match="4 results, got 1"):
        with_answers(record_of(), saved)


@pytest.mark.parametrize("measure", [sweep, bench])
def test_a_measurement_keeps_its_answers(measure):
    settings = {"exits": (2,), "specs": (3,), "exit_confidences": ()} if measure is sweep else {"exit_layer": 2, "repeats": 1}
    config = (SweepConfig if measure is sweep else BenchConfig)("tiny", **settings)
    task = own_answers(2)
    *_, record = measure(tiny_loaded(), task, config)
    assert [answered.prompt for answered in record.answered] == [example.prompt for example in task.examples]
    for answered in record.answered:
        by_strategy = {result.strategy: answer for result, answer in zip(record.results, answered.answers, strict=True)}
        assert by_strategy["autoregressive"] == by_strategy["self-speculative"] == answered.reference
        assert by_strategy["early-exit"] not in (None, answered.reference)
