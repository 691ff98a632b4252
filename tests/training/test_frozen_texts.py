"""The answers that a frozen model writes, and its states on disk: the same after an interruption, refused if damaged."""

import os

import pytest
import torch
from conftest import run_texts, tiny_model
from evaluating import tiny_loaded

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode
from layerskip_core.errors import CheckpointError
from layerskip_core.losses import IGNORED
from layerskip_core.model import TransformersBackend
from layerskip_core.training import answers as answering
from layerskip_core.training import exit_blocks as keeping
from layerskip_core.training.answers import Answers, Writing
from layerskip_core.training.data import collate
from layerskip_core.training.exit_blocks import States, write_states

PROMPTS = [[5, 6, 7], [8] * 9, [9, 10], [11, 12, 13, 14], [15] * 5]
GREEDY = Writing(6, 64, 0.0, 0)


class Stopped(Exception):
    pass


def stopping_after(calls):
    """A report that ends the work at its call of that number."""
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


def test_an_answer_is_what_decoding_gives_each_prompt_alone(loaded, tmp_path):
    reports = []
    found = Answers(loaded, PROMPTS, GREEDY, tmp_path / "journal").write(reports.append)
    alone = DecodingConfig("autoregressive", max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        steps = decode(loaded.backend, prompt, alone, loaded.eos_ids)
        assert answer == [token for [step] in steps for token in step.ids]
    assert reports == [0, 2, 4, 5]


def test_an_answer_keeps_within_the_maximum_length(loaded, tmp_path):
    found = Answers(loaded, PROMPTS, Writing(6, 10, 0.0, 0), tmp_path / "journal").write(ignored)
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


@pytest.mark.parametrize("line", ["x", '{"row": 5}', "[1]"])
def test_a_damaged_journal_is_refused(loaded, tmp_path, line):
    (tmp_path / "journal").write_text(line + "\n")
    with pytest.raises(CheckpointError, match="journal is damaged"):
        Answers(loaded, PROMPTS, GREEDY, tmp_path / "journal").write(ignored)


TEXTS = [
    {"input_ids": [*prompt, *[1, 2, 3][: 1 + row % 3]], "labels": [IGNORED] * len(prompt) + [1, 2, 3][: 1 + row % 3]}
    for row, prompt in enumerate(PROMPTS)
]


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(keeping, "_TOKENS", 12)  # some texts share a pass
    return TransformersBackend(tiny_model(dtype=torch.float32))


def test_states_are_those_of_each_text_alone(backend, tmp_path):
    reports = []
    write_states(backend, backend, TEXTS, (2, 5), tmp_path, reports.append)
    states = States(TEXTS, tmp_path, backend.spec.hidden, (2, 5), (2, 5))
    assert reports[0] == 0 and reports[-1] == len(TEXTS) and len(reports) > 3
    for row, text in enumerate(TEXTS):
        found = states[row]
        hidden = backend.embed(torch.tensor([text["input_ids"]]))
        expected = [run_texts(backend, hidden, 0, stop)[0] for stop in (2, 5, 6)]
        for state, wanted in zip(
            (*found["states"], found["finals"]), (*expected[:2], backend.normed(expected[2])), strict=True
        ):
            torch.testing.assert_close(state.float(), wanted, rtol=1e-2, atol=1e-3)  # bf16
        assert (found["input_ids"], found["labels"]) == (text["input_ids"], text["labels"])


def test_states_go_on_from_what_is_on_disk_bit_by_bit(backend, tmp_path):
    write_states(backend, backend, TEXTS, (2,), tmp_path / "whole", ignored)
    cut = tmp_path / "cut"
    with pytest.raises(Stopped):
        write_states(backend, backend, TEXTS, (2,), cut, stopping_after(2))
    os.truncate(cut / "states.bf16", (cut / "states.bf16").stat().st_size - 3)  # killed in the middle of a write
    reports = []
    write_states(backend, backend, TEXTS, (2,), cut, reports.append)
    assert 0 < reports[0] < len(TEXTS)
    assert (cut / "states.bf16").read_bytes() == (tmp_path / "whole" / "states.bf16").read_bytes()


def test_a_batch_is_padded_at_the_right(backend, tmp_path):
    write_states(backend, backend, TEXTS, (2, 5), tmp_path, ignored)
    both, one = (States(TEXTS, tmp_path, backend.spec.hidden, (2, 5), chosen) for chosen in ((2, 5), (5,)))
    batch = collate([both[row] for row in (1, 3)])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, 11), "labels": (2, 11), "states": (2, 2, 11, 32), "finals": (2, 11, 32), "exits": (2,),
        "lengths": (2,),
    }  # fmt: skip
    short = len(TEXTS[3]["input_ids"])
    assert batch["labels"][1].tolist() == [*TEXTS[3]["labels"], *[IGNORED] * (11 - short)]
    assert not batch["states"][:, 1, short:].any()
    assert torch.equal(batch["finals"][1, :short], one[3]["finals"])
    assert torch.equal(batch["states"][1, 1, :short], one[3]["states"][0])
