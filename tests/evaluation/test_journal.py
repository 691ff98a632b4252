"""An interrupted benchmark continues where it stopped."""

import json
import random
from dataclasses import asdict, replace

import pytest
from evaluating import own_answers, tiny_loaded

from layerskip_core.config.evaluation import BenchConfig
from layerskip_core.decoding import DecodeStats
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.measure import runner
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.measure.journal import FILE_NAME, Journal
from layerskip_core.evaluation.outputs import Output
from layerskip_core.evaluation.results import Step

ANSWER = Output(
    (3, 4), "ab", (Step(1, 0.5), Step(1, 0.25, "exit 5")),
    DecodeStats(1, 5, 2, 6, 1, 1, 0.5, 0.1, 0.1, 0.75, (1, 1), (1,), {"exit 5": 1}), "eos", 12.5,
)  # fmt: skip
FAILURE = Output(error="out of memory")
STRATEGIES = ("autoregressive", "early-exit", "self-speculative")
CONFIG = BenchConfig("tiny", exit_layer=5, num_draft_tokens=3, repeats=2, strategies=STRATEGIES)


def test_outputs_come_back_as_they_were(tmp_path):
    Journal(tmp_path, {"a": 1}, False, 2, 10).add(0, 2, [ANSWER, FAILURE])
    again = Journal(tmp_path, {"a": 1}, True, 2, 10)
    assert again.recall(0, 2) == [ANSWER, FAILURE]
    assert again.recall(0, 1) is None
    without_resume = Journal(tmp_path, {"a": 1}, False, 2, 10)
    assert without_resume.recall(0, 2) is None


def test_an_incomplete_line_is_measured_again(tmp_path):
    journal = Journal(tmp_path, {}, False, 1, 10)
    journal.add(0, 0, [ANSWER])
    journal.add(0, 1, [ANSWER])
    file = tmp_path / FILE_NAME
    file.write_text(file.read_text()[:-20])
    again = Journal(tmp_path, {}, True, 1, 10)
    assert (again.recall(0, 0), again.recall(0, 1)) == ([ANSWER], None)
    again.add(0, 1, [FAILURE])
    assert Journal(tmp_path, {}, True, 1, 10).recall(0, 1) == [FAILURE]


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    Journal(tmp_path, {"exit_layer": 5}, False, 1, 10)
    with pytest.raises(LayerSkipError, match=r"`resume`: .*unfinished.jsonl belongs to a run with other settings"):
        Journal(tmp_path, {"exit_layer": 4}, True, 1, 10)


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
    assert [json.loads(line).get("sample") for line in (tmp_path / FILE_NAME).read_text().splitlines()] == [None, 0, 1, 2, 0]
    calls = []
    honest = runner.measure_prompt

    def counted(loaded, prompt, setting):
        calls.append(prompt)
        return honest(loaded, prompt, setting)

    monkeypatch.setattr(runner, "measure_prompt", counted)
    *progress, resumed = bench(loaded, task, CONFIG, tmp_path, resume=True)
    prompts = [example.prompt for example in task.examples]
    assert calls == [prompts[0]] * 3 + [prompts[1]] * 3 + [prompts[2]] * 3  # warm-up, then two prompts in three ways
    assert [event.done for event in progress] == [1, 2, 3, 4, 5, 6]
    for mine, expected in zip(resumed.results, whole.results, strict=True):
        assert (mine.metrics, mine.acceptance_rate, mine.identical_outputs) == (
            expected.metrics, expected.acceptance_rate, expected.identical_outputs,
        )  # fmt: skip


def damaged(change):
    """The line of ANSWER with a change to its document."""
    document = {"repeat": 0, "sample": 0, "outputs": [json.loads(json.dumps(asdict(ANSWER)))]}
    change(document)
    return json.dumps(document).encode()


def output(**fields):
    return damaged(lambda document: document["outputs"][0].update(fields))


def stats(**fields):
    return damaged(lambda document: document["outputs"][0]["stats"].update(fields))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\x00", "not valid JSON"),
        (b"[" * 100 + b"]" * 100, "needed an object, found a list"),
        (b"[]", "needed an object, found a list"),
        (b'{"repeat": 0, "sample": 0}', "outputs is missing"),
        (b'{"repeat": true, "sample": 0, "outputs": []}', "repeat: needed a whole number, found True"),
        (damaged(lambda document: document["outputs"].append(1)), r"outputs\[1\]: needed an object, found 1"),
        (damaged(lambda document: document["outputs"].clear()), "outputs: needed 1, found 0"),
        (damaged(lambda document: document.update(more=1)), "'more' is not one of its fields"),
        (output(ids=[3, 10]), r"outputs\[0\].ids: needed tokens in 0..9, found 10"),
        (output(ids=[3, "4"]), r"outputs\[0\].ids\[1\]: needed a whole number, found '4'"),
        (output(finish_reason="tired"), r"outputs\[0\].finish_reason: needed one of .*, found 'tired'"),
        (output(steps=[[1, 0.5], [1]]), r"outputs\[0\].steps\[1\]: needed 2 to 3 values, found 1"),
        (output(steps=[[1, 0.5], [1, 0]]), r"outputs\[0\].steps\[1\]: needed a count of tokens and a time, found 1, 0.0"),
        (output(steps=[[1, 0.5]]), r"outputs\[0\].steps: needed 2 tokens in all"),
        (stats(rounds=-1), r"outputs\[0\].stats.rounds: needed at least 0, found -1"),
        (stats(tested_by_position=[0]), r"outputs\[0\].stats.tested_by_position: needed at least 1"),
        (stats(steps_by_drafter={"exit 5": -1}), r"outputs\[0\].stats.steps_by_drafter: needed at least 0"),
        (stats(drafted=2**60), r"outputs\[0\].stats.drafted: needed a number in range"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    Journal(tmp_path, {}, False, 1, 10).add(0, 1, [ANSWER])
    file = tmp_path / FILE_NAME
    whole = file.read_bytes()
    file.write_bytes(whole + line + b"\n" + whole.splitlines()[1] + b"\n")
    with pytest.raises(LayerSkipError, match=f"`resume`: {file}, line 3.*{message}") as error:
        Journal(tmp_path, {}, True, 1, 10)
    assert "\n" not in str(error.value)
    assert file.read_bytes() == whole + line + b"\n" + whole.splitlines()[1] + b"\n"


def test_any_damage_to_the_file_is_an_error_or_measured_again(tmp_path):
    Journal(tmp_path, {"a": 1}, False, 1, 10).add(0, 0, [ANSWER])
    Journal(tmp_path, {"a": 1}, True, 1, 10).add(0, 1, [FAILURE])
    file = tmp_path / FILE_NAME
    whole, chance = file.read_bytes(), random.Random(11)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(content))
            content[place : place + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 2))
        file.write_bytes(content)
        try:
            journal = Journal(tmp_path, {"a": 1}, True, 1, 10)
        except LayerSkipError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            assert file.read_bytes() == content
        else:  # what it kept can be used
            for row in filter(None, (journal.recall(0, sample) for sample in (0, 1))):
                (output,) = row
                assert all(0 <= token < 10 for token in output.ids)
                assert sum(step.tokens for step in output.steps) in (0, len(output.ids))
