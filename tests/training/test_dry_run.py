"""A dry run of `finetune` tells the plan of the run without its weights."""

import pytest

from cli.training import plan_text
from layerskip_core.config.training import RecipeSettings
from layerskip_core.training import finetune_run as runs
from layerskip_core.training.run import prepare

KINDS = {
    "replay": {"replay": 0.25, "recipe": RecipeSettings("auto")},
    "LoRA": {"lora_rank": 2},
    "no exits": {"recipe": RecipeSettings("none")},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_dry_run_reads_no_weights_and_tells_the_same_plan(settings, monkeypatch, changes):
    config = settings(**changes)
    job = prepare(config)
    for loader in ("for_training", "for_decoding", "RecipeModule"):
        monkeypatch.setattr(runs, loader, lambda *_: pytest.fail("loaded"))
    dry = prepare(config, dry=True)
    assert plan_text(dry) == plan_text(job)
    # Also the fingerprint of the weights, by which replayed texts are found again
    assert dry.fixed_settings == job.fixed_settings
    assert {weight.device.type for weight in dry.trainable.model.parameters()} == {"meta"}
