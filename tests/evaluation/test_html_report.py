"""The report page: self-contained, escaped, with the figures that its record has data for."""

import re
import struct
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from test_report import BENCH, SWEEP

from layerskip_core.evaluation.report.pages import report_page
from layerskip_core.evaluation.report.plots import figures, to_png, to_svg
from layerskip_core.evaluation.results import Failure, RunRecord, Step, frontier

FULL = replace(
    SWEEP,
    config={**SWEEP.config, "quality_metric": "exact_match"},
    results=tuple(
        replace(result, time_split_ms={"prefill": 1.0, "draft": 2.0, "verify": 3.0, "other": 0.5}) for result in SWEEP.results
    ),
)
TABLES = replace(BENCH, config={**BENCH.config, "task": {"task": "rows<.jsonl"}, "quality_metric": "rouge2"})


class Page(HTMLParser):
    """The cells of each row, links that leave the page, and how often each tag stands in it. Tags must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.open, self.tags = [], [], [], Counter()
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
    return {str(figure.get_label()): to_svg(figure) for figure in figures(record).values()}


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
    result = replace(FULL.results[2], strategy=HOSTILE, metrics={HOSTILE: 0.5}, failures=(Failure(0, HOSTILE),))
    config = {"model": f"folder/{HOSTILE.replace('/', '')}", "task": {"task": HOSTILE}, "quality_metric": HOSTILE, HOSTILE: 1}
    record = RunRecord(config, {**FULL.environment, "device_name": HOSTILE, "notes": [HOSTILE]}, (result,))
    text = report_page(record, pictures(record), [HOSTILE])
    parsed = Page(text)
    assert (parsed.open, parsed.links) == ([], [])
    assert parsed.tags["script"] == parsed.tags["pre"] == parsed.tags["title"] == 1
    assert parsed.tags["img"] == 0
    assert "{{ 1 + 1 }}" in text  # shown, not evaluated
    (row,) = parsed.rows[1:]
    assert row[0] == HOSTILE


def test_the_table_of_the_page():
    text, tables = (report_page(record, {}, []) for record in (FULL, TABLES))
    rows = Page(text).rows
    head, plain, early, drafted = rows
    assert head[:6] == ["strategy", "exit layer", "draft tokens", "exact match", "perplexity", "acceptance rate"]
    assert plain[:6] == ["autoregressive", "-", "-", "87.5%", "1.25", "-"]
    assert early[1:5] == ["12", "-", "50.0%", "1.235e+04"]
    assert drafted[head.index("predicted tokens/s")] == "190.2"
    assert drafted[head.index("pass times verify (ms)")] == "5"
    assert drafted[head.index("speedup")] == "1.82 (1.70-1.95)"
    assert len({len(row) for row in rows}) == 1
    assert text.count('class="mark"') == 2
    assert "rows&lt;.jsonl" in tables
    *_, poem, summed = Page(tables).rows
    assert (poem[:2], summed[:2]) == (["self-speculative", "poem"], ["self-speculative", "sum"])


def test_only_figures_with_data():
    # Acceptance by exit needs two exits.
    assert list(figures(FULL)) == ["pareto", "acceptance_by_position", "perplexity", "prediction", "time_split"]
    assert list(figures(TABLES)) == ["pareto"]


def test_the_speed_within_an_answer_is_drawn_by_drafter():
    steps = (Step(1, 0.5), Step(3, 0.25, "lookup"), Step(1, 0.25, "plain"), Step(2, 0.5, "int8"), Step(4, 0.5, "int8"))
    adaptive = replace(BENCH.results[1], strategy="adaptive", exit_layer=None, longest_answer=steps)
    drawn = figures(replace(TABLES, results=(*TABLES.results, adaptive)))
    (axes,) = drawn["speed_within_an_answer"].axes
    line, plain = axes.lines
    assert list(line.get_xdata()) == [0.25, 0.5, 1.0, 1.5]  # the prefill's step is left out
    assert list(line.get_ydata()) == [10 / 1.5] * 4  # eight steps around each are all of them
    assert plain.get_ydata()[0] == 1000 / 6.5
    assert [points.get_label() for points in axes.collections] == ["int8", "lookup", "plain"]
    assert axes.collections[0].get_offsets().tolist() == [[1.0, 10 / 1.5], [1.5, 10 / 1.5]]
    assert "speed_within_an_answer" not in figures(TABLES)


def test_an_svg_has_the_text_colour_and_the_width_of_the_page():
    drawn = figures(FULL)
    for figure in drawn.values():
        text = to_svg(figure)
        root = ElementTree.fromstring(text.replace("xlink:href", "href"))
        assert root.get("width") is root.get("height") is None
        assert root.get("viewBox")
        assert "currentColor" in text
        assert "#010203" not in text
    # Labelled: the fastest setting of a strategy with its speedup, the baseline with its name alone.
    texts = re.findall(r">([^<]+)</text>", to_svg(drawn["pareto"]))
    assert {"exit 12, 12 drafts: 1.8x", "exit 12 alone: 19x", "autoregressive"} <= set(texts)
    assert {"Speed (tokens per second)", "Quality: exact match (%)"} <= set(texts)


def test_a_png_for_papers():
    image = to_png(figures(FULL)["pareto"])
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", image[16:24]) == (1120, 760)  # 5.6 x 3.8 inches at 200 dots


def test_the_frontier_of_known_points():
    assert frontier([(1, 5), (2, 4), (2, 3), (0, 5), (3, 1), (3, 1)]) == [0, 1, 4, 5]
