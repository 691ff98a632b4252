import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import RECIPE, loss_rows, same_weights, settings_on, train, weights
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import integration_utils

from layerskip_core.checkpoint.open import for_training, token_order
from layerskip_core.config.model import DataConfig
from layerskip_core.config.training import DrafterConfig, RecipeSettings
from layerskip_core.errors import ConfigError, TrainingError
from layerskip_core.training import run as running
from layerskip_core.training import trainer
from layerskip_core.training.data import run_order
from layerskip_core.training.run import execute, prepare

READ = RecipeSettings(exits=(2,), exit_reader="block")
PLAIN = RecipeSettings("finetune", p_max=0, curriculum="none")


def rows_file(tmp_path, *completions):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": "p", "completion": text}) + "\n" for text in completions)
    )
    return DataConfig(name=str(file))


def test_rows_of_different_lengths_weigh_by_their_tokens(settings, tmp_path):
    """One step over rows of few and of many target tokens: micro-batches of one give the mean over
    all of them.

    Compared in the gradient that the optimizer gets, for Adam's steps do not show its scale.
    """
    data = rows_file(tmp_path, "a", "abcdefghijk")
    losses = []
    gradients = []
    for batch_size, accumulation in ((2, 1), (1, 2)):
        sizes = {
            "batch_size": batch_size,
            "accumulation": accumulation,
            "steps": 1,
            "overwrite": True,
        }
        job = prepare(settings(data=data, recipe=PLAIN, **sizes))
        accumulated = []
        head = job.trainable.model.lm_head.weight
        head.register_post_accumulate_grad_hook(
            lambda weight, seen=accumulated: seen.append(weight.grad.clone())
        )
        execute(job, lambda report: losses.append(report.loss))
        assert len(accumulated) == accumulation
        gradients.append(accumulated[-1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run of four steps: the job, its reports, the info that it returned and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    reports = []
    job = prepare(settings_on(base, folder)(lr=2e-3, warmup=0.5))
    return job, reports, execute(job, reports.append).info, folder / "out"


def test_every_report_is_complete(trained):
    _, reports, _, _ = trained
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert {report.total_steps for report in reports} == {4}
    # Two steps of warm-up from 0, then half a cosine over the other two: what each step was taken
    # with.
    assert [report.learning_rate for report in reports] == pytest.approx([0, 1e-3, 2e-3, 1e-3])
    # R = 2: layer indices 0 and 2, then 1 and 3; each report keeps the latest of every exit seen.
    assert [sorted(report.exit_losses) for report in reports] == [
        [1, 3, 4],
        [1, 2, 3, 4],
        [1, 2, 3, 4],
        [1, 2, 3, 4],
    ]
    for report in reports:
        assert 4 < report.exit_losses[4] < 7 and 4 < report.loss < 7  # about ln 300 = 5.7 at first
        assert report.tokens_per_second > 0
    # Of the first step exits 1, 3 and 4 are on, e = 0, 3 and 6: a third and two thirds.
    losses = reports[0].exit_losses
    assert reports[0].loss == pytest.approx(losses[3] / 3 + losses[4] * 2 / 3, rel=1e-5)


def test_the_run_is_reproducible_and_the_seed_matters(settings, tmp_path):
    runs = [
        train(settings(seed=seed, steps=2, output=str(tmp_path / name), lora_rank=rank))
        for name, seed, rank in (("a", 1, 2), ("b", 1, 2), ("c", 2, 2))
    ]
    final = [[report.exit_losses[4] for report in run] for run in runs]
    assert final[0] == final[1] != final[2]  # the adapters' fresh weights follow the seed too
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_the_result_is_a_plain_checkpoint_with_its_details(trained, base):
    _, reports, info, output = trained
    loaded = for_training(str(output), "cpu", "fp32")
    written = replace(info, details=json.loads(json.dumps(info.details)))
    assert loaded.info == written and loaded.info.prompt_template == "{prompt}\n"
    details = info.details
    assert (details["base_model"], details["steps"], details["rows"]) == (base, 4, 32)
    recipe = {"preset": "finetune", "p_max": 0.2, "curriculum": "rotational", "rotation": 2}
    assert recipe.items() <= details["config"]["recipe"].items()
    assert sorted(details["final_losses"]) == ["1", "2", "3", "4"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert all(
        torch.equal(weight, loaded.model.state_dict()[name])
        for name, weight in model.state_dict().items()
    )
    assert any(
        not torch.equal(weight, weights(base)[name]) for name, weight in weights(output).items()
    )
    assert [(row["step"], row["loss"]) for row in loss_rows(output)] == [
        (report.step, report.loss) for report in reports
    ]
    assert [sorted(row["exits"]) for row in loss_rows(output)] == [["1", "3", "4"], ["2", "4"]] * 2
    assert not (output / "checkpoints").exists()  # a run without --save-steps


def test_adapters_are_merged_or_kept_alone(settings, base, tmp_path):
    """Kept, the adapter has no other weights, and loads as a model."""
    changes = {"lora_rank": 2, "lr": 1e-2, "steps": 2}
    train(settings(**changes))
    before = weights(base)
    after = weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert len(changed) == 4 * 7  # every linear layer but the head
    train(settings(**changes, lora_keep=True, output=str(tmp_path / "kept")))
    stored = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in stored} == set(range(4))
    merged = for_training(str(tmp_path / "kept"), "cpu", "fp32").model.state_dict()
    torch.testing.assert_close({name: merged[name] for name in after}, after, rtol=1e-6, atol=1e-7)


def test_from_scratch_with_a_new_tokenizer(settings, base, tmp_path):
    scratch = replace(RECIPE, preset="scratch")
    reports = train(settings(recipe=scratch, vocab_size=280))
    assert reports[0].loss == pytest.approx(5.63, abs=0.3)  # fresh weights: about ln 280
    loaded = for_training(str(tmp_path / "out"))
    assert len(loaded.tokenizer) == loaded.backend.spec.vocab == 280
    with pytest.raises(
        ConfigError,
        match="`steps` must be at least 2 to train from scratch with layer dropout, got 1",
    ):
        prepare(settings(recipe=scratch, steps=1, overwrite=True))
    prepare(settings(steps=1, overwrite=True, recipe=replace(PLAIN, preset="scratch")))


def spoiling(job, step, factor):
    def listen(report):
        if report.step == step:
            job.trainable.model.lm_head.weight.data.mul_(factor)

    return listen


@pytest.mark.parametrize(
    "factor, save_steps, message",
    [
        (float("nan"), 1, r"the loss of step 3 is nan"),
        (1e4, 0, r"the loss exploded at step 3: \d+\.\d in the last layer, first 5\.\d"),
    ],
)
def test_a_nan_or_exploding_loss_stops_the_run(settings, tmp_path, factor, message, save_steps):
    last = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    where = (
        r"no checkpoint was written"
        if not save_steps
        else f"the last good checkpoint is {last}: start from it"
    )
    job = prepare(settings(save_steps=save_steps, recipe=RECIPE))
    with pytest.raises(TrainingError, match=f"{message}; {where}.* a lower `lr`"):
        execute(job, spoiling(job, 2, factor))
    assert last.exists() == bool(save_steps) and not (last.parent / "checkpoint-3").exists()
    assert not (tmp_path / "out" / "config.json").exists()


def test_training_writes_nothing_to_the_terminal(settings, capfd, recwarn):
    train(settings(steps=2, save_steps=1, lora_rank=2))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list  # Python would print them


def test_losses_go_where_they_are_reported_to(settings, tmp_path, monkeypatch):
    logged = []
    folders = []

    class LoggedSteps(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            folders.append(args.output_dir)

        def on_log(self, args, state, control, logs=None, **_):
            logged.append((state.global_step, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "logged", LoggedSteps)
    reports = train(settings(report_to="logged"))
    assert folders == [str(tmp_path / "out" / "checkpoints")]  # where tensorboard writes
    steps = [(step, logs) for step, logs in logged if "loss" in logs]
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    for (_, logs), report in zip(steps, reports, strict=True):
        assert logs["loss"] == report.loss and logs["exit_4_loss"] == report.exit_losses[4]
        assert logs["learning_rate"] == report.learning_rate and logs["grad_norm"] > 0
    assert [("exit_1_loss" in logs, "exit_2_loss" in logs) for _, logs in steps] == [
        (True, False),
        (False, True),
    ] * 2
    with pytest.raises(ConfigError, match="`report_to` nowhere: nowhere is not supported, only "):
        prepare(settings(report_to="nowhere", overwrite=True))


def test_the_order_of_its_tokens_stands_beside_the_model(trained):
    job, _, _, output = trained
    order = token_order(output, 300)  # as `--draft-vocab` reads it
    assert order is not None and sorted(order) == list(range(300))
    targets = [token for row in job.data.training.rows for token in row["labels"].tolist()]
    assert [targets.count(token) for token in order] == sorted(
        map(targets.count, range(300)), reverse=True
    )


def test_the_order_is_a_function_of_the_seed_and_sees_every_row_once_a_pass():
    lengths = [row % 7 for row in range(30)]
    order = list(run_order(lengths, 4, 20, seed=3))  # 80 of 2 2/3 passes
    assert (
        order == list(run_order(lengths, 4, 20, seed=3)) != list(run_order(lengths, 4, 20, seed=4))
    )
    # What a longer run does does not change its beginning
    assert order[:40] == list(run_order(lengths, 4, 10, seed=3))
    # 7 steps, the 2 rows left and 2 of the next, 7 steps
    assert sorted(order[:60]) == sorted([*range(30), *range(30)])
    spans = [
        max(step) - min(step)
        for step in ([lengths[row] for row in order[at : at + 4]] for at in range(0, 80, 4))
    ]
    assert sum(spans) / len(spans) < 2  # of 0..6: without sorting about 4.5
    assert len(list(run_order([1, 1], 8, 3, seed=0))) == 24  # fewer rows than a step takes


def test_an_adapter_that_is_kept_trains_on(settings, tmp_path):
    kept = str(tmp_path / "kept")
    changes = {
        "lora_rank": 2,
        "lora_targets": "q_proj, down_proj",
        "steps": 1,
        "output": kept,
        "lora_keep": True,
    }
    train(settings(**changes))
    assert not (Path(kept) / "model.safetensors").exists()
    names = load_file(Path(kept) / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "down_proj"}
    with pytest.raises(ConfigError, match="already holds a model; give `overwrite`"):
        prepare(settings(output=kept))
    assert train(settings(model=kept, output=str(tmp_path / "on"), steps=1))[0].step == 1
    with pytest.raises(
        ConfigError, match=r"`lora_targets` nothing: Target modules .*nothing.* not found"
    ):
        prepare(
            settings(
                **{**changes, "lora_targets": "nothing", "output": str(tmp_path / "on")},
                overwrite=True,
            )
        )


REFUSED = {
    "no row of replay": (lambda make: make(replay=0.1), "replay"),
    "nothing but replay": (lambda make: make(replay=0.9), "replay"),
    "blocks without exits": (lambda make: make(recipe=replace(PLAIN, exit_reader="block")), "exit_reader"),
    "a block at every layer": (lambda make: make(recipe=replace(RECIPE, exit_reader="block")), "exit_reader"),
    "a block beside an adapter": (lambda make: make(lora_rank=2, lora_keep=True, recipe=READ), "exit_reader"),
    "a block at the last layer": (lambda make: make(DrafterConfig, exits=(4,)), "exits"),
}  # fmt: skip


@pytest.mark.parametrize("asked, field", REFUSED.values(), ids=REFUSED)
def test_settings_that_contradict_each_other_are_refused(settings, asked, field):
    with pytest.raises(ConfigError) as refused:
        prepare(asked(settings))
    assert refused.value.field == field


def test_one_process_takes_one_gpu(settings, monkeypatch):
    """Where Trainer finds two it would split the batch of each between them, and double its
    rows.
    """
    make = trainer.TrainingArguments

    def finding_two(**keywords):
        arguments = make(**keywords)
        arguments._n_gpu = 2
        return arguments

    monkeypatch.setattr(trainer, "TrainingArguments", finding_two)
    job = prepare(settings(steps=1))
    batches = []

    def count(module, args, keywords):
        if module.training:  # not the held-out rows
            batches.append(len(keywords["input_ids"]))

    job.module.register_forward_pre_hook(count, with_kwargs=True)
    execute(job)
    assert batches == [4]
    monkeypatch.setattr(running, "pick_device", lambda name: torch.device(name))
    with pytest.raises(
        ConfigError,
        match=r"`device` must be cuda, of the GPUs that CUDA_VISIBLE_DEVICES=1 leaves, got cuda:1",
    ):
        prepare(settings(device="cuda:1", overwrite=True))


def test_the_plan(settings, base):
    job = prepare(settings(steps=None, epochs=2.0, batch_size=3, accumulation=2, max_length=100))
    plan = job.plan
    rows = job.data.training.rows
    assert plan.rows == 32 and plan.tokens == sum(len(row["input_ids"]) for row in rows)
    assert (
        plan.truncated
        == sum(len(row["input_ids"]) == 100 and row["input_ids"][-1] != 2 for row in rows)
        > 0
    )
    assert plan.steps == 11  # 2 x 32 rows in steps of 6, rounded up
    assert plan.spec.parameters == sum(weight.numel() for weight in weights(base).values())
    assert plan.num_layers == 4 and plan.recipe.rotation == 2
    assert plan.exit_steps == {1: 6, 2: 5, 3: 6, 4: 11}
    assert (plan.device, plan.precision.name) == ("cpu", "fp32")
    plan = prepare(settings(data=DataConfig(), steps=5, batch_size=4, accumulation=2)).plan
    assert (plan.rows, plan.steps) == (40, 5)


def test_a_gradient_that_is_not_finite_stops_the_run(settings):
    job = prepare(settings())
    head = job.trainable.model.lm_head.weight
    head.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"the norm of the gradient of step 1 is (inf|nan)"):
        execute(job)
