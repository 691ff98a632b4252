"""Exit blocks trained together with the model, and what a training tells at its end."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from safetensors.torch import load_file
from training_runs import (
    batch,
    recipe_module,
    require_exact_resumption,
    same_weights,
    train,
    weights,
)

from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import DataConfig
from layerskip_core.config.training import RecipeSettings
from layerskip_core.data import load_examples
from layerskip_core.decoding import decode, decode_batch
from layerskip_core.errors import ConfigError
from layerskip_core.model import TransformersBackend
from layerskip_core.model.transformers_backend import DocumentRows
from layerskip_core.training.recipe import RunStep
from layerskip_core.training.run import execute, prepare

READ = RecipeSettings(p_max=0.0, exits=(2,))
MIDDLE = RunStep(1, 10)


def blocks(folder):
    return load_file(folder / "exit_blocks.safetensors")


def test_an_exit_block_stands_between_its_exit_and_the_shared_head():
    """As `FrozenExits` runs it; the last layer is read by the model's own norm."""
    model, (ids, labels) = tiny_model(dtype=torch.float32), batch()
    module = recipe_module(model, READ).train()
    output = module(ids, labels, MIDDLE)
    states = module.texts.states(ids, (2, 6))
    is_target = labels[:, 1:] != -100
    targets = labels[:, 1:][is_target]
    read = module.exit_blocks["2"](states[2], ids)
    for found, hidden in zip(
        output["per_exit"], (read, module.backend.normed(states[6])), strict=True
    ):
        expected = F.cross_entropy(
            module.backend.head(hidden[:, :-1][is_target]), targets, reduction="sum"
        )
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    output["loss"].backward()
    trained = {
        name
        for name, weight in module.named_parameters()
        if weight.grad is not None and weight.grad.any()
    }
    assert {
        "exit_blocks.2.layer.mlp.up_proj.weight",
        "model.model.layers.0.mlp.up_proj.weight",
    } <= trained
    assert not any(name.startswith("exit_blocks") and "norm" in name for name in trained)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_an_exit_block_sees_the_documents_of_a_row_apart(kind):
    """Also of a model whose layers cannot keep them apart within a row."""
    model, (ids, labels) = tiny_model(kind, dtype=torch.float32), batch(2)
    module = recipe_module(model, READ).eval()
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * 9])
    labels[:, 4] = -100  # nothing predicts the first token of a document
    together = module(ids, labels, MIDDLE, documents)
    rows = DocumentRows(documents)
    apart = rows.apart(ids)
    targets = torch.full_like(apart, -100)
    targets[0, :4] = labels[0, :4]
    targets[1, :5] = labels[0, 4:]
    targets[2] = labels[1]
    for name in ("per_exit", "agreeing"):
        torch.testing.assert_close(
            together[name], module(apart, targets, MIDDLE)[name], rtol=1e-4, atol=1e-4
        )


