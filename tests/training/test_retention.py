"""Rows of the original's own text, which keep what a model knows."""

import os
import signal
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from training_runs import RECIPE, require_exact_resumption, train

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.model import DataConfig, PromptingConfig
from layerskip_core.config.training import RecipeSettings
from layerskip_core.errors import TrainingInterrupted
from layerskip_core.losses import IGNORED
from layerskip_core.training import answers
from layerskip_core.training import finetune_run as running
from layerskip_core.training.data import collate, with_replay
from layerskip_core.training.run import execute, prepare

QUARTER = {"replay": 0.25}


def ignored(done):
    pass


def rows_of(job):
    rows, _ = job.data_sets(lambda *_: None)
    return [rows[position] for position in range(len(rows))]


@pytest.mark.parametrize(
    "replayed, per_step, places",
    [
        (1, 4, [3, 7, 11]),
        (2, 6, [2, 5, 8, 11, 14, 17]),  # in two micro-batches of 3, or on two processes: one each
        (3, 4, [1, 2, 3, 5, 6, 7, 9, 10, 11]),
    ],
)
def test_the_places_of_the_texts_are_a_function_of_the_position(replayed, per_step, places):
    own = list(range(3 * (per_step - replayed)))
    texts = [100, 101, 102, 103]
    found = list(with_replay(own, texts, replayed, per_step))
    assert len(found) == 3 * per_step
    assert [place for place, row in enumerate(found) if row in texts] == places
    assert [row for row in found if row not in texts] == own
    assert [row for row in found if row in texts] == [
        texts[number % 4] for number in range(len(places))
    ]


def test_a_quarter_of_the_rows_is_text_of_the_original(settings, base):
    """Steps of 4 rows: 3 of the data, each once an epoch, and a text with a label on every
    token.
    """
    config = settings(**QUARTER, steps=None, data=DataConfig(limit=30, seed=1))
    job = prepare(config)
    assert (job.plan.steps, len(job.replay.prompts)) == (10, 10)
    rows = rows_of(job)
    texts = rows[3::4]
    own = Counter(tuple(row["input_ids"]) for place, row in enumerate(rows) if place % 4 < 3)
    assert own == Counter(tuple(row["input_ids"]) for row in job.data.training.rows)
    assert all((row["labels"][1:] == row["input_ids"][1:]).all() for row in texts)
    assert len({tuple(row["input_ids"]) for row in texts}) == 10
    lengths = {
        len(row["input_ids"]) - len(start)
        for row, start in zip(texts, job.replay.prompts, strict=True)
    }
    assert lengths == {round(job.data.training.tokens / 30)}
    batch = collate(rows[:4])
    # Nothing predicts the first
    assert (batch["labels"][3] != IGNORED).sum() == len(texts[0]["input_ids"]) - 1


def test_texts_are_sampled_by_the_seed(settings, tmp_path):
    job = prepare(settings(**QUARTER, steps=20))
    starts = job.replay.prompts
    assert len(set(map(tuple, starts))) > 10 and {len(start) for start in starts} == {1}
    elsewhere = prepare(settings(**QUARTER, steps=20, output=str(tmp_path / "elsewhere")))
    ids, other = ([list(row["input_ids"]) for row in rows_of(each)] for each in (elsewhere, job))
    assert ids == other
    other = prepare(settings(**QUARTER, steps=20, seed=1))
    assert other.replay.journal != job.replay.journal
    assert other.replay.prompts != starts


def test_packed_rows_have_packed_texts(settings, tmp_path):
    file = tmp_path / "plain.txt"
    file.write_text("some words in a row\n\n" * 40)
    job = prepare(
        settings(
            data=DataConfig(str(file)),
            recipe=replace(RECIPE, preset="continual"),
            **QUARTER,
            max_length=32,
            steps=1,
        )
    )
    rows = rows_of(job)
    assert rows[3]["documents"].tolist() == [0] * len(rows[3]["input_ids"])
    assert collate(rows[:4])["documents"].shape == (4, 32)
    reports = []
    execute(job, reports.append)
    assert len(reports) == 1


def test_a_run_with_texts_is_resumed_bit_by_bit(settings, tmp_path, monkeypatch):
    nothing_is_written_again = partial(monkeypatch.setattr, answers, "append_lines", None)
    changes = {**QUARTER, "accumulation": 2, "batch_size": 2}
    require_exact_resumption(settings, tmp_path, nothing_is_written_again, **changes)


def test_an_interrupted_run_goes_on_from_its_texts(settings, monkeypatch):
    """A signal while it writes; `resume` then finds no checkpoint, only texts."""
    monkeypatch.setattr(answers, "BATCH", 2)
    config = settings(**QUARTER, steps=8)
    stages = []

    def interrupting(stage, done, total):
        if stage != "replay texts":
            return
        stages.append(done)
        if done >= 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(
        TrainingInterrupted, match="interrupted after 4 of 8 replay texts, which are kept"
    ):
        execute(prepare(config), ignored, interrupting)
    assert stages[0] == 0 and stages[-1] == 4 and stages == sorted(stages)
    seen = len(stages)
    job = prepare(replace(config, resume=True))
    assert (len(job.replay.known), job.plan.checkpoint) == (4, None)
    execute(
        job, ignored, lambda stage, done, total: stage == "replay texts" and stages.append(done)
    )
    assert stages[seen] == 4 and stages[-1] == 8
    assert len(prepare(replace(config, overwrite=True)).replay.known) == 8


@pytest.mark.parametrize(
    "changes, share",
    [
        ({}, 0.25),
        ({"recipe": RecipeSettings("none")}, 0.25),
        ({"replay": 0.0}, 0.0),
        ({"recipe": RECIPE}, 0.0),  # the paper's
        ({"batch_size": 2}, 0.0),  # no row of two
    ],
)
def test_a_model_that_may_know_more_than_its_task_replays_by_default(
    settings, monkeypatch, changes, share
):
    assert prepare(
        settings(**{"recipe": RecipeSettings(), **changes})
    ).plan.config.replay == changes.get("replay", 0.0)
    monkeypatch.setattr(running, "SMALL_MODEL", 1000)
    assert prepare(settings(**{"recipe": RecipeSettings(), **changes})).plan.config.replay == share


def test_what_a_template_puts_before_a_prompt_begins_every_second_text(settings, tmp_path):
    base = str(tmp_path / "templated")
    train(settings(output=base, steps=1, prompting=PromptingConfig("Question: {prompt}")))
    starts = prepare(settings(model=base, **QUARTER)).replay.prompts
    templated = for_decoding(base).prompt_start()
    assert (
        len(templated) > 1
        and starts[1::2] == [templated] * 2
        and [len(start) for start in starts[0::2]] == [1, 1]
    )
