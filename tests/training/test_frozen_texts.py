"""The answers that a frozen model writes: the same after an interruption."""

import pytest
import torch
from evaluating import tiny_loaded

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode
from layerskip_core.training import answers as answering
from layerskip_core.training.answers import Answers, Writing

PROMPTS = [[5, 6, 7], [8] * 9, [9, 10], [11, 12, 13, 14], [15] * 5]
GREEDY = Writing(6, 64, 0.0, 0)


class Stopped(Exception):
    pass


def stopping_after(calls):
    count = 0

    def report(done):
        nonlocal count
        count += 1
        if count > calls:
            raise Stopped

    return report


def ignored(done):
    pass


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(answering, "BATCH", 2)
    return tiny_loaded(torch.float32)


def test_an_answer_is_what_decoding_gives_each_prompt_alone_within_the_maximum_length(loaded, tmp_path):
    reports = []
    found = Answers(loaded, PROMPTS, GREEDY, tmp_path / "journal").write(reports.append)
    alone = DecodingConfig("autoregressive", max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        steps = decode(loaded.backend, prompt, alone, loaded.eos_ids)
        assert answer == [token for [step] in steps for token in step.ids]
    assert reports == [0, 2, 4, 5]
    found = Answers(loaded, PROMPTS, Writing(6, 10, 0.0, 0), tmp_path / "short").write(ignored)
    # Prompts of 9 and 5 tokens share a batch, in which the longest has room for one token.
    assert [len(answer) for answer in found] == [6, 1, 6, 6, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_run_goes_on_from_its_journal(loaded, tmp_path, temperature):
    how = Writing(6, 64, temperature, 3)
    whole = Answers(loaded, PROMPTS, how, tmp_path / "whole").write(ignored)
    journal = tmp_path / "cut"
    with pytest.raises(Stopped):
        Answers(loaded, PROMPTS, how, journal).write(stopping_after(2))
    with journal.open("a") as file:
        file.write('{"row": 4, "ids": [1')  # a process that was killed in the middle of a line
    reports = []
    assert Answers(loaded, PROMPTS, how, journal).write(reports.append) == whole
    assert reports[0] == 4  # two batches were there
    again = []
    assert Answers(loaded, PROMPTS, how, journal).write(again.append) == whole
    assert again == [5]


def test_equal_prompts_have_different_sampled_answers(loaded, tmp_path):
    """Those of a batch, and of two batches; each is what its row's seed gives alone."""
    how = Writing(6, 64, 1.0, 3)
    found = Answers(loaded, [[5, 6]] * 4, how, tmp_path / "journal").write(ignored)
    assert len(set(map(tuple, found))) == 4
    alone = DecodingConfig("autoregressive", max_new_tokens=6, temperature=1.0, seed=5)
    assert found[2] == [token for [step] in decode(loaded.backend, [5, 6], alone, loaded.eos_ids) for token in step.ids]
