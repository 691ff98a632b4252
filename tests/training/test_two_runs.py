"""`finetune` without the recipe: a run for the task, then one for what drafts beside its result."""

import gc
import json
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import Interrupted, same_weights, saved_base, stop_at, train, weights

from layerskip_core.checkpoint.info import AWAITS_DRAFTER, read_info
from layerskip_core.config.model import DataConfig
from layerskip_core.config.training import ExitBlockSettings, RecipeSettings
from layerskip_core.data import has_prompts, load_prompts
from layerskip_core.errors import ConfigError, TrainingInterrupted
from layerskip_core.training.run import prepare, prepare_following
from layerskip_core.training.trained import WholeModel


@pytest.fixture
def settings(settings):
    return lambda **changes: settings(**{"recipe": RecipeSettings(), "regime": None, **changes})


def details(folder):
    return json.loads((Path(folder) / "layerskip.json").read_text())


def silent(report):
    pass


def test_the_drafter_costs_the_model_nothing(settings, tmp_path):
    """It is, bit for bit, what the same steps without any exit make of it."""
    control, out = tmp_path / "control", tmp_path / "out"
    train(settings(recipe=RecipeSettings(p_max=0.0, e_scale=0.0, curriculum="none"), output=str(control)))
    job = prepare(settings())
    job.run(silent)
    assert AWAITS_DRAFTER in details(out)
    second = prepare_following(job.plan)
    assert second.plan.recipe is None and second.plan.rows + second.plan.held_out == 16  # as many as the first run saw
    second.run(silent)
    assert same_weights(out, control)
    assert details(out)["exit_blocks"] and AWAITS_DRAFTER not in details(out)
    assert second.plan.following is None


def test_resuming_goes_on_with_the_run_that_is_not_over(settings, tmp_path):
    config, out = settings(save_steps=2), tmp_path / "out"
    with pytest.raises(Interrupted):
        prepare(config).run(stop_at(3))
    job = prepare(replace(config, resume=True))
    assert job.plan.recipe is not None and job.resume.step == 2
    job.run(silent)
    with pytest.raises(ConfigError, match=r"has a model that waits for its drafter; give `resume`"):
        prepare(config)
    trained, config = weights(out), replace(config, resume=True)
    with pytest.raises(Interrupted):
        prepare(config).run(stop_at(3))
    job = prepare(config)
    assert job.plan.recipe is None and job.resume.step == 2
    job.run(silent)
    assert all((weights(out)[name] == weight).all() for name, weight in trained.items())
    assert details(out)["exit_blocks"]


def test_a_run_that_replaces_a_waiting_model_is_resumed_itself(settings):
    prepare(settings()).run(silent)
    with pytest.raises(Interrupted):
        prepare(settings(overwrite=True, save_steps=2, seed=1)).run(stop_at(3))
    with pytest.raises(ConfigError, match="already holds a model; give `overwrite`"):
        prepare(settings(save_steps=2, seed=1, resume=True))
    job = prepare(settings(overwrite=True, save_steps=2, seed=1, resume=True))
    assert job.plan.recipe is not None and job.resume.step == 2


def test_a_run_that_was_killed_before_it_removed_its_checkpoints_is_over(settings, monkeypatch):
    def killed(model, *arguments, save=WholeModel.save):
        save(model, *arguments)
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(WholeModel, "save", killed)
        prepare(settings(save_steps=2)).run(silent)
    assert prepare(settings(save_steps=2, resume=True)).plan.recipe is None


@pytest.mark.parametrize("exits", [None, (2, 3)])
def test_after_the_recipe_blocks_read_its_exits(settings, tmp_path, exits):
    """At those that it names, else at one after a third of the layers; the model's weights stay those of the recipe alone."""
    recipe = RecipeSettings(p_max=0.2, curriculum="all", exits=exits)
    train(settings(recipe=recipe, regime="finetune", output=str(tmp_path / "alone")))
    job = prepare(settings(recipe=recipe))
    job.run(silent)
    prepare_following(job.plan).run(silent)
    assert same_weights(tmp_path / "out", tmp_path / "alone")
    assert details(tmp_path / "out")["exit_blocks"].keys() == ({"1"} if exits is None else {"2", "3"})
    assert read_info(tmp_path / "out").trained_exits(4) == (exits or (1, 2, 3))


CONTROL = RecipeSettings(p_max=0.0, curriculum="none")


@pytest.mark.parametrize("changes", [{"lora_rank": 2, "lora_keep": True}, {"regime": "finetune"}, {"recipe": CONTROL}], ids=str)
def test_what_gets_no_drafter(settings, tmp_path, changes):
    job = prepare(settings(**changes))
    job.run(silent)
    assert AWAITS_DRAFTER not in details(tmp_path / "out") and job.plan.following is None


def test_a_model_of_one_layer_gets_no_drafter(settings, tmp_path):
    model = saved_base(tmp_path / "shallow", num_hidden_layers=1)
    job = prepare(settings(model=model))
    assert job.plan.notes == ("a model of one layer has no place for exits or a drafter",)
    job.run(silent)
    assert AWAITS_DRAFTER not in details(tmp_path / "out") and prepare_following(job.plan) is None
    with pytest.raises(ConfigError, match="`frozen` must be used with a model of at least 2 layers, got 1"):
        prepare(settings(model=model, exit_blocks=ExitBlockSettings(frozen=True), overwrite=True))


def test_a_signal_after_the_last_step_is_not_lost(settings, tmp_path):
    job = prepare(settings())
    with pytest.raises(TrainingInterrupted, match=r"interrupted before the drafter is trained; saved .*out"):
        job.run(lambda report: report.step == 4 and signal.raise_signal(signal.SIGTERM))
    assert AWAITS_DRAFTER in details(tmp_path / "out")
    assert prepare(settings(resume=True)).plan.recipe is None


def test_the_second_run_has_the_memory_of_the_first(settings):
    job = prepare(settings(steps=1))
    job.run(silent)
    plan, module = job.plan, weakref.ref(job.trained.module)
    del job
    gc.disable()
    try:
        prepare_following(plan)
        assert module() is None
    finally:
        gc.enable()


def test_the_output_has_no_name_of_an_embedded_model(settings):
    """By which every later command, and a second run, would find the embedded model instead of the result."""
    with pytest.raises(ConfigError, match="`output` must be a name that no embedded model has, got embedded"):
        prepare(settings(output="embedded"))


def test_rows_with_an_empty_prompt_are_left_out(settings, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": prompt, "completion": "c"}) + "\n" for prompt in ["a b", "", None, " ", "c d"])
    )
    data = DataConfig(name=str(rows))
    assert [row.prompt for row in load_prompts(data)] == ["a b", "c d"]
    job = prepare(settings(data=data))
    job.run(silent)
    assert (job.plan.rows, prepare_following(job.plan).plan.rows) == (5, 2)


def test_rows_without_prompts_are_their_own_answers(settings, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"completion": "wake me up at {row}"}}\n' for row in range(8)))
    data = replace(settings().data, name=str(rows), limit=0)
    assert not has_prompts(data)
    job = prepare(settings(data=data))
    job.run(silent)
    second = prepare_following(job.plan)
    assert second.plan.config.exit_blocks.answers == "data"
    second.run(silent)
    assert details(tmp_path / "out")["exit_blocks"]
