"""The texts that a model writes: answers, the same after an interruption, and prompts of its
own.
"""

import json
from dataclasses import replace

import pytest
import torch
from chatml import talking_model
from command_line import fails, run
from evaluating import tiny_loaded

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode
from layerskip_core.errors import ConfigError
from layerskip_core.training import answers as answering
from layerskip_core.training.answers import ModelAnswers, Writing, own_prompts

PROMPTS = [[5, 6, 7], [8] * 9, [9, 10], [11, 12, 13, 14], [15] * 5]
GREEDY = Writing(6, 64, 0.0, 0)


class Stopped(Exception):
    pass


def stopping_after(batches):
    def report(stage, done, total, begun=0):
        if done >= 2 * batches:
            raise Stopped

    return report


def ignored(*_):
    pass


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(answering, "BATCH", 2)
    return tiny_loaded(torch.float32)


def test_an_answer_is_what_decoding_gives_each_prompt_alone_within_the_maximum_length(
    loaded, tmp_path
):
    reports = []
    found = ModelAnswers(loaded, PROMPTS, GREEDY, tmp_path / "journal").write(
        "answers", lambda stage, done, total, begun=0: reports.append((done, begun))
    )
    alone = DecodingConfig("autoregressive", max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        steps = decode(loaded.backend, prompt, alone, loaded.eos_ids)
        assert answer == [token for [step] in steps for token in step.ids]
    assert list(dict.fromkeys(done for done, _ in reports)) == [0, 2, 4, 5]
    sums = [done + begun for done, begun in reports]
    # Within a batch the tokens so far count: in a half of the steps, one of two answers.
    assert sums == sorted(sums) and set(sums) == {0, 1, 2, 3, 4, 5}
    found = ModelAnswers(loaded, PROMPTS, Writing(6, 10, 0.0, 0), tmp_path / "short").write(
        "answers", ignored
    )
    # Prompts of 9 and 5 tokens share a batch, in which the longest has room for one token.
    assert [len(answer) for answer in found] == [6, 1, 6, 6, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_run_goes_on_from_its_journal(loaded, tmp_path, temperature):
    how = Writing(6, 64, temperature, 3)
    whole = ModelAnswers(loaded, PROMPTS, how, tmp_path / "whole").write("answers", ignored)
    journal = tmp_path / "cut"
    with pytest.raises(Stopped):
        ModelAnswers(loaded, PROMPTS, how, journal).write("answers", stopping_after(2))
    with journal.open("a") as file:
        file.write('{"row": 4, "ids": [1')  # a process that was killed in the middle of a line
    reports = []
    answers = ModelAnswers(loaded, PROMPTS, how, journal)
    assert answers.write("answers", lambda *report: reports.append(report)) == whole
    assert reports[0] == ("answers", 4, 5, 0)  # two batches were there
    again = []
    answers = ModelAnswers(loaded, PROMPTS, how, journal)
    assert answers.write("answers", lambda *report: again.append(report)) == whole
    assert again == [("answers", 5, 5)]


def test_equal_prompts_have_different_sampled_answers(loaded, tmp_path):
    """Those of a batch, and of two batches; each is what its row's seed gives alone."""
    how = Writing(6, 64, 1.0, 3)
    found = ModelAnswers(loaded, [[5, 6]] * 4, how, tmp_path / "journal").write("answers", ignored)
    assert len(set(map(tuple, found))) == 4
    alone = DecodingConfig("autoregressive", max_new_tokens=6, temperature=1.0, seed=5)
    assert found[2] == [
        token
        for [step] in decode(loaded.backend, [5, 6], alone, loaded.eos_ids)
        for token in step.ids
    ]


def test_a_chat_model_writes_different_prompts_half_with_an_opening(tmp_path):
    loaded = for_decoding(talking_model(tmp_path, 256), "cpu", "fp32").with_template("chat", None)
    ending = replace(loaded, eos_ids=frozenset(range(0, loaded.backend.spec.vocab, 8)))
    prompts = list(own_prompts(ending, 12, 0))
    assert len({*prompts}) == 12 and prompts == list(own_prompts(ending, 12, 0)) != list(
        own_prompts(ending, 12, 1)
    )
    assert (
        len({prompt.startswith(tuple(answering._OPENINGS.split(","))) for prompt in prompts}) == 2
    )
    with pytest.raises(ConfigError, match="must write prompts that end, got 0 in 64 tries"):
        next(own_prompts(replace(loaded, eos_ids=frozenset()), 1, 0))


def test_prompts_of_a_chat_model_as_json_lines(tmp_path):
    model = talking_model(tmp_path, 256)
    [line] = run(f"data --model {model} --samples 1").out.splitlines()
    assert json.loads(line).keys() == {"prompt"}
    fails(
        "--model must be given without flags of a data set, got both",
        f"data --model {model} --split train",
    )
    fails(
        "a chat template was asked for, but the model's tokenizer has none", "data --model embedded"
    )
