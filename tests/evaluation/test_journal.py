"""An interrupted benchmark continues where it stopped."""

import json
from dataclasses import replace

import pytest
from evaluating import own_answers, tiny_loaded

from layerskip_core.config.evaluation import BenchConfig
from layerskip_core.decoding import DecodeStats
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.measure import measure
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.outputs import JOURNAL, Journal, Output
from layerskip_core.evaluation.results import Step

ANSWER = Output(
    (3, 4), "ab", (Step(1, 0.5), Step(1, 0.25, "exit 5")),
    DecodeStats(1, 5, 2, 6, 1, 1, 0.5, 0.1, 0.1, 0.75, (1, 1), (1,), {"exit 5": 1}), "eos", 12.5,
)  # fmt: skip
FAILURE = Output(error="out of memory")
STRATEGIES = ("autoregressive", "early-exit", "self-speculative")
CONFIG = BenchConfig("tiny", exit_layer=5, num_draft_tokens=3, repeats=2, strategies=STRATEGIES)


def test_outputs_come_back_and_an_incomplete_line_is_measured_again(tmp_path):
    journal = Journal(tmp_path, {"a": 1}, False)
    journal.add(0, 0, [ANSWER, FAILURE])
    journal.add(0, 1, [ANSWER])
    file = tmp_path / JOURNAL
    file.write_text(file.read_text()[:-20])
    again = Journal(tmp_path, {"a": 1}, True)
    assert (again.recall(0, 0), again.recall(0, 1)) == ([ANSWER, FAILURE], None)
    again.add(0, 1, [FAILURE])
    assert Journal(tmp_path, {"a": 1}, True).recall(0, 1) == [FAILURE]
    assert Journal(tmp_path, {"a": 1}, False).recall(0, 1) is None


def test_a_run_of_other_rows_is_not_resumed(tmp_path):
    loaded, task = tiny_loaded(), own_answers()
    running = bench(loaded, task, CONFIG, tmp_path)
    next(running)
    running.close()
    other = replace(task, examples=(*task.examples[1:], task.examples[0]))
    with pytest.raises(LayerSkipError, match="belongs to a run with other settings or rows"):
        next(bench(loaded, other, CONFIG, tmp_path, resume=True))


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    loaded, task = tiny_loaded(), own_answers()
    *_, whole = bench(loaded, task, CONFIG)
    running = bench(loaded, task, CONFIG, tmp_path)
    for _ in range(4):  # of 6: one repeat of 3 prompts, and the first of the other
        next(running)
    running.close()
    assert [json.loads(line).get("sample") for line in (tmp_path / JOURNAL).read_text().splitlines()] == [None, 0, 1, 2, 0]
    calls = []
    honest = measure.answer_prompts

    def counted(loaded, prompts, *arguments):
        calls.extend(prompts)
        return honest(loaded, prompts, *arguments)

    monkeypatch.setattr(measure, "answer_prompts", counted)
    *progress, resumed = bench(loaded, task, CONFIG, tmp_path, resume=True)
    prompts = [example.prompt for example in task.examples]
    assert calls == [prompts[0]] * 3 + [prompts[1]] * 3 + [prompts[2]] * 3  # warm-up, then two prompts in three ways
    assert [event.done for event in progress] == [5, 6]
    assert [(result.metrics, result.acceptance_rate, result.identical_outputs) for result in resumed.results] == [
        (result.metrics, result.acceptance_rate, result.identical_outputs) for result in whole.results
    ]


@pytest.mark.parametrize("line", [b"{", b'{"repeat": 0, "sample": 0}'])
def test_a_damaged_line_is_one_error(tmp_path, line):
    Journal(tmp_path, {}, False).add(0, 1, [ANSWER])
    file = tmp_path / JOURNAL
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(LayerSkipError, match=f"`resume`: {file} is damaged: "):
        Journal(tmp_path, {}, True)
