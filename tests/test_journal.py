"""An interrupted benchmark goes on where it stopped."""

import json

import pytest
from evaluating import own_answers, tiny_loaded

from layerskip_core.config import BenchConfig
from layerskip_core.decoding import DecodeStats
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation import generation
from layerskip_core.evaluation.bench import bench
from layerskip_core.evaluation.generation import Output, Step
from layerskip_core.evaluation.journal import FILE_NAME, Journal

ONE = Output(
    (3, 4), "ab", (Step(1, 0.5), Step(1, 0.25)), DecodeStats(1, 5, 2, 6, 1, 1, 0.5, 0.1, 0.1, 0.75, (1, 1), (1,)), "eos", 12.5
)
TWO = Output(error="out of memory")
CONFIG = BenchConfig("tiny", exit_layer=5, num_draft_tokens=3, repeats=2)


def test_outputs_come_back_as_they_were(tmp_path):
    Journal(tmp_path, {"a": 1}, resume=False).add(0, 2, [ONE, TWO])
    again = Journal(tmp_path, {"a": 1}, resume=True)
    assert again.recall(0, 2) == [ONE, TWO]
    assert again.recall(0, 1) is None
    assert len(again) == 1
    assert len(Journal(tmp_path, {"a": 1}, resume=False)) == 0


def test_half_a_line_is_measured_again(tmp_path):
    journal = Journal(tmp_path, {}, resume=False)
    journal.add(0, 0, [ONE])
    journal.add(0, 1, [ONE])
    file = tmp_path / FILE_NAME
    file.write_text(file.read_text()[:-20])
    again = Journal(tmp_path, {}, resume=True)
    assert (again.recall(0, 0), again.recall(0, 1)) == ([ONE], None)
    again.add(0, 1, [TWO])
    assert Journal(tmp_path, {}, resume=True).recall(0, 1) == [TWO]


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    Journal(tmp_path, {"exit_layer": 5}, resume=False)
    with pytest.raises(LayerSkipError, match=r"--resume: .*unfinished.jsonl is of a run with other settings"):
        Journal(tmp_path, {"exit_layer": 4}, resume=True)


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    loaded, task = tiny_loaded(), own_answers()
    *_, whole = bench(loaded, task, CONFIG)
    running = bench(loaded, task, CONFIG, tmp_path)
    for _ in range(4):  # of 6: one repeat of 3 prompts, and the first of the other
        next(running)
    running.close()
    assert [json.loads(line).get("sample") for line in (tmp_path / FILE_NAME).read_text().splitlines()] == [None, 0, 1, 2, 0]
    calls = []
    honest = generation.measure

    def counted(loaded, prompt, setting):
        calls.append(prompt)
        return honest(loaded, prompt, setting)

    monkeypatch.setattr(generation, "measure", counted)
    *progress, resumed = bench(loaded, task, CONFIG, tmp_path, resume=True)
    prompts = [example.prompt for example in task.examples]
    assert calls == [prompts[0]] * 3 + [prompts[1]] * 3 + [prompts[2]] * 3  # warm-up, then two prompts in three ways
    assert [event.done for event in progress] == [1, 2, 3, 4, 5, 6]
    for mine, expected in zip(resumed.results, whole.results, strict=True):
        assert (mine.metrics, mine.acceptance_rate, mine.identical_outputs) == (
            expected.metrics, expected.acceptance_rate, expected.identical_outputs,
        )  # fmt: skip
