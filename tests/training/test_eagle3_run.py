"""Runs that train a drafter in the EAGLE-3 layout beside a model that stays as it is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from decoder_types import tiny
from test_frozen_run import hashes, train
from training_runs import Interrupted, stop_at

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.sidecars import read_eagle3
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import DataConfig, PromptingConfig
from layerskip_core.config.training import DrafterConfig, FinetuneConfig
from layerskip_core.decoding import decode
from layerskip_core.errors import CheckpointError, ConfigError
from layerskip_core.losses import IGNORED
from layerskip_core.model import TransformersBackend
from layerskip_core.training.eagle3 import FrozenEagle3, suits_engines
from layerskip_core.training.encoding import encoded_row
from layerskip_core.training.run import execute, prepare

SMALL = DrafterConfig(draft_vocab=8)
EAGLE3 = {"layout": "eagle3", "answer_tokens": 8, "draft_vocab": 64}


@pytest.fixture
def frozen(settings):
    usual = {"data": DataConfig(limit=40, seed=1), "lr": None, "max_length": 96, **EAGLE3}
    return lambda **changes: settings(DrafterConfig, **{**usual, **changes})


def stored(folder):
    return read_eagle3(Path(folder, "eagle3"), for_decoding(folder, "cpu").backend.spec)


def test_a_run_leaves_the_model_as_it_is_and_drafts_as_often_right_as_it_said(frozen, checkpoint):
    """On the 320 tokens that it learns, of which chance would choose one in 64 right."""
    before = hashes(checkpoint)
    rows = {"validation": "train", "validation_samples": 40}
    config = frozen(model=checkpoint, steps=60, lr=0.02, eval_steps=60, **rows)
    described, reports, _ = train(config)
    assert described["eagle3"]["divergence"] < 0.75 * reports[0].exit_losses[0]
    assert described["eagle3"]["agreement"] > 10 / 64
    after = hashes(config.output)
    assert {name for name, digest in before.items() if after[name] != digest} == {"layerskip.json"}
    assert after.keys() == before.keys() and set(hashes(Path(config.output, "eagle3"))) == {
        "config.json",
        "model.safetensors",
    }
    decoder = for_decoding(config.output, "cpu")
    job = prepare(replace(config, output=config.output + "-again"))
    tested = accepted = 0
    for prompt in job.answers.prompts[-40:]:
        loop = decode(
            decoder.backend,
            prompt,
            DecodingConfig("eagle3", num_draft_tokens=1, max_new_tokens=8),
            decoder.eos_ids,
        )
        plain = decode(
            decoder.backend,
            prompt,
            DecodingConfig("autoregressive", max_new_tokens=8),
            decoder.eos_ids,
        )
        assert [token for [step] in loop for token in step.ids] == [
            token for [step] in plain for token in step.ids
        ]
        tested = tested + loop.stats.drafted
        accepted = accepted + loop.stats.accepted
    assert (
        abs(accepted / tested - described["eagle3"]["agreement"]) < 0.1 and accepted / tested > 0.2
    )


def test_resuming_gives_the_same_drafter_bit_by_bit(frozen, tmp_path):
    whole = str(tmp_path / "whole")
    cut = str(tmp_path / "cut")
    _, expected, _ = train(frozen(output=whole, save_steps=2))
    with pytest.raises(Interrupted):
        execute(prepare(frozen(output=cut, save_steps=2)), stop_at(3))
    _, reports, stages = train(frozen(output=cut, save_steps=2, resume=True))
    assert [report.loss for report in reports] == [report.loss for report in expected[2:]]
    assert stages == [("answers", 48, 48)]
    one = stored(whole)
    other = stored(cut)
    assert torch.equal(one.tokens, other.tokens)
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@pytest.mark.parametrize("answers", ["data", "model"])
def test_what_is_predicted_has_two_tokens_before_it(frozen, tmp_path, answers):
    lines = tmp_path / "lines.txt"
    lines.write_text("a\nb\nplay some jazz\n" * 8)
    asked = {
        "answers": answers,
        "answer_tokens": 1 if answers == "model" else DrafterConfig.answer_tokens,
    }
    data = DataConfig(name=str(lines))
    raw = PromptingConfig(raw=True)
    job = prepare(frozen(data=data, prompting=raw, batch_size=2, steps=2, **asked))
    assert job.plan.rows + job.plan.held_out == 8 and job.plan.left_out == 16
    rows, _ = job.data_sets(lambda *_: None)
    assert all(row["labels"][:2].tolist() == [IGNORED] * 2 for row in rows.dataset)


def test_a_drafter_is_trained_further(frozen, tmp_path):
    first = frozen(steps=30, lr=1e-2)
    _, reports, _ = train(first)
    start = f"{first.output}/eagle3"
    again = frozen(output=str(tmp_path / "again"), start_from=start, draft_vocab=50, lr=1e-4)
    _, further, _ = train(again)
    assert (
        further[0].exit_losses[0]
        < 1.3 * reports[-1].exit_losses[0]
        < reports[0].exit_losses[0] / 1.5
    )
    assert torch.equal(stored(again.output).tokens, stored(first.output).tokens)
    [note] = prepare(
        FinetuneConfig(model=first.output, output=str(tmp_path / "tuned"), data=first.data, steps=2)
    ).plan.notes
    assert f"--start-from {start}" in note
    with pytest.raises(CheckpointError, match="cannot load model no/where"):
        prepare(frozen(output=str(tmp_path / "other"), start_from="no/where"))


def test_tokens_are_chosen_anew_unless_the_head_is_the_drafters_own():
    backend = TransformersBackend(tiny_model(dtype=torch.float32))
    first = FrozenEagle3(backend, SMALL)
    first.begin([encoded_row([3, 50, 51, 52], [IGNORED, 50, 51, 52])])
    known = first.stored(torch.float32)
    rows = [encoded_row([3, 30, 30, 31], [IGNORED, 30, 30, 31])]
    assert known.tokens.tolist() == [0, 1, 2, 3, 4, 50, 51, 52]
    again = FrozenEagle3(backend, SMALL, known)
    again.begin(rows)
    assert again.drafter.tokens.tolist() == [0, 1, 2, 3, 4, 30, 31, 50]
    head = "lm_head.weight"
    assert torch.equal(
        again.stored(torch.float32).weights[head],
        backend.model.lm_head.weight[again.drafter.tokens],
    )
    weights = {**known.weights, head: torch.randn_like(known.weights[head])}
    other = FrozenEagle3(backend, SMALL, replace(known, weights=weights))
    other.begin(rows)
    assert torch.equal(other.drafter.tokens, known.tokens)
    assert torch.equal(other.stored(torch.float32).weights[head], weights[head])


def test_the_folder_names_the_target(frozen):
    config = frozen()
    train(config)
    document = json.loads(Path(config.output, "eagle3", "config.json").read_text())
    assert document["speculators_config"]["verifier"]["name_or_path"] == config.output
    assert document["draft_vocab_size"] == 64 and document["eagle_aux_hidden_state_layer_ids"] == [
        1,
        2,
    ]
    with pytest.raises(ConfigError, match="already holds a model"):
        prepare(config)
    with pytest.raises(ConfigError, match="already has a drafter; give `overwrite` to replace it"):
        prepare(replace(config, model=config.output))


@pytest.mark.parametrize(
    "kind, suits", [("gpt_neox", True), ("zamba2", False), ("mamba", False), ("gemma2", False)]
)
def test_the_default_layout_is_one_that_engines_can_run(kind, suits):
    """Not of models without attention, or with an embedding of another kind, scales or caps."""
    model = tiny(kind)
    model.requires_grad_()  # tests share it
    assert suits_engines(TransformersBackend(model)) == suits
    assert all(weight.requires_grad for weight in model.parameters())  # a question changes nothing


def test_a_drafter_of_a_model_with_another_rope_has_the_plain_one():
    rope = {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 5000.0,
    }
    backend = TransformersBackend(tiny_model(rope_parameters=rope))
    assert FrozenEagle3(backend, SMALL).drafter.form.rope == {"rope_theta": 5000.0}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"layout": "exit"}, "`draft_vocab` must be used with `layout` eagle3"),
        ({"layout": None, "exits": (2,)}, "`draft_vocab` must be used with `layout` eagle3"),
        ({"exits": (2,)}, "`exits` must be used with `layout` exit"),
        ({"answers": "data"}, "`answer_tokens` must be left out with `answers` data"),
    ],
)
def test_settings_that_contradict_each_other(values, message):
    with pytest.raises(ConfigError, match=message):
        DrafterConfig(**{**EAGLE3, **values})
