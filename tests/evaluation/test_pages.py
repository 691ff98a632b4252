"""The report page: self-contained, escaped, with the figures that its record has data for."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from test_report import BENCH, PLAIN, SWEEP

from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.report.files import (
    answers_page,
    report_page,
    to_json,
    to_jsonl,
)
from layerskip_core.evaluation.report.plots import draw_plots, to_svg
from layerskip_core.evaluation.results import Answered, Failure, Result, RunRecord, read_record

FULL = replace(SWEEP, config={**SWEEP.config, "quality_metric": "exact_match"})
TABLES = replace(
    BENCH, config={**BENCH.config, "task": {"task": "rows<.jsonl"}, "quality_metric": "rouge2"}
)


class Page(HTMLParser):
    """The cells of each row, links that leave the page, and how often each tag stands in it. Tags
    must be closed in order.
    """

    def __init__(self, text):
        super().__init__()
        self.rows = []
        self.links = []
        self.open = []
        self.tags = Counter()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.open += [tag] if tag != "meta" else []
        self.rows += [[]] if tag == "tr" else []
        places = [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.links += [value for value in places if not value.startswith("#")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "button"):
            self.rows[-1].append(data)


HOSTILE = """</pre></td></title></style><script>alert("1")</script><img src=x onerror='1'>&lt;{{ 1 + 1 }}"""


def pictures(record):
    return {str(figure.get_label()): to_svg(figure) for figure in draw_plots(record).values()}


def page(record):
    return report_page(record, pictures(record), ["the verdict & more"])


@pytest.mark.parametrize("record", [FULL, TABLES])
def test_the_page_is_well_formed_and_self_contained(record):
    text = page(record)
    parsed = Page(text)
    assert parsed.open == []
    assert parsed.links == []
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "the verdict &amp; more" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_no_text_of_a_record_becomes_markup():
    """Every text that a model, a data set or a saved results.json can choose, at once."""
    result = replace(
        FULL.results[2], strategy=HOSTILE, metrics={HOSTILE: 0.5}, failures=(Failure(0, HOSTILE),)
    )
    config = {
        "model": f"folder/{HOSTILE.replace('/', '')}",
        "task": {"task": HOSTILE},
        "quality_metric": HOSTILE,
        HOSTILE: 1,
    }
    record = RunRecord(
        config, {**FULL.environment, "device_name": HOSTILE, "notes": [HOSTILE]}, (result,)
    )
    text = report_page(record, pictures(record), [HOSTILE])
    parsed = Page(text)
    assert (parsed.open, parsed.links) == ([], [])
    assert parsed.tags["script"] == parsed.tags["pre"] == parsed.tags["title"] == 1
    assert parsed.tags["img"] == 0
    assert "{{ 1 + 1 }}" in text  # shown, not evaluated
    assert parsed.rows[1][0] == HOSTILE


def test_the_page_has_the_columns_of_the_terminal():
    page, tables = (report_page(record, {}, []) for record in (FULL, TABLES))
    head, plain, early, _ = Page(page).rows
    assert " ".join(head) == "strategy exit spec EM ppl accept mean tok/s speed pred same"
    assert " ".join(plain[:6]) == "autoregressive - - 87.5% 1.25 -"
    assert " ".join(early[1:5]) == "12 - 50.0% 1.2e4"
    assert page.count('class="mark"') == 2
    assert "rows&lt;.jsonl" in tables
    *_, head, poem, summed = Page(tables).rows
    assert " ".join(head[:5]) == "strategy category R2 EM accept"
    assert " ".join(poem[:3] + summed[:3]) == "self-speculative poem 50% self-speculative sum 25%"
    harness = replace(FULL, config=FULL.config | {"task": {"task": "lm-eval:x"}})
    scored = replace(PLAIN, metrics={"x acc": 0.5}, stderr={"x acc": 0.05}, samples={"x": 9})
    assert Page(report_page(replace(harness, results=(scored,)), {}, [])).rows[1][:4] == [
        "x",
        "acc",
        "9",
        "0.500±.050",
    ]


def record_of(*answered):
    names = (
        ("autoregressive", None, None),
        ("early-exit", 2, None),
        ("self-speculative", 2, 4),
        ("lookup", None, 4),
    )
    results = tuple(
        Result(*name, tokens_per_second=10.0, speedup=1.0, identical_outputs=1.0) for name in names
    )
    machine = {"dtype": "float32", "device_name": "cpu", "implementation": "generic", "threads": 1}
    return RunRecord(
        {"model": "tiny", "task": {"name": "known"}}, machine, results, answered=answered
    )


def versions(page):
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
    assert re.findall(r'<option value="(\d+)">(.*?)</option>', page) == [
        ("1", "exit 2 alone"),
        ("2", "exit 2, 4 drafts"),
    ]


@pytest.mark.parametrize(
    "answer, marked",
    [("a x c", "a <mark>x</mark> c"), ("a c", "a <mark></mark>c"), ("", "<mark></mark>")],
)
def test_what_differs_from_the_first_answer_is_marked(answer, marked):
    found = versions(answers_page(record_of(Answered("p", "", ("a b c", answer, None, None)))))
    assert found[-1][2] == marked


def test_a_long_answer_is_marked_where_it_differs_and_texts_cannot_become_markup():
    words = [f"w{number}" for number in range(400)]
    other = " ".join([*words[:200], "x", *words[201:]])
    found = versions(
        answers_page(record_of(Answered("p", "", (" ".join(words), other, None, None))))
    )
    assert re.findall("<mark>(.*?)</mark>", found[-1][2]) == ["x"]
    page = answers_page(record_of(Answered("<b>", "<i>", ("<script>x", "<script>y", None, None))))
    assert not re.search(r"<(b|i|script>x|script>y)>", page) and "&lt;script&gt;" in page


def test_answers_are_read_from_beside_their_results(tmp_path):
    record = record_of(Answered("p\n", "r", ("a", None, "b", "c")), Answered("q", "", (None,) * 4))
    saved = tmp_path / "results.json"
    file = tmp_path / "answers.jsonl"
    saved.write_text(to_json(record))
    assert (
        "answered" not in record.document()
        and read_record(str(saved), "sweep-exits") == record_of()
    )
    file.write_text(to_jsonl(record.answered))
    assert read_record(str(saved), "sweep-exits") == record
    file.write_text('{"prompt": "p", "reference": "", "answers": "a"}\n')
    with pytest.raises(LayerSkipError, match=r"beside `saved` .*answers.jsonl must be"):
        read_record(str(saved), "sweep-exits")