def test_exit_blocks_learn_by_muon_and_the_model_by_adamw(settings, tmp_path):
    """Each optimizer moves its own weights; without a learning rate for AdamW's the model stays as
    it is.
    """
    job = prepare(settings(recipe=READ, lr=1e-30, steps=3))
    start = {name: weight.clone() for name, weight in job.module.exit_blocks.named_parameters()}
    execute(job)
    after = dict(job.module.exit_blocks.named_parameters())
    moved = {name for name, weight in start.items() if not torch.equal(weight, after[name])}
    assert moved == {name for name, weight in start.items() if weight.dim() == 2}
    assert same_weights(tmp_path / "out", job.plan.config.model)
    cost = read_info(tmp_path / "out").details["cost"]
    assert cost["agreement"] == 1 and cost["before"] == pytest.approx(cost["after"])


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"lora_rank": 2}], ids=str)
def test_a_run_with_exit_blocks_is_resumed_bit_by_bit(settings, tmp_path, changes):
    require_exact_resumption(settings, tmp_path, recipe=replace(READ, p_max=0.3), **changes)
    whole = blocks(tmp_path / "whole")
    cut = blocks(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(
        torch.equal(weight, cut[name]) for name, weight in whole.items()
    )


@pytest.fixture(scope="module")
def learnt(checkpoint, tmp_path_factory):
    """A run long enough for its exit block to be right now and then; job, info and folder."""
    from training_runs import settings_on

    folder = tmp_path_factory.mktemp("learnt")
    data = {"validation": "train", "validation_samples": 40}
    make = settings_on(checkpoint, folder)
    job = prepare(make(recipe=READ, steps=80, lr=1e-3, eval_steps=80, **data))
    return job, execute(job).info, folder / "out"


def test_the_exit_block_drafts_as_often_right_as_the_training_said(learnt):
    """First drafts while decoding the prompts that it learnt from, against the agreement on their
    rows.
    """
    job, info, folder = learnt
    decoder = for_decoding(str(folder), "cpu")
    tested = 0
    accepted = 0
    assert list(decoder.backend.exit_blocks) == [2] and decoder.recommended().exits == (2,)
    for row in job.data.training.rows[:20]:
        ids = row["input_ids"].tolist()
        prompt = ids[: next(at for at, label in enumerate(row["labels"]) if label >= 0)]
        config = DecodingConfig(
            "self-speculative", exit_layer=2, num_draft_tokens=1, max_new_tokens=16
        )
        loop = decode(decoder.backend, prompt, config, decoder.eos_ids)
        for _ in loop:
            pass
        tested = tested + loop.stats.drafted
        accepted = accepted + loop.stats.accepted
    # Of decoded answers, and of the rows' own
    assert abs(accepted / tested - info.agreement["2"]) < 0.25
    assert info.trained_exits == (2,) and info.draft_profile(6).acceptance == {
        "exit 2": info.agreement["2"]
    }


def test_a_second_training_goes_on_with_the_exit_blocks(learnt, settings, tmp_path):
    """Others, and those of another exit, begin as copies of the last layer."""
    _, _, folder = learnt
    job = prepare(settings(model=str(folder), recipe=replace(READ, exits=(2, 3))))
    known = blocks(folder)
    trained = dict(job.module.exit_blocks.named_parameters())
    assert all(
        torch.equal(trained[name.removeprefix("exits.")], weight) for name, weight in known.items()
    )
    last = dict(TransformersBackend(job.trainable.model).layers[-1].named_parameters())
    assert all(torch.equal(trained[f"3.layer.{name}"], weight) for name, weight in last.items())


def test_without_a_recipe_only_the_task_is_learnt_and_its_loss_told(settings, tmp_path):
    reports = train(settings(recipe=RecipeSettings("none")))
    assert all(list(report.exit_losses) == [4] for report in reports)
    info = read_info(tmp_path / "out")
    assert info.trained_exits == () and not (tmp_path / "out" / "exit_blocks.safetensors").exists()
    assert info.cost.tokens == 4 * 4 and info.held_out == ()
    train(
        settings(
            data=replace(settings().data, limit=340),
            recipe=RecipeSettings("none"),
            steps=8,
            overwrite=True,
        )
    )
    info = read_info(tmp_path / "out")
    before, after = info.cost.task
    assert after < before and after == pytest.approx(
        info.details["validation_losses"]["4"], rel=1e-3
    )


def test_the_cost_has_how_many_held_out_rows_are_answered_right(settings, tmp_path):
    """As the saved model answers them, one by one: 8 rows that were memorised, 8 others, and 2 that
    do not count.
    """
    rows = [{"prompt": f"say {letter}", "completion": f"{letter} is said"} for letter in "abcdefgh"]
    others = [{"prompt": f"tell {letter}", "completion": "nothing"} for letter in "ijklmnop"]
    unasked = [
        {"prompt": "a long one", "completion": "word " * 65},
        {"prompt": "", "completion": "plain text"},
    ]
    for name, written in (("rows", rows), ("held", unasked + rows + others)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    data = DataConfig(str(tmp_path / "rows.jsonl"))
    held_out = str(tmp_path / "held.jsonl")
    run = {
        "data": data,
        "validation": held_out,
        "recipe": RecipeSettings("none"),
        "batch_size": 8,
        "lr": 1e-2,
    }
    # 640 rows: up to an eighth as many are read and answered
    result = execute(prepare(settings(**run, steps=80)))
    decoder = for_decoding(str(tmp_path / "out"), "cpu", "fp32")
    right = 0
    for row in rows + others:
        config = DecodingConfig("autoregressive", max_new_tokens=64)
        [answer] = decode_batch(
            decoder.backend, [decoder.encode_prompt(row["prompt"])], config, decoder.eos_ids
        )
        right += decoder.detokenize(answer.ids) == row["completion"]
        if row == rows[0]:
            assert result.example == ("say a\n", "a is said", decoder.detokenize(answer.ids))
    cost = read_info(tmp_path / "out").cost
    assert (cost.answered, cost.exact_match) == (16, (0.0, right / 16)) and 4 <= right < 16
    # 64 rows: 8 are read, 6 of them answered
    train(settings(**run, steps=8, output=str(tmp_path / "shorter")))
    assert read_info(tmp_path / "shorter").cost.answered == 6


def test_data_with_a_split_to_validate_on_trains_on_all_rows(settings):
    jobs = [
        prepare(settings(data=replace(settings().data, limit=limit), overwrite=True))
        for limit in (32, 340, 0)
    ]
    found = [
        (job.plan.rows, job.plan.held_out, job.plan.eval_steps, job.plan.division) for job in jobs
    ]
    assert found == [(32, 8, 4, None), (340, 42, 4, None), (16, 8, 4, None)]
    data = DataConfig("commands", "validation", limit=8, seed=jobs[0].plan.config.data.seed)
    held = [
        jobs[0].trainable.tokenizer.decode(row["input_ids"]) for row in jobs[0].data.held_out.rows
    ]
    assert [text.split("\n")[0] for text in held] == [row.prompt for row in load_examples(data)]


def test_merged_adapters_have_exit_blocks_and_an_adapter_alone_has_none(settings, base, tmp_path):
    train(settings(recipe=READ, lora_rank=2, lr=1e-2))
    assert (
        not same_weights(tmp_path / "out", base)
        and weights(tmp_path / "out").keys() == weights(base).keys()
    )
    assert list(for_decoding(str(tmp_path / "out"), "cpu").backend.exit_blocks) == [2]
    train(
        settings(
            recipe=RecipeSettings(), lora_rank=2, lora_keep=True, output=str(tmp_path / "kept")
        )
    )
    assert not (tmp_path / "kept" / "exit_blocks.safetensors").exists()
    assert read_info(tmp_path / "kept").details["config"]["recipe"]["exit_reader"] == "none"


def test_further_arguments_of_transformers(settings):
    job = prepare(settings(training_arguments={"adam_beta2": 0.5}, steps=1))
    execute(job)
    with pytest.raises(ConfigError, match=r"`training_arguments`: .*no_such_argument"):
        prepare(settings(training_arguments={"no_such_argument": 1}, overwrite=True))
    with pytest.raises(ConfigError, match="`training_arguments`: the run decides on max_steps, "):
        settings(training_arguments={"adam_beta2": 0.5, "max_steps": 2})


@pytest.mark.parametrize("scheduler", ["linear", "constant"])
def test_schedules_of_the_learning_rate(settings, scheduler):
    rates = [
        report.learning_rate
        for report in train(settings(scheduler=scheduler, warmup=0.25, lr=1e-3))
    ]
    assert rates == pytest.approx(
        [0, 1e-3, 2e-3 / 3, 1e-3 / 3] if scheduler == "linear" else [0, 1e-3, 1e-3, 1e-3]
    )


def test_the_exit_block_s_weight_in_the_loss_is_what_the_layers_below_feel_of_it():
    """e_scale 0.2 gives an exit a sixth of the loss (0.2 / 1.2), and 0.02 a fiftieth: gradients in
    proportion.
    """
    gradients = []
    for scale in (0.2, 0.02):
        module = recipe_module(
            tiny_model(dtype=torch.float32), replace(READ, e_scale=scale)
        ).train()
        module(*batch(), MIDDLE)["loss"].backward()
        gradients.append(module.exit_blocks["2"].layer.mlp.up_proj.weight.grad)
    torch.testing.assert_close(
        gradients[0] * (0.02 / 1.02) / (0.2 / 1.2), gradients[1], rtol=1e-3, atol=1e-6
    )
