"""What holds a model to its original: the anchor, against plain computations, and rows of the original's own text."""

import os
import signal
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from torch.nn.functional import kl_div
from training_runs import (
    RECIPE,
    Interrupted,
    batch,
    loss_rows,
    recipe_module,
    require_exact_resumption,
    saved_base,
    stop_at,
    train,
)

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.model import DataConfig, PromptingConfig
from layerskip_core.config.training import RecipeSettings, RetentionSettings
from layerskip_core.errors import ConfigError, TrainingInterrupted
from layerskip_core.losses import IGNORED, target_rows
from layerskip_core.model import TransformersBackend
from layerskip_core.training import answers
from layerskip_core.training.data import collate, with_replay
from layerskip_core.training.module import Anchor
from layerskip_core.training.recipe import RunStep
from layerskip_core.training.run import prepare

ALL = RecipeSettings(p_max=0, e_scale=0.5, curriculum="all", distill=0.3)


def other_model():
    """The tiny model with other weights."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def divergence(original, trained, labels):
    """KL(original || trained) of logits (B, T, V), summed over the tokens with labels."""
    wanted = labels[:, 1:] != IGNORED
    aim, found = (logits[:, :-1][wanted].log_softmax(-1) for logits in (original, trained))
    return kl_div(found, aim, reduction="sum", log_target=True)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_loss_and_gradients_are_those_of_the_plain_divergence():
    ids, labels = batch()
    trained, original = tiny_model(), other_model()
    plain = recipe_module(trained, ALL).train()(ids, labels, RunStep(0, 10))
    apart = divergence(original(ids).logits.detach(), trained(ids).logits, labels)
    expected = gradients(trained, plain["loss"] + 0.7 * apart)

    anchor = Anchor(0.7, TransformersBackend(original))
    output = recipe_module(trained, ALL, anchor=anchor).train()(ids, labels, RunStep(0, 10))
    torch.testing.assert_close(output["divergence"].double(), apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output["loss"].double(), plain["loss"].double() + 0.7 * apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(output["per_exit"], plain["per_exit"])
    found = gradients(trained, output["loss"])
    assert found.keys() == expected.keys() == dict(trained.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in original.parameters())


def test_validation_knows_no_anchor(llama):
    ids, labels = batch()
    module = recipe_module(llama, ALL, anchor=Anchor(0.7, None)).eval()
    with torch.no_grad():
        assert "divergence" not in module(ids, labels, RunStep(0, 10))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["layers", "head"])
def test_the_original_of_adapters_is_the_model_without_them(targets):
    ids, labels = batch()
    base = tiny_model()
    expected = base(ids).logits.detach()
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    module = recipe_module(model, ALL).train()
    module.anchor = Anchor(2.0, module.backend, model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    apart = divergence(expected, model(ids).logits, labels)
    assert apart > 1
    plain = recipe_module(model, ALL).train()(ids, labels, RunStep(0, 10))["loss"]
    wanted = gradients(model, plain + 2 * apart)
    output = module(ids, labels, RunStep(0, 10))
    torch.testing.assert_close(output["divergence"].double(), apart, rtol=1e-5, atol=1e-5)
    found = gradients(model, output["loss"])
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)
    assert model.training and module.backend.model.training


def test_a_copy_keeps_packed_documents_apart(llama):
    """Documents of 5 and 4 tokens in a row of 9, and one of 6 with padding: what masks give, where the tokens are real."""
    ids, _ = batch()
    documents = torch.tensor([[0] * 5 + [1] * 4, [0] * 6 + [-1] * 3, [0] * 9])
    backend = TransformersBackend(llama)
    hidden = backend.texts.states(ids, (6,), documents)[6]
    labels = ids.masked_fill(documents < 0, IGNORED)
    found = Anchor(1.0, backend).teacher(ids, labels, documents).states
    torch.testing.assert_close(found.clone(), target_rows(hidden.detach(), labels)[0])


def anchored(weight, copy=None, **changes):
    """The settings of a run whose first divergence is that of rounding: no layer is dropped."""
    plain, retention = replace(RECIPE, p_max=0.0), RetentionSettings(anchor=weight, anchor_weights=copy)
    return {"retention": retention, "recipe": plain, "lr": 1e-2, "steps": 8, **changes}


@pytest.mark.parametrize(("copy", "rank"), [(None, 0), ("int8", 0), (None, 4)], ids=["a copy", "an int8 copy", "adapters off"])
def test_a_strong_anchor_keeps_the_model_near_the_original(settings, tmp_path, copy, rank):
    """The original's rounding is small beside what eight steps change."""
    loose, strong = (
        train(settings(**anchored(weight, copy), lora_rank=rank, output=str(tmp_path / f"{weight}")))
        for weight in (1e-6, 100.0)
    )
    assert strong[0].divergence == loose[0].divergence < (1e-3 if copy else 2e-4)  # the copy is rounded
    assert strong[-1].divergence < loose[-1].divergence / 4
    assert [row["divergence"] for row in loss_rows(tmp_path / "100.0")] == [report.divergence for report in strong]


def test_a_run_is_not_resumed_beside_another_original(settings, tmp_path):
    other = saved_base(tmp_path / "other", initializer_range=0.05)
    with pytest.raises(Interrupted):
        prepare(settings(**anchored(1.0, save_steps=2, steps=4), model=other)).run(stop_at(3))
    with pytest.raises(ConfigError, match=r"`resume`: original was .* in the run to go on with"):
        prepare(settings(**anchored(1.0, steps=4), resume=True))


QUARTER = RetentionSettings(replay=0.25, replay_tokens=12)


def ignored(done):
    pass


