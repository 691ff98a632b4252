from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from layerskip_core.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from layerskip_core.config import DataConfig, FinetuneConfig, RecipeConfig
from layerskip_core.data import load_examples
from layerskip_core.errors import CheckpointError, ConfigError
from layerskip_core.training import module
from layerskip_core.training.dropout import kept_rows
from layerskip_core.training.run import prepare
from layerskip_core.training.vocabulary import train_tokenizer

PLAIN = RecipeConfig(p_max=0, curriculum="none")
RECIPE = RecipeConfig(p_max=0.2, e_scale=1.0, curriculum="rotational", rotation=2)


class Interrupted(Exception):
    """What a test stops a run with."""


def stop_at(step):
    """A listener that ends the run with the report of a step, before that step's checkpoint."""

    def listen(report):
        if report.step == step:
            raise Interrupted

    return listen


def saved_base(folder, **changes):
    """A small untrained model of four layers, 300 tokens."""
    tokenizer = train_tokenizer(load_examples(DataConfig(limit=300)), 300)
    shape = {"vocab_size": 300, "num_hidden_layers": 4, "max_position_embeddings": 256}
    model = tiny_model(dtype=torch.float32, **shape, **changes)
    model.apply(model._init_weights)  # the usual small random weights: these are to be trained
    save_checkpoint(model, tokenizer, CheckpointInfo(), str(folder), torch.float32)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def settings(base, tmp_path):
    """FinetuneConfig of a run of a few steps on the CPU."""

    def make(**changes):
        defaults = {
            "model": base,
            "data": DataConfig(limit=32, seed=1),
            "output": str(tmp_path / "out"),
            "recipe": RECIPE,
            "lr": 1e-3,
            "steps": 4,
            "batch_size": 4,
            "max_length": 128,
            "warmup": 0.0,
            "device": "cpu",
            "dtype": "fp32",
        }
        return FinetuneConfig(**{**defaults, **changes})

    return make


def train(config):
    """The reports of a run."""
    reports = []
    prepare(config).run(reports.append)
    return reports


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same_length_rows(tmp_path, count=8):
    """One length, so that grouping by length keeps the same rows together whatever the batch size."""
    file = tmp_path / "rows.jsonl"
    rows = (f'{{"prompt": "row {row}", "completion": "{"abcdefgh"[row]} is the answer"}}\n' for row in range(count))
    file.write_text("".join(rows))
    return DataConfig(name=str(file))


@pytest.mark.parametrize("recipe", [PLAIN, RecipeConfig(p_max=0, curriculum="all")], ids=["plain", "all exits"])
def test_accumulation_gives_the_same_loss_and_weights(settings, tmp_path, recipe):
    """4 x 1 and 1 x 4: the same rows in each step, the same means over target tokens; tolerance: fp32 sums in another order."""
    data = same_length_rows(tmp_path)
    runs = {}
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        output = str(tmp_path / f"{batch_size}")
        config = settings(
            data=data, output=output, recipe=recipe, steps=2, batch_size=batch_size, accumulation=accumulation
        )  # one epoch
        runs[batch_size] = train(config), weights(output)
    reports, expected = runs[4]
    for batch_size in (1, 2):
        for report, other in zip(reports, runs[batch_size][0], strict=True):
            assert other.loss == pytest.approx(report.loss, rel=1e-5)
            assert other.exit_losses == pytest.approx(report.exit_losses, rel=1e-5)
        for name, weight in runs[batch_size][1].items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-5)  # lr 1e-3: 2% of a step