def rows_of(job):
    """Those that the run will train on, in their order."""
    rows, _ = job.trained.rows(lambda stage, total, done: None)
    return [rows[position] for position in range(len(rows))]


@pytest.mark.parametrize(
    ("replayed", "per_step", "places"),
    [
        (1, 4, [3, 7, 11]),
        (2, 6, [2, 5, 8, 11, 14, 17]),  # in two micro-batches of 3, or on two processes: one each
        (3, 4, [1, 2, 3, 5, 6, 7, 9, 10, 11]),
    ],
)
def test_the_places_of_the_texts_are_a_function_of_the_position(replayed, per_step, places):
    own, texts = list(range(3 * (per_step - replayed))), [100, 101, 102, 103]
    found = list(with_replay(own, texts, replayed, per_step))
    assert len(found) == 3 * per_step
    assert [place for place, row in enumerate(found) if row in texts] == places
    assert [row for row in found if row not in texts] == own
    assert [row for row in found if row in texts] == [texts[number % 4] for number in range(len(places))]


def test_a_quarter_of_the_rows_is_text_of_the_original(settings, base):
    """Steps of 4 rows: 3 of the data, each once an epoch, and a text with a label on every token."""
    config = settings(retention=QUARTER, steps=None, data=DataConfig(limit=30, seed=1))
    job = prepare(config)
    assert (job.plan.steps, len(job.plan.answers.prompts)) == (10, 10)
    rows = rows_of(job)
    texts = rows[3::4]
    own = Counter(tuple(row["input_ids"]) for place, row in enumerate(rows) if place % 4 < 3)
    assert own == Counter(tuple(row["input_ids"]) for row in job.trained.data.rows)
    assert all(row["labels"] == row["input_ids"] for row in texts)
    assert len({tuple(row["input_ids"]) for row in texts}) == 10
    lengths = {len(row["input_ids"]) - len(start) for row, start in zip(texts, job.plan.answers.prompts, strict=True)}
    assert lengths == {12}
    batch = collate(rows[:4])
    assert (batch["labels"][3] != IGNORED).sum() == len(texts[0]["input_ids"]) - 1  # nothing predicts the first


def test_texts_are_sampled_by_the_seed(settings, tmp_path):
    job = prepare(settings(retention=QUARTER, steps=20))
    starts = job.plan.answers.prompts
    assert len(set(map(tuple, starts))) > 10 and {len(start) for start in starts} == {1}
    elsewhere = prepare(settings(retention=QUARTER, steps=20, output=str(tmp_path / "elsewhere")))
    ids, other = ([list(row["input_ids"]) for row in rows_of(each)] for each in (elsewhere, job))
    assert ids == other
    other = prepare(settings(retention=QUARTER, steps=20, seed=1))
    assert other.plan.answers.journal != job.plan.answers.journal
    assert other.plan.answers.prompts != starts


def test_what_a_template_puts_before_a_prompt_begins_every_second_text(settings, tmp_path):
    base = str(tmp_path / "templated")
    train(settings(output=base, steps=1, prompting=PromptingConfig("Question: {prompt}")))
    starts = prepare(settings(model=base, retention=QUARTER)).plan.answers.prompts
    templated = for_decoding(base).prompt_start()
    assert len(templated) > 1 and starts[1::2] == [templated] * 2 and [len(start) for start in starts[0::2]] == [1, 1]


def test_the_length_is_the_mean_rows_unless_it_is_asked_for(settings):
    job = prepare(settings(retention=RetentionSettings(replay=0.5)))
    assert not job.plan.answers.known and job.plan.answers.seconds > 0
    assert not Path(job.plan.config.output).exists()  # a plan writes nothing
    assert job.plan.answers.how.tokens == round(job.trained.data.tokens / len(job.trained.data.rows)) > 2
    long = prepare(settings(retention=RetentionSettings(replay=0.5, replay_tokens=1000), max_length=256)).plan
    assert {long.answers.how.room(len(start)) + len(start) for start in long.answers.prompts} == {256}


def test_packed_rows_have_packed_texts(settings, tmp_path):
    file = tmp_path / "plain.txt"
    file.write_text("some words in a row\n\n" * 40)
    job = prepare(settings(data=DataConfig(str(file)), regime="continual", retention=QUARTER, max_length=32, steps=1))
    rows = rows_of(job)
    assert rows[3]["documents"] == [0] * len(rows[3]["input_ids"])
    assert collate(rows[:4])["documents"].shape == (4, 32)
    reports = []
    job.run(reports.append)
    assert len(reports) == 1


def test_a_run_with_texts_is_resumed_bit_by_bit(settings, tmp_path, monkeypatch):
    nothing_is_written_again = partial(monkeypatch.setattr, answers, "decode_batch", None)
    changes = {"retention": replace(QUARTER, anchor=0.5), "accumulation": 2, "batch_size": 2}
    require_exact_resumption(settings, tmp_path, nothing_is_written_again, **changes)


def test_an_interrupted_run_goes_on_from_its_texts(settings, monkeypatch):
    """A signal while it writes; `resume` then finds no checkpoint, only texts."""
    monkeypatch.setattr(answers, "BATCH", 2)
    config = settings(retention=QUARTER, steps=8)
    stages = []

    def interrupting(stage, done, total):
        stages.append(done)
        if done >= 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match="interrupted after 6 of 8 replay texts, which are kept"):
        prepare(config).run(ignored, interrupting)
    assert stages == [0, 2, 4]
    job = prepare(replace(config, resume=True))
    assert (len(job.plan.answers.known), job.resume) == (6, None)
    job.run(ignored, lambda stage, done, total: stages.append(done))
    assert stages[3:] == [6, 8]
    assert len(prepare(replace(config, overwrite=True)).plan.answers.known) == 8