def test_rows_of_unlike_lengths_weigh_by_their_tokens(settings, tmp_path):
    """One step over rows of few and of many target tokens: micro-batches of one give the mean over all of them.

    Compared in the gradient that the optimizer gets, for Adam's steps do not show its scale.
    """
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "completion": "a"}\n{"prompt": "p", "completion": "abcdefghijk"}\n')
    losses, gradients = [], []
    for batch_size, accumulation in ((2, 1), (1, 2)):
        sizes = {"batch_size": batch_size, "accumulation": accumulation, "steps": 1, "overwrite": True}
        job = prepare(settings(data=DataConfig(name=str(file)), recipe=PLAIN, **sizes))
        accumulated = []
        head = job.loaded.model.lm_head.weight
        head.register_post_accumulate_grad_hook(lambda weight, seen=accumulated: seen.append(weight.grad.clone()))
        job.run(lambda report: losses.append(report.loss))
        assert len(accumulated) == accumulation
        gradients.append(accumulated[-1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_every_micro_batch_has_its_own_moment(settings, monkeypatch):
    drawn = []

    def recording(rate, batch_size, seed, step, micro_batch, layer):
        drawn.append((step, micro_batch, layer))
        return kept_rows(rate, batch_size, seed, step, micro_batch, layer)

    monkeypatch.setattr(module, "kept_rows", recording)
    train(settings(steps=2, accumulation=2))
    assert drawn == [(step, micro_batch, layer) for step in (0, 1) for micro_batch in (0, 1) for layer in range(4)]


def test_a_small_set_is_memorised(settings, tmp_path):
    data = same_length_rows(tmp_path)
    reports = train(settings(data=data, recipe=RecipeConfig(p_max=0, curriculum="all"), steps=80, batch_size=8, lr=1e-2))
    first, last = reports[0], reports[-1]
    assert last.final_loss < 0.5 < first.final_loss - 3
    assert last.exit_losses[2] < first.exit_losses[2] - 2  # a middle exit learns with it


def test_every_report_is_complete(settings):
    reports = train(settings(lr=2e-3, warmup=0.5))
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert {report.total_steps for report in reports} == {4}
    # Two steps of warm-up from 0, then half a cosine over the other two: what each step was taken with.
    assert [report.learning_rate for report in reports] == pytest.approx([0, 1e-3, 2e-3, 1e-3])
    # R = 2: layer indices 0 and 2, then 1 and 3; each report keeps the latest of every exit seen.
    assert [sorted(report.exit_losses) for report in reports] == [[1, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
    for report in reports:
        assert report.final_loss == report.exit_losses[4]
        assert 4 < report.final_loss < 7 and 4 < report.loss < 7  # about ln 300 = 5.7 at first
        assert report.tokens_per_second > 0
    # Of the first step exits 1, 3 and 4 are on, e = 0, 3 and 6: a third and two thirds.
    losses = reports[0].exit_losses
    assert reports[0].loss == pytest.approx(losses[3] / 3 + losses[4] * 2 / 3, rel=1e-5)


def test_the_run_is_reproducible_and_the_seed_matters(settings, tmp_path):
    runs = [
        train(settings(seed=seed, steps=2, output=str(tmp_path / name), lora_rank=rank))
        for name, seed, rank in (("a", 1, 0), ("b", 1, 0), ("c", 2, 0), ("d", 1, 2), ("e", 1, 2))
    ]
    final = [[report.final_loss for report in run] for run in runs]
    assert final[0] == final[1] != final[2]
    assert final[3] == final[4]  # the adapters' fresh weights follow the seed too
    assert all(torch.equal(weight, weights(tmp_path / "b")[name]) for name, weight in weights(tmp_path / "a").items())


@pytest.mark.parametrize(("rank", "tied"), [(0, False), (0, True), (2, True)], ids=["all weights", "tied", "LoRA"])
def test_resuming_gives_the_same_weights_bit_by_bit(settings, tmp_path, rank, tied):
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    model = saved_base(tmp_path / "base", tie_word_embeddings=tied)
    changes = {"model": model, "steps": 4, "save_steps": 2, "lora_rank": rank}
    expected = train(settings(**changes, output=whole))

    with pytest.raises(Interrupted):
        prepare(settings(**changes, output=cut)).run(stop_at(3))
    assert not (Path(cut) / "config.json").exists()
    # A checkpoint that was being written when the run died does not count.
    (Path(cut) / "checkpoints" / "checkpoint-3").mkdir()
    reports = train(settings(**changes, output=cut, resume=True))
    assert [report.step for report in reports] == [3, 4]
    assert [report.loss for report in reports] == [report.loss for report in expected[2:]]
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(cut).items())


def test_resume_needs_a_checkpoint(settings, tmp_path):
    with pytest.raises(CheckpointError, match=r"--resume: there is no checkpoint in .*out.checkpoints; .* --save-steps N"):
        prepare(settings(resume=True))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_weights_is_refused(settings, tmp_path):
    with pytest.raises(Interrupted):
        prepare(settings(save_steps=1)).run(stop_at(2))
    file = tmp_path / "out" / "checkpoints" / "checkpoint-1" / "model.safetensors"
    stored = load_file(file)
    del stored["model.layers.1.mlp.up_proj.weight"], stored["lm_head.weight"]
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"incomplete: it lacks lm_head\.weight, model\.layers\.1\.mlp\.up_proj\.weight"):
        train(settings(resume=True))


def test_an_unfinished_run_is_neither_lost_nor_mixed_with_a_new_one(settings):
    with pytest.raises(Interrupted):
        prepare(settings(save_steps=2)).run(stop_at(3))
    with pytest.raises(ConfigError, match=r"--output .*out holds an unfinished run; give --resume .* or --overwrite"):
        prepare(settings(save_steps=1))
    with pytest.raises(Interrupted):
        prepare(settings(save_steps=1, overwrite=True)).run(stop_at(1))
    with pytest.raises(CheckpointError, match="--resume: there is no checkpoint"):  # checkpoint-2 was the older run's
        prepare(settings(resume=True))


def test_an_output_that_holds_a_model_is_refused(settings):
    train(settings(steps=1))
    with pytest.raises(ConfigError, match=r"--output .*out already holds a model; give --overwrite"):
        prepare(settings())
    prepare(settings(overwrite=True))


def test_what_is_saved_is_a_plain_checkpoint_with_its_story(settings, base, tmp_path):
    info = prepare(settings()).run(lambda report: None)
    output = str(tmp_path / "out")
    loaded = load_checkpoint(output, "cpu", "fp32")
    assert loaded.info == info and loaded.prompt_template == "{prompt}\n"
    details = info.details
    assert (details["base_model"], details["steps"], details["rows"]) == (base, 4, 32)
    recipe = {"p_max": 0.2, "e_scale": 1.0, "exit_weights": "paper", "curriculum": "rotational", "rotation": 2}
    assert details["config"]["recipe"] == recipe
    assert sorted(details["final_losses"]) == ["1", "2", "3", "4"]
    assert set(details["versions"]) == {"layerskip", "torch", "transformers"}
    model = AutoModelForCausalLM.from_pretrained(output)
    assert all(torch.equal(weight, loaded.model.state_dict()[name]) for name, weight in model.state_dict().items())
    assert any(not torch.equal(weight, weights(base)[name]) for name, weight in weights(output).items())


def test_lora_is_merged_into_a_plain_checkpoint(settings, base, tmp_path):
    train(settings(lora_rank=2, lr=1e-2))
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if name.endswith("_proj.weight")}
    assert changed == linear and len(linear) == 4 * 7  # every linear layer but the head
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4


def test_from_scratch_with_a_new_tokenizer(settings, base, tmp_path):
    reports = train(settings(regime="scratch", vocab_size=280))
    assert reports[0].loss == pytest.approx(5.63, abs=0.3)  # fresh weights: about ln 280
    loaded = load_checkpoint(str(tmp_path / "out"))
    assert len(loaded.tokenizer) == loaded.depth.vocab_size == 280
    with pytest.raises(ConfigError, match="--steps must be at least 2 to train from scratch with layer dropout, got 1"):
        prepare(settings(regime="scratch", steps=1, overwrite=True))
    prepare(settings(regime="scratch", steps=1, overwrite=True, recipe=PLAIN))


def test_the_plan(settings, base):
    job = prepare(settings(steps=None, epochs=2.0, batch_size=3, accumulation=2, max_length=100))
    plan = job.plan
    assert plan.rows == 32 and plan.tokens == sum(job.data.rows["length"])
    assert plan.truncated == sum(row["length"] == 100 and row["input_ids"][-1] != 2 for row in job.data.rows) > 0
    assert plan.steps == 11  # 2 x 32 rows in steps of 6, rounded up
    assert plan.parameters == sum(weight.numel() for weight in weights(base).values())
    assert plan.num_layers == 4 and plan.rotation == 2
    assert plan.exits_per_step == pytest.approx((6 * 3 + 5 * 2) / 11)  # exits 1, 3, 4 on even steps, 2, 4 on odd ones
    assert (plan.device, plan.dtype) == ("cpu", "fp32")
    assert plan.cost > 1


def test_the_cost_of_a_step(settings):
    """Layers with dropout and heads over target tokens, against layers and one head: by hand."""
    job = prepare(settings())
    layers = 4 * sum(parameter.numel() for parameter in job.loaded.depth.layers[0].parameters())
    head = 32 * 300 * job.data.target_tokens / job.data.tokens
    kept = 1 - 0.2 * (0 + 0.259921 + 0.587401 + 1) / 4  # D = 2 ** (l / 3) - 1
    assert job.plan.exits_per_step == 2.5
    assert job.plan.cost == pytest.approx((layers * kept + head * 2.5) / (layers + head), rel=1e-6)
    assert prepare(settings(recipe=PLAIN)).plan.cost == 1


def test_commands_without_a_limit_never_repeat_a_row(settings):
    job = prepare(settings(data=DataConfig(), steps=5, batch_size=4, accumulation=2))
    assert (job.plan.rows, job.plan.steps) == (40, 5)


def test_settings_that_cannot_work_fail_before_training(settings, tmp_path):
    with pytest.raises(ConfigError, match="--max-length must be at most the model's context of 256 tokens, got 300"):
        prepare(settings(max_length=300))
    assert prepare(settings(prompt_template="Q: {prompt}")).template == "Q: {prompt}"
    assert not (tmp_path / "out").exists()  # a plan writes nothing


def test_a_failure_while_saving_leaves_no_model(settings, tmp_path, monkeypatch):
    job = prepare(settings(steps=1))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(job.loaded.model), "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"cannot write the model to .*No space left on device"):
        job.run(lambda report: None)
    assert not (tmp_path / "out" / "config.json").exists()


def test_training_writes_nothing_to_the_terminal(settings, capfd, recwarn):
    train(settings(save_steps=2))
    train(settings(save_steps=2, lora_rank=2, overwrite=True))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list  # Python would print them
